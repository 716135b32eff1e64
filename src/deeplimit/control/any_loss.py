"""Losses other than the soft cross-entropy: whatever makes a number of outputs and a batch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deeplimit._anatomy.checks import shown
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.errors import InputError

Loss = SoftCrossEntropy | Callable[[Tensor, Any], Tensor]


class AnyLoss(nn.Module):
    """ℓ(z, y), a number: what a stage cost adds up of a loss whose minimisers are not known.

    Args:
        function: called with what the model answers to a state, of the form of its own answer, and
            with the batch's targets as they were given; it returns a scalar tensor, the mean over
            the batch.

    Raises:
        InputError: no function, or a class of losses; when it is called: what it returns is no
            scalar.
    """

    def __init__(self, function: Callable[[Tensor, Any], Tensor]):
        super().__init__()
        if isinstance(function, type) or not callable(function):
            raise InputError(
                f"{shown(function)} given as the loss; expected SoftCrossEntropy(classes), or a "
                "function or module ℓ(outputs, targets) that returns the mean over the batch"
            )
        self.function = function

    def mean(self, z: Tensor, y: Any) -> Tensor:
        """ℓ(z, y)."""
        value = self.function(z, y)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise InputError(
                f"the loss returned {shape} for outputs of shape {list(z.shape)}; expected one "
                "number, the mean over the batch (reduction='mean')"
            )
        return value


def as_loss(loss: Loss) -> SoftCrossEntropy | AnyLoss:
    """The loss of a stage cost.

    Raises:
        InputError: as `AnyLoss`.
    """
    return loss if isinstance(loss, SoftCrossEntropy) else AnyLoss(loss)
