"""A stage read as a dynamical system: alike residual blocks, one after the other, with one step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network import Euler, ResidualChain, ResidualClassifier, Scheme, anatomy
from deeplimit.ode.blocks import check_module


@dataclass(frozen=True)
class Stage:
    """Residual blocks whose controls are points of one curve θ(s), s_n = n h.

    Attributes:
        index: the stage's number in the model.
        first: the number of its first layer, counted through all stages of the model.
        blocks: φ(·, θ_0), φ(·, θ_1), …; N of them for Euler, N + 1 for Heun.
        step: the step size h; 1 for models that have none.
        scheme: how a layer moves the state.
        adds: whether a block returns x + φ(x), as foreign ones do, instead of φ(x).
    """

    index: int
    first: int
    blocks: tuple[nn.Module, ...]
    step: float
    scheme: Scheme
    adds: bool

    @property
    def horizon(self) -> int:
        """N: the number of layers."""
        return len(self.blocks) - self.scheme.nodes + 1

    @property
    def layers(self) -> range:
        """The layers' numbers in the model."""
        return range(self.first, self.first + self.horizon)

    def controls(self) -> dict[str, Tensor]:
        """The blocks' parameters by their name in a block: [len(blocks), *shape], detached."""
        every = [dict(block.named_parameters()) for block in self.blocks]
        return {name: torch.stack([p[name].detach() for p in every]) for name in every[0]}


def stages(model: nn.Module) -> tuple[Stage, ...]:
    """The stages of a model that have at least two layers whose blocks are alike.

    Of a `ResidualChain` the chain itself; of our classifiers their chains; of any other model that
    `anatomy` can read the longest run, in each of its stages, of blocks of one class, whose
    parameters have the same names and shapes, and which do not change the state's shape.

    Raises:
        InputError: a model that `anatomy` cannot read, or that has no such stage.
    """
    check_module(model)
    if isinstance(model, ResidualChain | ResidualClassifier):
        chains = [model] if isinstance(model, ResidualChain) else list(model.stages)
        found = list(_of_chains(chains))  # type: ignore[arg-type]
    else:
        found = list(_of_blocks(model))
    long = tuple(stage for stage in found if stage.horizon > 1)
    if not long:
        raise InputError(
            f"{type(model).__name__} has no stage of two layers or more whose blocks have the same "
            f"class and the same shapes of parameters ({_few(found)}): its controls are no points "
            "of one curve in depth; give a network with two alike layers in a stage"
        )
    return long


def _few(found: Sequence[Stage]) -> str:
    """What there is instead."""
    if not found:
        return "it has no layers, or those of a stage differ"
    return f"alike layers in its stages: {', '.join(str(stage.horizon) for stage in found)}"


def longest_stage(model: nn.Module) -> Stage:
    """The stage with the most layers, the first of these.

    Raises:
        InputError: as `stages`.
    """
    return max(stages(model), key=lambda stage: stage.horizon)


def _of_chains(chains: Iterable[ResidualChain]) -> Iterable[Stage]:
    first = 0
    for m, chain in enumerate(chains):
        if len({_kind(block) for block in chain}) == 1:
            yield Stage(m, first, tuple(chain), chain.step, chain.scheme, adds=False)
        first += chain.horizon


def _of_blocks(model: nn.Module) -> Iterable[Stage]:
    read = anatomy(model)
    numbered = [(n, layer) for n, layer in enumerate(read.layers) if layer.removable]
    for index, own in groupby(numbered, key=lambda pair: pair[1].stage):
        runs = [list(run) for _, run in groupby(own, key=lambda pair: _kind(pair[1].controls[0]))]
        # Numbers that follow one another: a block that changes the shape lies between stages only.
        run = max(runs, key=len)
        blocks = tuple(layer.controls[0] for _, layer in run)
        yield Stage(index, run[0][0], blocks, 1.0, Euler(), adds=True)


def _kind(block: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return (type(block), shapes)
