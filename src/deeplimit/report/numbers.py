"""Numbers as people read them: one way to write a percentage, a count, a ratio, a time."""

import math
from collections.abc import Sequence
from itertools import groupby

from deeplimit.errors import several
from deeplimit.tables import decimals

SPACE = "\u00a0"  # keeps a number and its unit on one line


def percent(fraction: float, samples: int = 0) -> str:
    """0.9812 → 98.1 %; two decimals from 2000 samples on."""
    return f"{100 * fraction:.{decimals(samples)}f}{SPACE}%"


def points(difference: float, samples: int = 0, error: float | None = None) -> str:
    """A signed difference of two fractions: −0.3 ± 0.2 points."""
    digits = decimals(samples)
    value = f"{100 * difference:+.{digits}f}".replace("-", "−")
    if float(value.replace("−", "-")) == 0:
        value = value[1:]
    spread = "" if error is None else f"{SPACE}±{SPACE}{100 * error:.{digits}f}"
    return f"{value}{spread}{SPACE}points"


def count(number: int) -> str:
    """165,514 in full below a million, else 1.27 million."""
    sizes = {"trillion": 1e12, "billion": 1e9, "million": 1e6}
    return _in_units(number, sizes) or f"{number:,}"


def memory(size: int) -> str:
    """Bytes with three significant digits, in GB, MB, kB (powers of a thousand)."""
    return _in_units(size, {"GB": 1e9, "MB": 1e6, "kB": 1e3}) or f"{size}{SPACE}B"


def seconds(time: float) -> str:
    """A time with three significant digits, in s, ms or µs."""
    return _in_units(time, {"s": 1.0, "ms": 1e-3}) or f"{significant(time / 1e-6)}{SPACE}µs"


def _in_units(value: int | float, units: dict[str, float]) -> str:
    """In the first unit that is not larger; empty where all are."""
    fits = (f"{significant(value / size)}{SPACE}{u}" for u, size in units.items() if value >= size)
    return next(fits, "")


def times(before: int | float, after: int | float, less: str, more: str) -> str:
    """The ratio in words: `5.0 × fewer`, `1.2 × more`, `the same` to 2 %, `none left`."""
    if before == after or (after > 0 and 0.98 < before / after < 1.02):
        return "the same"
    if after <= 0:
        return "none left"
    if before <= 0:
        return more
    ratio, word = (before / after, less) if before > after else (after / before, more)
    return f"{ratio:.{2 if ratio < 1.05 else 1 if ratio < 99.95 else 0}f}{SPACE}×{SPACE}{word}"


def significant(number: int | float, digits: int = 3) -> str:
    """Rounded to significant digits, written without an exponent where that stays readable."""
    if not math.isfinite(number):
        return "–"
    if number == 0:
        return "0"
    size = int(f"{number:.{digits - 1}e}".split("e")[1])  # of the rounded number
    if size < -4 or size > 7:
        mantissa = f"{number / 10.0**size:.{digits - 1}f}"
        return f"{mantissa}·10{superscript(size)}".replace("-", "−")
    return f"{round(number, digits - 1 - size):.{max(0, digits - 1 - size)}f}".replace("-", "−")


def superscript(power: int) -> str:
    """An exponent: −3 → ⁻³."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def layers(number: int) -> str:
    """`1 layer`, `4 layers`, `no layer`."""
    return "no layer" if number == 0 else several(number, "layer")


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last): (4, 5, 6, 9) → [(4, 6), (9, 9)]."""
    every = enumerate(sorted(set(numbers)))
    groups = ([n for _, n in group] for _, group in groupby(every, lambda one: one[1] - one[0]))
    return [(group[0], group[-1]) for group in groups]


def perplexity(loss: float) -> str:
    """exp(loss), the loss in nats a token: among how many tokens the model hesitates."""
    return significant(math.exp(min(loss, 700)))


def higher(before: float, after: float) -> str:
    """By how much a perplexity has risen, or fallen."""
    change = math.expm1(after - before)
    word = "higher" if change > 0 else "lower"
    if change > 1:
        return f"{significant(1 + change)}{SPACE}×{SPACE}as high"
    return "the same" if change == 0 else f"{significant(100 * abs(change))}{SPACE}% {word}"
