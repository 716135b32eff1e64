"""Anatomy of our own classifiers, and of a bare chain."""

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit.network.anatomy.anatomy import Anatomy, Layer, RunningCost, StateHook
from deeplimit.network.anatomy.registry import register
from deeplimit.network.chain import ResidualChain
from deeplimit.network.classifiers import ResidualClassifier
from deeplimit.network.modes import Inputs, RunningStatistics


def _layers(chain: ResidualChain, stage: int) -> list[Layer]:
    controls = list(chain)
    nodes = chain.scheme.nodes
    return [Layer(stage, tuple(controls[n : n + nodes])) for n in range(chain.horizon)]


@register(ResidualChain)
class ChainAnatomy(Anatomy):
    """A `ResidualChain` by itself: the state is the logits (constant width C)."""

    model: ResidualChain
    stages = 1

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain's steps."""
        return tuple(_layers(self.model, 0))

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The chain's own state hook."""
        return [self.model.register_state_hook(hook)]

    @property
    def replayed(self) -> bool:
        """Whether the chain's steps are."""
        return self.model.replayed

    def charging(
        self, cost: RunningCost, x: Inputs, layers: Collection[int] | None = None
    ) -> AbstractContextManager[list[Tensor]]:
        """The chain's own: z_n is x_n."""
        return self.model.charging(partial(cost, self.head), layers)

    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """One stage only: the state itself."""
        return x

    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """The state itself."""
        return x

    def leave_out(self, removed: set[int]) -> nn.Module:
        """A shorter chain."""
        return copy.deepcopy(self.model.without(removed))


@register(ResidualClassifier)
class ResidualClassifierAnatomy(Anatomy):
    """Stages are chains; a projection alone stands between two of them."""

    model: ResidualClassifier

    @property
    def stages(self) -> int:
        """One per chain."""
        return len(self.model.stages)

    @property
    def _chains(self) -> list[ResidualChain]:
        return list(self.model.stages)  # type: ignore[arg-type]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The steps of all chains."""
        return tuple(layer for m, chain in enumerate(self._chains) for layer in _layers(chain, m))

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The chains' state hooks, counted through; the end of a chain is the next one's start."""
        handles, first = [], 0
        for m, chain in enumerate(self._chains):
            end = None if m == self.stages - 1 else chain.horizon
            handles.append(chain.register_state_hook(_shifted(hook, first, end)))
            first += chain.horizon
        return handles

    @property
    def replayed(self) -> bool:
        """Whether the steps of some chain are."""
        return any(chain.replayed for chain in self._chains)

    @contextmanager
    def charging(
        self, cost: RunningCost, x: Inputs, layers: Collection[int] | None = None
    ) -> Iterator[list[Tensor]]:
        """The chains' running costs, together once the model has run.

        Inside a step only what lies between the stages and the head is used: one state at a time
        meets them, and no other module need be looked at.
        """
        statistics = RunningStatistics(
            [*self.model.projections.modules(), *self.model.head.modules()]
        )

        def charge(stage: int, state: Tensor) -> Tensor:
            with statistics.use():
                return cost(partial(self._head_of, stage), state)

        collected: list[Tensor] = []
        with ExitStack() as stack:
            paid, first = [], 0
            for m, chain in enumerate(self._chains):
                steps = None if layers is None else {n - first for n in layers}
                paid.append(stack.enter_context(chain.charging(partial(charge, m), steps)))
                first += chain.horizon
            yield collected
            collected += [c for costs in paid for c in costs]

    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Through the projection behind the stage."""
        return self.model.projections[stage](x)

    def _head_of(self, stage: int, x: Tensor) -> Tensor:
        """The logits of states of any stage."""
        for m in range(stage, self.stages - 1):
            x = self.carry(m, x)
        return self.head(x)

    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """The classifier's head."""
        return self.model.head(x)

    def leave_out(self, removed: set[int]) -> nn.Module:
        """A classifier with shorter chains."""
        return copy.deepcopy(self.model.without(removed))


def _shifted(hook: StateHook, first: int, end: int | None) -> StateHook:
    def shifted(n: int, x: Tensor) -> None:
        if n != end:
            hook(first + n, x)

    return shifted
