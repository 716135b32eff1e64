import math

import pytest

from deeplimit.report import numbers


def plain(text: str) -> str:
    return text.replace(numbers.SPACE, " ")


@pytest.mark.parametrize(
    ("fraction", "samples", "text"),
    [(0.98125, 360, "98.1 %"), (0.98125, 10_000, "98.12 %"), (1.0, 5, "100.0 %"), (0, 0, "0.0 %")],
)
def test_percent(fraction: float, samples: int, text: str) -> None:
    assert plain(numbers.percent(float(fraction), samples)) == text


@pytest.mark.parametrize(
    ("difference", "error", "text"),
    [
        (-0.0028, 0.0021, "−0.3 ± 0.2 points"),
        (0.0061, None, "+0.6 points"),
        (-0.0001, 0.0004, "0.0 ± 0.0 points"),
        (0.0, None, "0.0 points"),
    ],
)
def test_points(difference: float, error: float | None, text: str) -> None:
    assert plain(numbers.points(difference, 360, error)) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (165_514, "165,514"), (1_266_000, "1.27 million"), (85_000_000_000, "85.0 billion")],
)
def test_count(number: int, text: str) -> None:
    assert plain(numbers.count(number)) == text


@pytest.mark.parametrize(
    ("time", "text"), [(2.5, "2.50 s"), (0.00213, "2.13 ms"), (0.0000317, "31.7 µs")]
)
def test_seconds(time: float, text: str) -> None:
    assert plain(numbers.seconds(time)) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (100, 20, "5.0 × fewer"),
        (20, 25, "1.2 × more"),
        (7, 7, "the same"),
        (103, 100, "1.03 × fewer"),
        (1.0, 1.01, "the same"),
        (7, 0, "none left"),
        (0, 0, "the same"),
        (0, 7, "more"),
        (5000, 10, "500 × fewer"),
    ],
)
def test_times(before: float, after: float, text: str) -> None:
    assert plain(numbers.times(float(before), float(after), "fewer", "more")) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (2.302585, "2.30"),
        (0.04567, "0.0457"),
        (123.456, "123"),
        (-0.00859, "−0.00859"),
        (3.14159e-7, "3.14·10⁻⁷"),
        (2.5e12, "2.50·10¹²"),
        (9.999, "10.0"),
        (math.nan, "–"),
    ],
)
def test_significant(number: float, text: str) -> None:
    assert numbers.significant(number) == text


def test_runs() -> None:
    assert numbers.runs((9, 4, 5, 6)) == [(4, 6), (9, 9)]
    assert numbers.runs(()) == []


def test_layers() -> None:
    assert [numbers.layers(n) for n in (0, 1, 4)] == ["no layer", "1 layer", "4 layers"]
