"""JSON and TOML that somebody else wrote: a value, or one line that names the file."""

import os
from pathlib import Path
from typing import Any

import pytest

from deeplimit.errors import InputError
from deeplimit.reading import read_json, read_toml, reading
from deeplimit.records import coerce
from deeplimit.training import Recipe

DEEP = 100_000
JSON: dict[str, tuple[bytes, str]] = {
    "nested": (b"[" * DEEP + b"]" * DEEP, "recursion"),
    "1e400": (b'{"a": 1e400}', "1e400 is not a finite number"),
    "-1e400": (b'{"a": -1e400}', "-1e400 is not a finite number"),
    "NaN": (b"[NaN]", "NaN is not a finite number"),
    "Infinity": (b"[-Infinity]", "-Infinity is not a finite number"),
    "an integer beyond 64 bits": (b"[9223372036854775808]", "9223372036854775808 is too large"),
    "an integer of 5,000 digits": (b"1" * 5000, "digits"),
    "no UTF-8": (b'"\xff"', "utf-8"),
    "nothing": (b"", "Expecting value"),
}
TOML: dict[str, tuple[bytes, str]] = {
    "nested": (b"a = " + b"[" * DEEP + b"]" * DEEP, "recursion"),
    "1e400": (b"a = 1e400", "1e400 is not a finite number"),
    "inf": (b"a = inf", "inf is not a finite number"),
    "nan": (b"a = nan", "nan is not a finite number"),
    "no UTF-8": (b'a = "\xff"', "utf-8"),
}


@pytest.mark.parametrize(
    ("read", "content", "says"),
    [(read_json, *case) for case in JSON.values()] + [(read_toml, *case) for case in TOML.values()],
    ids=[f"JSON: {case}" for case in JSON] + [f"TOML: {case}" for case in TOML],
)
def test_what_no_result_may_hold(read: Any, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read(path, "write it again")
    message = str(refused.value)
    assert message.startswith(f"{path}: damaged")
    assert says in message
    assert message.endswith(": write it again")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300


def test_what_a_result_holds(tmp_path: Path) -> None:
    (tmp_path / "json").write_text('{"a": [1.5, -9223372036854775808, 9223372036854775807, null]}')
    assert read_json(tmp_path / "json", "") == {"a": [1.5, -(2**63), 2**63 - 1, None]}
    (tmp_path / "toml").write_text("a = 1.5\n[b]\nc = [1, 2]")
    assert read_toml(tmp_path / "toml", "") == {"a": 1.5, "b": {"c": [1, 2]}}


@pytest.mark.parametrize("what", ["a pipe", "a folder", "nothing"])
def test_what_is_no_file_is_neither_waited_for_nor_a_traceback(what: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    make = {"a pipe": os.mkfifo, "a folder": os.mkdir}.get(what)
    if make is not None:
        make(path)
    with pytest.raises(InputError, match=r"profile\.json: cannot be read .*: write it again$"):
        read_json(path, "write it again")


def test_what_the_system_says_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file: cannot be read \(Permission denied\): try sudo$"),
        reading(tmp_path / "file", "damaged", "try sudo"),
    ):
        raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("hint", "value"),
    [(float, 10**400), (str, "a\ud800"), (Path, "a\0b"), (tuple[str, ...], ["\udfff"])],
)
def test_values_that_nothing_can_be_done_with(hint: Any, value: Any) -> None:
    with pytest.raises(InputError, match=r"^field(\[0\])? is .*; expected "):
        coerce(hint, value, "field")


def test_a_network_to_start_from_with_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    text = Recipe().to_toml().replace("[recipe]", '[recipe]\nstart = "a\\u0000b"')
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match=r"recipe\.toml: start is 'a\\x00b'; expected a path"):
        Recipe.from_toml(tmp_path / "recipe.toml")
