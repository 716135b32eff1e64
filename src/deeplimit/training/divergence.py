"""A run that diverges: when, and at which layer the first state is not finite."""

import math

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit.control import TurnpikeProfile
from deeplimit.errors import RunError
from deeplimit.training.processes import over_processes


def loss_not_finite(
    fabric: Fabric,
    module: nn.Module,
    structure: Anatomy,
    batch: tuple[Tensor, Tensor],
    step: int,
    done: int,
) -> RunError:
    """The error for a batch whose cost is not finite; all processes call it together.

    The parameters must still be those that the cost was computed with.

    Args:
        fabric: of the run.
        module: the objective as Fabric set it up.
        structure: the anatomy of the network inside.
        batch: this process's part of the batch.
        step: the optimisation step, counted from 1.
        done: epochs done.
    """
    with torch.no_grad(), structure.recording() as states:
        module(*batch)
    sizes = torch.stack([state.abs().max().float() for state in states])
    sizes = sizes.where(sizes.isfinite(), math.inf)
    largest = over_processes(fabric, sizes, "max").tolist()
    layer = next((n for n, size in enumerate(largest) if math.isinf(size)), None)
    if layer is None:
        layer = largest.index(max(largest))
        where = (
            f"the states are finite, the largest number in them, {largest[layer]:.2g}, is at layer "
            f"{layer} of {structure.horizon}"
        )
    else:
        where = f"the first state that is not finite is at layer {layer} of {structure.horizon}"
    when = f"step {step} (epoch {done + 1})"
    return RunError(f"the loss is not finite at {when}: {where}; {_remedy(done, step)}")


def check_validation(profile: TurnpikeProfile, done: int) -> None:
    """Raises RunError if a network has become worthless without its training loss showing it."""
    bad = next((n for n, loss in enumerate(profile.loss) if not math.isfinite(loss)), None)
    if bad is not None:
        raise RunError(
            f"the validation loss is not finite after epoch {done + 1}: the first layer where it "
            f"is not is layer {bad} of {profile.horizon}; {_remedy(done)}"
        )


def _remedy(done: int, step: int = 0) -> str:
    kept = f"the checkpoint after epoch {done} is kept; " if done else ""
    if step == 1:  # nothing has been learnt, so the learning rate is not to blame
        return "look for huge numbers in the data, or give smaller costs or a smaller step"
    return f"{kept}train with a smaller learning rate"
