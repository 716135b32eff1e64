"""Dataclasses to plain values and back: nothing lost, nothing let in that is not meant."""

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplimit.errors import InputError
from deeplimit.records import coerce, from_plain, to_plain


@dataclass(frozen=True)
class Inner:
    pair: tuple[float, float]
    name: str


@dataclass(frozen=True)
class Outer:
    rows: tuple[tuple[float, ...], ...]
    inner: Inner
    count: int
    choice: Literal["a", "b"]
    flag: bool
    maybe: int | None = None
    place: Path | None = None


def same(a: object, b: object) -> bool:
    """Equality in which NaN equals NaN."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Inner | Outer):
        return type(a) is type(b) and all(same(v, vars(b)[k]) for k, v in vars(a).items())
    return type(a) is type(b) and a == b


inners = st.builds(Inner, pair=st.tuples(st.floats(), st.floats()), name=st.text())
outers = st.builds(
    Outer,
    rows=st.lists(st.lists(st.floats()).map(tuple)).map(tuple),
    inner=inners,
    count=st.integers(),
    choice=st.sampled_from(["a", "b"]),
    flag=st.booleans(),
    maybe=st.none() | st.integers(),
    place=st.none() | st.just(Path("some/where")),
)


@pytest.mark.slow
@settings(deadline=None)  # the first one reads the annotations
@given(value=outers)
def test_json_gives_every_record_back_exactly(value: Outer) -> None:
    text = json.dumps(to_plain(value), allow_nan=False)
    assert same(from_plain(Outer, json.loads(text)), value)


GOOD = to_plain(Outer(((1.0,),), Inner((0.0, 1.0), "x"), 3, "a", True))
WRONG = {
    "missing": ({"count": ...}, "the field count is missing"),
    "unknown": ({"cuont": 1}, "unknown field cuont, did you mean count?"),
    "nested": ({"inner": {"pair": [0.0], "name": "x"}}, "inner.pair has 1 entries; expected 2"),
    "not a record": ({"inner": [1]}, "inner is [1]; expected the fields of one"),
    "not a list": ({"rows": 3.0}, "rows is 3.0; expected a list"),
    "not a number": ({"rows": [["x"]]}, "rows[0][0] is 'x'; expected a number"),
    "not whole": ({"count": 1.0}, "count is 1.0; expected a whole number"),
    "no choice": ({"choice": "c"}, "choice is 'c'; expected one of a, b"),
    "not a truth value": ({"flag": 1}, "flag is 1; expected true or false"),
    "not a string": ({"inner": {"pair": [0, 1], "name": None}}, "inner.name is None; expected str"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    changes, message = WRONG[case]
    value = {k: v for k, v in (GOOD | changes).items() if v is not ...}
    with pytest.raises(InputError) as caught:
        from_plain(Outer, value)
    assert message in str(caught.value)


def test_only_lossless_conversions() -> None:
    assert coerce(float, 3, "x") == 3.0
    assert isinstance(coerce(float, 3, "x"), float)
    assert coerce(tuple[int, ...], [1, 2], "x") == (1, 2)
    assert coerce(Path, "a/b", "x") == Path("a/b")
    for hint, value in ((float, True), (int, True), (int, "3"), (float, "3"), (Path, 3)):
        with pytest.raises(InputError):
            coerce(hint, value, "x")


def test_numbers_in_a_table_are_written_as_others_are() -> None:
    @dataclass(frozen=True)
    class Groups:
        of: dict[str, tuple[float, ...]]

    text = json.dumps(to_plain(Groups({"a": (math.inf, 0.5)})), allow_nan=False)
    assert from_plain(Groups, json.loads(text)) == Groups({"a": (math.inf, 0.5)})


def test_a_notebook_shows_the_text_of_every_rooms_results() -> None:
    from deeplimit import meanfield, ode, tables

    rooms = {
        ode: ("DepthLimit", "DiscretizationGap", "Smoothness"),
        meanfield: ("CotDistance", "Merged", "Narrowed"),
    }
    for room, names in rooms.items():
        assert all(issubclass(getattr(room, name), tables.Shown) for name in names)
    gone = ode.SolverAccuracy("<rk4>", 1, 4.0, 10, 0.5, 0.5)
    assert gone._repr_html_() == f"<pre>{html.escape(str(gone))}</pre>"
