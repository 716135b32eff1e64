"""How far rebuilt states are off while a network is trained by the adjoint."""

import math

import torch
from lightning_fabric import Fabric
from torch import nn

from deeplimit._anatomy import anatomy
from deeplimit.gradient import drift
from deeplimit.gradient.adjoint import engines, switches
from deeplimit.training.processes import over_processes
from deeplimit.training.progress import Observer


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
        bound = engine.error_bound(found)
        if bound <= engine.tolerance or found < 10 * self._told:
            return
        self._told = found
        if self.fabric.is_global_zero:
            observer.warn(
                f"drift {found:.2g} at {place}: rebuilt states are off by that part of a "
                f"layer's update, so the gradient may be off by up to {bound:.2g} of its size. "
                f"Train with evaluations {engine.evaluations + 1} instead of {engine.evaluations}, "
                "a smaller step, or the gradient backprop"
            )

    def _worst(self) -> tuple[float, str]:
        """The largest drift of the last backward pass, and where, over all processes."""
        drifts = torch.zeros(len(self._places), dtype=torch.float64, device=self.fabric.device)
        at, mine = engines(self.model)[0].drift_at, drift(self.model)
        drifts[self._places.index(at) if at else 0] = math.inf if math.isnan(mine) else mine
        drifts = over_processes(self.fabric, drifts, "max")
        worst = int(drifts.argmax())
        return float(drifts[worst]), self._words[worst]
