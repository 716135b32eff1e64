"""Updates in b bits: a scale for each group of numbers, and what is lost fed into the next code."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUP = 64  # numbers that share a scale
BITS = (2, 4, 8)
MORE = (1 + 2**-8) * (1 + 1e-6)  # so that a scale is never rounded to less than it was
TINY = torch.tensor(2.0**-120, device="cpu")  # the least scale: less would have no inverse


@dataclass(frozen=True, eq=False)
class Code:
    """q = Q_b(v) = s·k: b bits a number, a scale for GROUP of them, (b + 1/4)/32 of float32.

    Attributes:
        packed: Σ_j k_j 2^{jb} in int8, where k_j are the levels |k| < 2^{b−1} of the j-th part of
            the numbers, so that packing goes through memory in order.
        scales: s of each group in bfloat16, in a column.
        bits: b.
    """

    packed: Tensor
    scales: Tensor
    bits: int

    def largest(self) -> Tensor:
        """The largest scale: not finite if some number was not, or was beyond bfloat16."""
        return self.scales.max() if self.scales.numel() else self.scales.new_zeros(())

    def levels(self, dtype: torch.dtype) -> Tensor:
        """The levels k, a row for each group."""
        parts = 8 // self.bits
        k = torch.empty(parts, self.packed.numel(), dtype=dtype, device=self.packed.device)
        first, *others = k.unbind()
        first.copy_(self.packed)
        for part, row in reversed(list(enumerate(others, 1))):  # the rest is below half of its unit
            unit = 2 ** (part * self.bits)
            torch.mul(first, 1 / unit, out=row).round_()
            first.sub_(row, alpha=unit)
        return k.view(-1, GROUP)


def encode(v: Tensor, bits: int) -> tuple[Code, Tensor]:
    """The code of v, in whose place its levels k are left, and its steps s: |v − s·k| ≤ s/2.

    s = max|v| / (2^{b−1} − 1/2) over the group, and no more than 1/128 above that. 0 is a level:
    what does not change, a token that is padding or a unit that a ReLU holds at 0, stays exactly as
    it is. NaN and infinity show in the scales. Few operations count for more than few numbers.

    Args:
        v: a group in each row, float32 or float64.
        bits: b, one of BITS.
    """
    largest = v.abs().amax(1, keepdim=True)
    scales = torch.add(TINY, largest, alpha=MORE / (2 ** (bits - 1) - 0.5)).to(torch.bfloat16)
    steps = scales.to(v.dtype)
    v.mul_(steps.reciprocal()).round_()
    packed, *others = v.view(8 // bits, -1).unbind()
    for part, row in enumerate(others, 1):
        packed = packed.add(row, alpha=2 ** (part * bits))
    return Code(packed.to(torch.int8), scales, bits), steps


class Feedback:
    """The codes of one run of states x_m, …, x_k, and x̂_n, one of the states that they give.

    v_n = x_{n+1} − x̂_n,   q_n = Q_b(v_n),   x̂_{n+1} = x̂_n + q_n,   x̂_m = x_m

    which is the update x_{n+1} − x_n with what the last code lost, c_n = x_n − x̂_n, added to it.
    Backwards x̂_n = x̂_{n+1} − q_n. All are off by |c_n| ≤ s/2, half a quantum, whatever the depth
    and the blocks; without feedback the errors of k − n codes add up. All of it is in float32, or
    float64 for states in it.

    Attributes:
        codes: of q_m, q_{m+1}, … so far.
        dtype: that of x̂.
    """

    def __init__(self, x: Tensor):
        self.codes: list[Code] = []
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # In the order of memory: channels that come last stay last.
        strides = x.stride()
        self._order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
        self._back = sorted(range(x.dim()), key=self._order.__getitem__)
        self._in_order = self._order == self._back == list(range(x.dim()))
        self._shape = x.permute(self._order).shape
        self._size, self._more = x.numel(), -x.numel() % GROUP
        self._at = 0  # how many codes are in x̂
        self._rebuilt = self._groups(x).to(self.dtype)  # x̂

    def code(self, y: Tensor, bits: int) -> Code:
        """The code in b bits of what leads to y, the state after the last one."""
        self._go(len(self.codes))
        v = self._groups(y) - self._rebuilt
        code, steps = encode(v, bits)
        self.codes.append(code)
        self._add(v, steps, 1)
        return code

    def state(self, n: int) -> Tensor:
        """x̂_{m+n}, the state before the code of this number, from the last one asked for."""
        self._go(n)
        return self._state(self._rebuilt)

    def confined(self, z: Tensor, x: Tensor, n: int) -> Tensor:
        """The nearest to z of the states that can have been x_{m+n}, |z − x̂| ≤ s/2.

        s is the scale of the code by which it was reached; the first is exact.
        """
        if n == 0:
            return x
        most = self.codes[n - 1].scales.to(self.dtype) / 2
        off = self._groups(z.to(self.dtype) - x)
        return self._state(torch.minimum(torch.maximum(off, -most), most)) + x

    def _go(self, n: int) -> None:
        while self._at != n:
            back = self._at > n
            code = self.codes[self._at - back]
            self._add(code.levels(self.dtype), code.scales.to(self.dtype), -1 if back else 1)

    def _add(self, k: Tensor, steps: Tensor, sign: int) -> None:
        """The next x̂, or the one before, in the memory of the levels."""
        self._rebuilt = torch.addcmul(self._rebuilt, k, steps, value=sign, out=k)
        self._at += sign

    def _groups(self, x: Tensor) -> Tensor:
        """All numbers, a group in each row."""
        if not self._in_order:
            x = x.permute(self._order)
        if self._more:
            x = nn.functional.pad(x.reshape(-1), (0, self._more))
        return x.reshape(-1, GROUP)

    def _state(self, groups: Tensor) -> Tensor:
        x = (groups.view(-1)[: self._size] if self._more else groups).view(self._shape)
        return x if self._in_order else x.permute(self._back)
