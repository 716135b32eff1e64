"""What the replays of one backward pass have found out about it."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deeplimit.gradient.errors import AdjointError


@dataclass(eq=False)
class BackwardPass:
    """One backward pass.

    Attributes:
        task: autograd's number for it.
        drifts: (block, drift) at each kept state.
        differences: (block, how far beyond rounding) of replays from exact inputs.
        unmeasured: segments rebuilt whose kept state has not been reached, with the last block.
    """

    task: int
    drifts: list[tuple[str, Tensor]] = field(default_factory=list)
    differences: list[tuple[str, Tensor]] = field(default_factory=list)
    unmeasured: dict[int, str] = field(default_factory=dict)

    def worst(self) -> tuple[float, str]:
        """The largest drift, and the block before which it was found; 0 if none was measured."""
        return _largest(self.drifts, nan=math.inf) or (0.0, "")

    def check_differences(self) -> None:
        """Every replay from an exact input gave the output of the forward pass.

        Raises:
            AdjointError: one did not.
        """
        found = _largest(self.differences, nan=-math.inf)
        if found is not None and found[0] > 0:
            raise AdjointError(
                f"{found[1]}: its replay gave another output than the forward pass: something that "
                "is neither input, parameter nor buffer was changed in between (an attribute, a "
                "hook, a generator). The gradient is wrong; leave the block out of blocks=, or run "
                "backward before the change"
            )


def _largest(found: list[tuple[str, Tensor]], nan: float) -> tuple[float, str] | None:
    """The largest of the numbers, NaN counted as `nan`, and whose it is."""
    if not found:
        return None
    values = torch.stack([value.double().cpu() for _, value in found])
    values = torch.where(values.isnan(), nan, values)
    worst = int(values.argmax())
    return float(values[worst]), found[worst][0]
