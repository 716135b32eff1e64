"""Reference: codes number by number in float64, and a chain of them with feedback, written out."""

import math
from itertools import pairwise

import torch
from torch import Tensor

GROUP = 64


def naive_quantised(v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(Q_b(v), s per number): levels s·k, s = max|v|/(2^{b−1} − 1/2) or just above."""
    row, found, scales = v.double().flatten().tolist(), [], []
    for start in range(0, len(row), GROUP):
        group = row[start : start + GROUP]
        s = _up(max(map(abs, group)) * (1 + 1e-6) / (2 ** (bits - 1) - 0.5) + 2.0**-120)
        for value in group:
            found.append(s * round(value / s))
            scales.append(s)
    shape = v.shape
    return (
        torch.tensor(found, dtype=torch.float64).view(shape),
        torch.tensor(scales, dtype=torch.float64).view(shape),
    )


def naive_chain(states: list[Tensor], bits: int, feedback: bool = True) -> list[Tensor]:
    """x̂_0, …, x̂_N from x̂_N = x_N − c_N (x_N without feedback) and the codes alone."""
    c, codes = torch.zeros_like(states[0], dtype=torch.float64), []
    for x, y in pairwise(states):
        v = y.double() - x.double() + c
        q, _ = naive_quantised(v, bits)
        codes.append(q)
        c = v - q if feedback else c
    found = [states[-1].double() - c]
    for q in reversed(codes):
        found.insert(0, found[0] - q)
    return found


def _up(s: float) -> float:
    """A number of 8 significant bits, not below s: the nearest to one that is half a bit above."""
    mantissa, exponent = math.frexp(s * (1 + 2**-8))
    return math.ldexp(round(mantissa * 256), exponent - 8)
