"""A stage cost with a teacher: what another network answers for the same batch."""

import copy
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.checks import IGNORED, check_number
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.control.control_cost import ControlCost
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy, check_loss, widened
from deeplimit.control.stage_cost import StageCost
from deeplimit.errors import InputError


class Distillation(StageCost):
    """The stage cost's objective J, mixed with what a teacher answers for the same batch:

        (1 − w)·J + w·τ²·mean_i KL( softmax(z̄^i/τ) ‖ softmax(z^i/τ) )

    z are the model's logits, z̄ the teacher's. τ² keeps the size of the second gradient as τ grows.
    A teacher that learns beside the student, on the same batches, adds its own mean_i ℓ(z̄^i, y^i);
    nothing of the student's loss reaches it.
    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.

        >>> taught = Distillation(crop(model, 2), SoftCrossEntropy(4), model, teacher_weight=0.5)
        >>> cost, logits = taught(*loader[0])
        >>> cost.backward()

    `cost, logits = distillation(x, y)` as for `StageCost`, and it is used in its place.

    Args:
        model: the student, a classifier that `anatomy` can read.
        loss: ℓ of the stage cost.
        teacher: a classifier of the same classes that `anatomy` can read; a copy of it stays in
            evaluation mode and does not learn, unless it is to.
        learns: whether the teacher learns beside; its parameters are then the objective's too.
        teacher_weight: w, from 0 to 1.
        temperature: τ > 0.
        weight: γ of the stage cost, or γ_0 … γ_{N−1}; here 0 by default.
        control_cost: r of the stage cost.
        control_cost_kind: as of `StageCost`.
        layers: as of `StageCost`.
        shift: likewise.

    Raises:
        InputError: as `StageCost`; w or τ out of range, or a teacher without anatomy.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: SoftCrossEntropy,
        teacher: nn.Module,
        *,
        learns: bool = False,
        teacher_weight: float = 0.5,
        temperature: float = 2.0,
        weight: float | Iterable[float] | Tensor = 0.0,
        control_cost: float = 0.0,
        control_cost_kind: ControlCost = "squared",
        layers: int | None = None,
        shift: bool = False,
    ):
        check_loss(loss)
        super().__init__(
            model,
            loss,
            weight,
            control_cost=control_cost,
            control_cost_kind=control_cost_kind,
            layers=layers,
            shift=shift,
        )
        check_teaching(teacher_weight, temperature)
        self.learns = learns
        self.teacher = copy.deepcopy(teacher)
        if not learns:
            self.teacher.eval().requires_grad_(requires_grad=False)
        self.teacher_weight, self.temperature = teacher_weight, temperature
        self._answer = anatomy(self.teacher).run

    def train(self, mode: bool = True) -> "Distillation":  # noqa: FBT001, FBT002
        """Sets the mode of the student, and of a teacher that learns; another stays as it is."""
        super().train(mode)
        if not self.learns:
            self.teacher.eval()
        return self

    def _cost(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        cost, logits = super()._cost(x, y)
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            taught = self._answer(x)
        if taught.shape != logits.shape:
            raise InputError(
                f"the teacher's logits have shape {tuple(taught.shape)}, the student's "
                f"{tuple(logits.shape)}; give a teacher of the same classes"
            )
        answers = (widened(logits), widened(taught.detach()))
        own, other = (F.log_softmax(z / self.temperature, dim=-1) for z in answers)
        apart = F.kl_div(own, other, reduction="none", log_target=True).sum(-1)
        counts = y != IGNORED
        apart = apart.where(counts, 0).sum() / counts.sum().clamp(min=1)
        w = self.teacher_weight
        cost = (1 - w) * cost + w * self.temperature**2 * apart
        return cost + self.loss.mean(widened(taught), y) if self.learns else cost, logits

    def extra_repr(self) -> str:
        """γ, r, w and τ."""
        more = f"teacher_weight={self.teacher_weight:g}, temperature={self.temperature:g}"
        return f"{super().extra_repr()}, {more}"


def check_teaching(teacher_weight: float, temperature: float) -> None:
    """Raises InputError for a w or τ out of range."""
    check_number("teacher_weight", teacher_weight, "a number from 0 to 1", lambda w: 0 <= w <= 1)
    if not 0 < check_number("temperature", temperature, "a number above 0") < math.inf:
        raise InputError(f"temperature is {temperature:g}; expected a number above 0")
