"""Chains as layers: a bare one, several between a stem and a head, and those of other models."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.anatomy import Anatomy, Layer, RunningCost, StateHook
from deeplimit._anatomy.chain import ResidualChain, Stack, chains_in, stacks_of
from deeplimit._anatomy.evaluation import Inputs, RunningStatistics
from deeplimit._anatomy.inputs import call
from deeplimit._anatomy.read_model import ReadModel
from deeplimit._anatomy.stand_ins import standing_in


def chain_with(chain: ResidualChain, stack: Stack) -> ResidualChain:
    """A copy of a chain with the blocks and the step of a stack."""
    other = copy.deepcopy(chain, dict.fromkeys(map(id, chain)))
    other._modules.clear()
    other.extend(stack.blocks)
    other.step = stack.step
    return other


class ChainAnatomy(Anatomy):
    """Stages are chains; of a bare `ResidualChain` one, whose state is the logits (width C)."""

    model: Any

    @property
    def _chains(self) -> list[ResidualChain]:
        return [self.model]

    @property
    def _projections(self) -> Sequence[nn.Module]:
        """The modules that alone stand between two stages."""
        return ()

    @property
    def _parts(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.Identity()

    @property
    def stem_and_head(self) -> tuple[nn.Module, nn.Module] | None:
        """Of a chain neither does anything."""
        return self._parts

    @property
    def stages(self) -> int:
        """One per chain."""
        return len(self._chains)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The steps of all chains."""
        return tuple(
            Layer(s.index, s.blocks[n : n + s.scheme.nodes])
            for s in self.stacks
            for n in range(s.horizon)
        )

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The chains' state hooks, counted through; the end of a chain is the next one's start."""
        every, last = zip(self.stacks, self._chains, strict=True), self.stages - 1
        return [
            chain.register_state_hook(
                _shifted(hook, stack.first, None if stack.index == last else stack.horizon)
            )
            for stack, chain in every
        ]

    def register_leaving_hook(self, n: int, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """The next state of the layer's chain."""
        stage = self.layers[n].stage
        last = n + 1 - self.stacks[stage].first

        def leaves(i: int, x: Tensor) -> None:
            if i == last:
                hook(x)

        return self._chains[stage].register_state_hook(leaves)

    @property
    def replayed(self) -> bool:
        """True where the steps of some chain are."""
        return any(chain.replayed for chain in self._chains)

    @contextmanager
    def collect_stage_costs(
        self, costs: Mapping[int, RunningCost], x: Inputs
    ) -> Iterator[list[Tensor]]:
        """The chains' running costs, together once the model has run.

        Inside a step only what lies between the stages and the head is used: one state at a time
        meets them, and no other module need be looked at.
        """
        statistics = RunningStatistics(m for module in self._used for m in module.modules())

        def charge(n: int, stage: int, state: Tensor, left: Tensor) -> Tensor:
            with statistics.use():
                return costs[n](lambda s: self._head_of(stage, s, x), state, left)

        collected: list[Tensor] = []
        with ExitStack() as exits:
            paid = []
            for stack, chain in zip(self.stacks, self._chains, strict=True):
                own = {
                    n - stack.first: partial(charge, n, stack.index)
                    for n in costs
                    if n in stack.layers
                }
                paid.append(exits.enter_context(chain.collect_stage_costs(own)))
            yield collected
            collected += [c for own in paid for c in own]

    @property
    def _used(self) -> Sequence[nn.Module]:
        """The modules between the stages, and the head."""
        return [*self._projections, self._parts[1]]

    @contextmanager
    def passing(self, first: int, x: Tensor | None, last: int) -> Iterator[list[Tensor]]:
        """Some of the chains' steps."""
        left: list[Tensor] = []

        def run(stack: Stack, chain: ResidualChain, state: Tensor) -> Tensor:
            for n in range(stack.first, stack.first + stack.horizon):
                if n == first and x is not None:
                    state = x
                if n == last:
                    left.append(state)
                if first <= n < last:
                    state = cast(Tensor, chain.run_step(n - stack.first, state))
            if last == self.horizon and stack.index == self.stages - 1:
                left.append(state)
            return state

        pairs = zip(self.stacks, self._chains, strict=True)
        with standing_in({chain: partial(run, stack, chain) for stack, chain in pairs}):
            yield left

    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Through the projection behind the stage."""
        y: Tensor = self._projections[stage](x)
        return y

    def _head_of(self, stage: int, x: Tensor, inputs: Inputs) -> Tensor:
        """The logits of states of any stage."""
        for m in range(stage, self.stages - 1):
            x = self.carry(m, x)
        return self.head(x)

    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """The classifier's head; of a chain the state itself."""
        logits: Tensor = self._parts[1](x)
        return logits

    def with_stacks(self, stacks: Sequence[Stack], neurons: int | None = None) -> nn.Module:
        """The chain over other blocks, with another step."""
        return chain_with(self.model, stacks[0])

    def leave_out(self, removed: set[int]) -> nn.Module:
        """The same with shorter chains."""
        smaller: nn.Module = self.model.without(removed)
        return copy.deepcopy(smaller)


class HeldChains(ChainAnatomy):
    """Chains among other layers of a model, which are run as the model's own forward runs them."""

    def __init__(self, model: nn.Module, example: Any = None):
        super().__init__(model)
        self._around = ReadModel(model, example, [chain for _, chain in chains_in(model)])
        self.example = self._around.example  # type: ignore[method-assign]
        self.carry, self.head = self._around.carry, self._around.head  # type: ignore[method-assign]
        self._head_of = self._around.head_of  # type: ignore[method-assign]

    def run(self, x: Any) -> Tensor:
        """The logits of the model's own forward."""
        return call(self.model, x)

    @property
    def _chains(self) -> list[Any]:
        return list(self._around.blocks)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The chains, in the order of their calls."""
        return stacks_of(self._chains)

    @property
    def stem_and_head(self) -> None:
        """They are no modules."""
        return None

    @property
    def _used(self) -> Sequence[nn.Module]:
        return [self.model]

    def like(self, model: nn.Module) -> Anatomy:
        """Another model, read on the same example."""
        return type(self)(model, self.example())

    def states(self, x: Any) -> tuple[list[Tensor], Tensor]:
        """As of any model."""
        self._around.try_kind(x)
        return super().states(x)

    def logits(
        self,
        states: Sequence[Tensor],
        first: int | Sequence[int] = 0,
        statistics: RunningStatistics | None = None,
        x: Any = None,
    ) -> Tensor:
        """As of any model; an InputError where the head reads the inputs too and x is None."""
        return self._around.logits(states, self._stages_of(first, len(states)), statistics, x)

    def with_stacks(self, stacks: Sequence[Stack], neurons: int | None = None) -> nn.Module:
        """The model with chains over other blocks."""
        return self._with(map(chain_with, self._chains, stacks))

    def leave_out(self, removed: set[int]) -> nn.Module:
        """The same with shorter chains."""
        return self._with(
            copy.deepcopy(chain.without(n - stack.first for n in removed if n in stack.layers))
            for chain, stack in zip(self._chains, self.stacks, strict=True)
        )

    def _with(self, chains: Iterable[nn.Module]) -> nn.Module:
        memo = {id(old): new for old, new in zip(self._chains, chains, strict=True)}
        other: nn.Module = copy.deepcopy(self.model, memo)
        return other


def _shifted(hook: StateHook, first: int, end: int | None) -> StateHook:
    def shifted(n: int, x: Tensor) -> None:
        if n != end:
            hook(first + n, x)

    return shifted
