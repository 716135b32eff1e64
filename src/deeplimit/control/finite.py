"""Figures that are no numbers since the inputs are none."""

from torch import Tensor

from deeplimit._anatomy.evaluation import Inputs
from deeplimit.errors import InputError


def blame_inputs(x: Inputs, figures: Tensor) -> None:
    """Nothing where figures of a batch are finite; of a network that diverged nothing either.

    Raises:
        InputError: a figure is NaN or +∞, and a number of the inputs is NaN or infinite.
    """
    if figures.numel() == 0 or bool(figures.detach().amax().isfinite()):
        return
    for name, value in ({"x": x} if isinstance(x, Tensor) else x).items():
        wrong = ~value.isfinite()
        if bool(wrong.any()):
            place = [int(i) for i in wrong.nonzero()[0]]
            raise InputError(
                f"{name}{place} is {value[tuple(place)].item()}, and so are {int(wrong.sum()) - 1} "
                "more numbers of this batch; expected finite ones: replace them, or leave their "
                "samples out"
            )
