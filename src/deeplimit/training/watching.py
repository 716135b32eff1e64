"""What goes wrong while a network trains: a loss that is not finite, states rebuilt too far off."""

import math

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.control import TurnpikeProfile
from deeplimit.errors import RunError
from deeplimit.gradient import drift
from deeplimit.gradient.stand_ins import engines, switches
from deeplimit.training.processes import over_processes
from deeplimit.training.progress import Observer


def loss_not_finite(
    fabric: Fabric,
    module: nn.Module,
    structure: Anatomy,
    batch: tuple[Inputs, Tensor],
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


class DriftWatch:
    """Looks at the drift of every step, in all processes together; says so when it is too large,
    and again when it is ten times larger.

    The engines themselves are to keep silent: each would speak for its own process.

    Attributes:
        largest: the largest drift since it was last put back to 0.
    """

    def __init__(self, fabric: Fabric, model: nn.Module):
        self.fabric, self.model = fabric, model
        self.largest = 0.0
        self._told = 0.0
        blocks = [step.name for switch in switches(model) for step in switch.steps]
        names = {module: name for name, module in model.named_modules()}
        layers = [names[layer.controls[0]] for layer in anatomy(model).layers]
        # Layers by their numbers in the whole network, then what else is rebuilt, by its name.
        self._places = [*layers, *(name for name in blocks if name not in layers)]
        self._words = [f"layer {n}" for n in range(len(layers))] + self._places[len(layers) :]

    def look(self, observer: Observer) -> None:
        """After a backward pass; all processes call it together."""
        found, place = self._worst()
        self.largest = max(self.largest, found)
        engine = engines(self.model)[0]
        bound = engine.meter.error_bound(found)
        if bound <= engine.settings.tolerance or found < 10 * self._told:
            return
        self._told = found
        if self.fabric.is_global_zero:
            observer.warn(
                f"drift {found:.2g} at {place}: rebuilt states are off by that part of a "
                f"layer's update, so the gradient may be off by up to {bound:.2g} of its size. "
                f"Train with evaluations {engine.settings.evaluations + 1} instead of "
                f"{engine.settings.evaluations}, a smaller step, or the gradient backprop"
            )

    def _worst(self) -> tuple[float, str]:
        """The largest drift of the last backward pass, and where, over all processes."""
        drifts = torch.zeros(len(self._places), dtype=torch.float64, device=self.fabric.device)
        at, mine = engines(self.model)[0].meter.drift_at, drift(self.model)
        drifts[self._places.index(at) if at else 0] = math.inf if math.isnan(mine) else mine
        drifts = over_processes(self.fabric, drifts, "max")
        worst = int(drifts.argmax())
        return float(drifts[worst]), self._words[worst]
