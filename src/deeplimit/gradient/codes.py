"""Updates in b bits: a scale for each group of numbers, and what is lost fed into the next code."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # numbers that share a scale
BITS = (2, 4, 8)
MORE = 1 + 1e-6  # so that rounding takes no number to a level beyond the last one
TINY = 2.0**-120  # groups below it count as zero: their scale would have no inverse


@dataclass(frozen=True, eq=False)
class Code:
    """q = Q_b(v): b bits a number and a scale for each GROUP of them, (b + 1/4)/32 of float32.

    Attributes:
        packed: uint8; the k-th part of the numbers lies in the k-th b bits of the bytes, so that
            packing goes through memory in order.
        scales: s of each group in bfloat16, rounded up.
        bits: b.
    """

    packed: Tensor
    scales: Tensor
    bits: int

    def largest(self) -> Tensor:
        """The largest scale: not finite if some number was not, or was beyond bfloat16."""
        return self.scales.max() if self.scales.numel() else self.scales.new_zeros(())

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The numbers q in one row, whole groups: s·k for |k| < 2^{b−1}."""
        b, parts = self.bits, 8 // self.bits
        numbers = torch.empty(parts * self.packed.numel(), dtype=dtype, device=self.packed.device)
        for part, row in enumerate(numbers.view(parts, -1)):
            row.copy_((self.packed >> (part * b)) & (2**b - 1) if parts > 1 else self.packed)
        groups = numbers.view(-1, GROUP)
        groups.sub_(2 ** (b - 1)).mul_(self.scales.to(dtype)[:, None])
        return numbers


def encode(v: Tensor, bits: int) -> Code:
    """The code of v, in whose place its error v − Q_b(v) is left, |v − Q_b(v)| ≤ s/2.

    s = max|v| / (2^{b−1} − 1/2) over the group, rounded up. 0 is a level: what does not change, a
    token that is padding or a unit that a ReLU holds at 0, stays exactly as it is. NaN and infinity
    show in the scales.

    Args:
        v: whole groups in one row, float32 or float64.
        bits: b, one of BITS.
    """
    half: int = 2 ** (bits - 1)
    groups = v.view(-1, GROUP)
    work = groups.abs()
    largest = work.amax(1) if len(work) else work.new_empty(0)
    scales = _rounded_up(torch.where(largest < TINY, 0.0, largest * (MORE / (half - 0.5))))
    step = scales.to(v.dtype)[:, None]
    torch.mul(groups, torch.where(step > 0, step.reciprocal(), 0.0), out=work).round_()
    codes = work.add_(half).to(torch.uint8).view(8 // bits, -1)
    groups.sub_(work.sub_(half).mul_(step))
    packed = codes[0]
    for part in range(1, len(codes)):
        packed = packed.add(codes[part], alpha=2 ** (part * bits))
    return Code(packed, scales, bits)


def _rounded_up(s: Tensor) -> Tensor:
    """Numbers ≥ 0 in bfloat16, none smaller than it was: no level lies beyond the last one."""
    whole = s.float().view(torch.int32)
    return ((whole + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


class Feedback:
    """The codes of one run of states x_m, …, x_k, each fed with what the last one lost.

    u_n = x_{n+1} − x_n,  v_n = u_n + c_n,  q_n = Q_b(v_n),  c_{n+1} = v_n − q_n,  c_m = 0

    Then Σ_{m ≤ k < n} q_k = x_n − x_m − c_n, so the states rebuilt from x_k − c_k,

    x̂_k = x_k − c_k,  x̂_n = x̂_{n+1} − q_n,

    are off by x̂_n − x_n = −c_n: half a quantum at most, whatever the depth and the blocks. (From
    x_k itself it would be c_k − c_n. Without feedback the errors of k − n codes add up.) All of it
    in float32, or float64 for states in it.

    Attributes:
        dtype: that of c and x̂.
    """

    def __init__(self, x: Tensor):
        self._size = x.numel()
        # In the order of memory: channels that come last stay last.
        strides = x.stride()
        self._order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
        self._shape = x.permute(self._order).shape
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        padded = -(-self._size // GROUP) * GROUP
        self._error = x.new_zeros(padded, dtype=self.dtype)  # c, or x̂_k once that was asked for
        self._ended = False

    def code(self, x: Tensor, y: Tensor, bits: int) -> Code:
        """The code of y − x in b bits, for the next state y after the last one, x."""
        if self._ended:  # backward passes have begun, and the chain goes on all the same
            self._turn(x)
        self._error[: self._size].add_(self._row(y)).sub_(self._row(x))
        self._error[self._size :].zero_()  # or what fills the last group would widen its scale
        return encode(self._error, bits)

    def end(self, x: Tensor) -> Tensor:
        """x̂_k = x_k − c_k of the last state x_k, in the place of c_k."""
        if not self._ended:
            self._turn(x)
        return self._state(self._error)

    def before(self, after: Tensor, code: Code) -> Tensor:
        """x̂_n = x̂_{n+1} − q_n, in the accumulators' precision."""
        q = self._state(code.decode(self.dtype))
        return torch.sub(after, q, out=q)

    def confined(self, z: Tensor, x: Tensor, code: Code | None) -> Tensor:
        """The nearest to z of the states that can have been x_n, |z − x̂_n| ≤ s/2.

        The code is that of block n − 1, by which x_n was reached; at the start of the run, where
        there is none, x̂_n is exact.
        """
        if code is None:
            return x
        off = torch.zeros_like(self._error)
        self._state(off).copy_(z).sub_(x)
        most = code.scales.to(self.dtype)[:, None] / 2
        groups = off.view(-1, GROUP)
        torch.minimum(torch.maximum(groups, -most, out=groups), most, out=groups)
        return self._state(off).add_(x)

    def _turn(self, x: Tensor) -> None:
        """From c to x − c, and back."""
        self._error[: self._size].neg_().add_(self._row(x))
        self._ended = not self._ended

    def _row(self, x: Tensor) -> Tensor:
        return x.detach().permute(self._order).reshape(-1)

    def _state(self, row: Tensor) -> Tensor:
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return row[: self._size].view(self._shape).permute(back)
