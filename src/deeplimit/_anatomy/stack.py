"""A stage read as a dynamical system: blocks with one step, and their controls."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from deeplimit._anatomy.chain import SCHEMES, ResidualChain, Scheme, chains_in

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # noqa: SLF001


def layers_of(block: nn.Module) -> list[nn.Module]:
    """The modules that have parameters of their own, in order of registration, taken for use."""
    return [m for m in block.modules() if next(m.parameters(recurse=False), None) is not None]


def control(block: nn.Module) -> list[nn.Parameter]:
    """The control θ_n of a block, on which a control cost acts.

    All its parameters; where the block has a norm, those from its last norm on, which is the norm's
    scale and bias if the block ends in it. A penalty on the weights before a norm is no control
    cost, since the norm undoes their scale. θ_n = 0 gives φ = 0.
    """
    layers = layers_of(block)
    norms = [i for i, layer in enumerate(layers) if isinstance(layer, NORM_LAYERS)]
    deciding = layers[norms[-1] :] if norms else layers
    every = (p for layer in deciding for p in layer.parameters(recurse=False))
    return list({id(p): p for p in every}.values())


@dataclass(frozen=True)
class Stack:
    """The blocks of a stage, whose controls are points of one curve θ(s), s_n = n h, where alike.

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
    step: float = 1.0
    scheme: Scheme = SCHEMES["euler"]
    adds: bool = True

    @property
    def horizon(self) -> int:
        """N: the number of layers."""
        return max(len(self.blocks) - self.scheme.nodes + 1, 0)

    @property
    def layers(self) -> range:
        """The layers' numbers in the model."""
        return range(self.first, self.first + self.horizon)

    def controls(self) -> dict[str, Tensor]:
        """The blocks' parameters by their name in a block: [len(blocks), *shape], detached."""
        every = [dict(block.named_parameters()) for block in self.blocks]
        return {name: torch.stack([p[name].detach() for p in every]) for name in every[0]}

    def alike(self, fixed: Collection[int] = ()) -> "Stack | None":
        """Its longest run of blocks of one class and of parameters of the same names and shapes.

        None where there is none; of blocks with a common step and scheme all must be alike.
        """
        numbered = [(n, b) for n, b in enumerate(self.blocks, self.first) if n not in fixed]
        # Numbers that follow one another: a block that changes the shape lies between stages only.
        runs = [list(run) for _, run in groupby(numbered, key=lambda pair: _kind(pair[1]))]
        run = max(runs, key=len, default=[])
        if not run or (len(run) < len(self.blocks) and not self.adds):
            return None
        return replace(self, first=run[0][0], blocks=tuple(block for _, block in run))


def chain_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The chains that a model holds or is, those without layers too; none of any other model."""
    return stacks_of([chain for _, chain in chains_in(model)])


def stacks_of(chains: Iterable[ResidualChain]) -> tuple[Stack, ...]:
    """Chains that follow one another."""
    first, found = 0, []
    for m, chain in enumerate(chains):
        found.append(Stack(m, first, tuple(chain), chain.step, chain.scheme, adds=False))
        first += chain.horizon
    return tuple(found)


def _kind(block: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return (type(block), shapes)
