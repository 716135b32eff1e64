"""The cost of every way to a gradient on one batch: memory, time, error and drift."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import check_count
from deeplimit.gradient import use_backprop
from deeplimit.gradient.accuracy import LossOf
from deeplimit.gradient.codes import BITS
from deeplimit.studies.gradient_methods import MethodCost, Methods

EVALUATIONS = (1, 2, 3)
SAME = 1.02  # memories this near count as equal: then the faster method is the better one


@dataclass(frozen=True)
class LeftPlain:
    """A candidate that is not rebuilt, and why."""

    block: str
    why: str


@dataclass(frozen=True)
class GradientCost:
    """All methods on one model and batch.

    Attributes:
        model: as the user gave it.
        weights: where its parameters come from, in words.
        device, dtype: where and in what numbers.
        batch: what is in it, in words.
        loss: of the batch.
        parameters: how many.
        parameter_bytes: theirs; their gradients take as many again.
        tolerance: of the gradient's error, what was planned for.
        steps: timed per method.
        seed: of random numbers.
        chains: the blocks linked to each other, in order; their states can be coded or rebuilt.
        left_plain: candidates whose states cannot.
        methods: plain first; only that one where there are no chains.
    """

    model: str
    weights: str
    device: str
    dtype: str
    batch: str
    loss: float
    parameters: int
    parameter_bytes: int
    tolerance: float
    steps: int
    seed: int
    chains: tuple[tuple[str, ...], ...]
    left_plain: tuple[LeftPlain, ...]
    methods: tuple[MethodCost, ...]

    @property
    def plain(self) -> MethodCost:
        """Ordinary backpropagation, what the others are compared with."""
        return self.methods[0]

    @property
    def best(self) -> MethodCost | None:
        """The least memory at an error within the tolerance; of about equal ones the fastest.

        None where none needs less than plain backpropagation.
        """
        limit = float("inf") if self.plain.memory is None else self.plain.memory / SAME
        fit = [
            (method.memory, method.seconds or 0.0, method)
            for method in self.methods[1:]
            if method.memory is not None
            and method.memory < limit
            and (method.error is not None and method.error <= self.tolerance)
            and not self._repeated(method)
        ]
        least = SAME * min((memory for memory, _, _ in fit), default=0)
        near = [(seconds, method) for memory, seconds, method in fit if memory <= least]
        return min(near, key=lambda timed: timed[0], default=(0.0, None))[1]

    def _repeated(self, method: MethodCost) -> bool:
        """A plan that keeps all states is a checkpoint again."""
        return method.method == "planned" and method.kept == sum(map(len, self.chains))


def measure_gradient_cost(
    model: nn.Module,
    loss_of: LossOf,
    batch: Any,
    *,
    name: str = "",
    weights: str = "",
    tolerance: float = 1e-2,
    steps: int = 5,
    seed: int = 0,
    tell: Callable[[str], object] = lambda _: None,
) -> GradientCost:
    """Measures memory, time, gradient error and drift of every method on one batch.

    Plain backpropagation, torch's checkpoint per block, states rebuilt with e = 1, 2, 3 where
    blocks add their input, coded in 2, 4 and 8 bits, and what `plan_memory` makes of these.
    Parameters, buffers, gradients and torch's random state are left as they were; a model that was
    switched is plain afterwards.

    >>> model = ResidualChain([TwoLayerResidual(4, 8) for _ in range(6)], step=0.1)
    >>> loss_of = lambda model, x: model(x).square().mean()
    >>> measure_gradient_cost(model, loss_of, torch.rand(2, 4), steps=1).plain.error
    0.0

    Args:
        model: any model, in the mode to be measured.
        loss_of: loss_of(model, batch) → a scalar.
        batch: whatever it takes, on the model's device.
        name: of the model, for the result.
        weights: where its parameters come from, for the result.
        tolerance: of the gradient's relative error, for the plan.
        steps: how many are timed for each method.
        seed: of dropout and the like.
        tell: is told before each method what comes.

    Raises:
        InputError: a number out of range, a model without candidates for blocks, or one that does
            not run on the batch.
    """
    check_count("steps", steps)
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            study = Methods(model, loss_of, batch, tolerance, steps, tell)
            rows = [MethodCost("plain")]
            if study.blocks:
                rows.append(MethodCost("checkpointed"))
                rows += [MethodCost("adjoint", e) for e in EVALUATIONS if study.adds]
                rows += [MethodCost("coded", 1, bits=b) for b in BITS]
                rows.append(MethodCost("planned"))
            methods = study.costs(rows)
        finally:
            use_backprop(model)
            with torch.no_grad():
                for buffer, copy in buffers:
                    buffer.copy_(copy)
            for p, gradient in gradients:
                p.grad = gradient
    parameters = list(model.parameters())
    return GradientCost(
        model=name,
        weights=weights,
        device=str(study.device),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        batch=_described(batch),
        loss=study.loss,
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.itemsize for p in parameters),
        tolerance=tolerance,
        steps=steps,
        seed=seed,
        chains=study.chains,
        left_plain=tuple(LeftPlain(*entry) for entry in study.left_plain.items()),
        methods=methods,
    )


def _described(batch: Any) -> str:
    """Names and shapes of what is in a batch."""
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    named = batch.items() if isinstance(batch, Mapping) else [("", part) for part in parts]
    shapes = [
        (name, "×".join(map(str, part.shape)) or "scalar")
        for name, part in named
        if isinstance(part, Tensor)
    ]
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes)
