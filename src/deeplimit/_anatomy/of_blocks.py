"""Models of blocks that are known: modules, or chains, each step of which is a layer."""

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.anatomy import Anatomy, Layer, RunningCost, StateHook
from deeplimit._anatomy.chain import ResidualChain, Stack, stacks_of
from deeplimit._anatomy.evaluation import Inputs, RunningStatistics
from deeplimit._anatomy.injection import passing
from deeplimit._anatomy.stacks import Block
from deeplimit._anatomy.stand_ins import (
    BlockCost,
    ReplayedBlock,
    collected,
    standing_in,
    state_among,
    state_of,
)


class OfBlocks(Anatomy):
    """A model whose layers are its `_blocks`, or the steps of these where they are chains."""

    @property
    @abstractmethod
    def _blocks(self) -> Sequence[Block]: ...

    @property
    def _chains(self) -> list[ResidualChain]:
        """The blocks, where they are chains."""
        modules = [block.module for block in self._blocks]
        chains = [module for module in modules if isinstance(module, ResidualChain)]
        return chains if len(chains) == len(modules) else []

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The chains in order, whatever else holds some; else the blocks of each stage."""
        return stacks_of(self._chains) or self._runs()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All residual blocks in order."""
        return super().blocks if self._chains else tuple(block.module for block in self._blocks)

    @property
    def stages(self) -> int:
        """One for each chain, or run of blocks between which nothing stands and the shape stays."""
        last = self._blocks[-1]
        return last.stage + 1 + (last.shortcut is not None)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """A layer is a block; one that changes the shape takes a state of the stage before."""
        if self._chains:
            return tuple(
                Layer(s.index, s.blocks[n : n + s.scheme.nodes])
                for s in self.stacks
                for n in range(s.horizon)
            )
        return tuple(
            Layer(b.stage, (b.module,), removable=b.shortcut is None) for b in self._blocks
        )

    @property
    def _end(self) -> nn.Module:
        """The module that returns the last state."""
        return self._blocks[-1].module

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The inputs of the blocks, and what comes out at the end.

        Of chains their state hooks, counted through; the end of one is the start of the next.
        """
        if chains := self._chains:

            def shows(stack: Stack, n: int, x: Tensor) -> None:
                if n != stack.horizon or stack.index == len(chains) - 1:
                    hook(stack.first + n, x)

            every = zip(self.stacks, chains, strict=True)
            return [chain.register_state_hook(partial(shows, stack)) for stack, chain in every]
        numbers: dict[nn.Module, list[int]] = {}
        for n, block in enumerate(self.blocks):
            numbers.setdefault(block, []).append(n)
        calls: Counter[nn.Module] = Counter()

        def enters(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own = numbers[block]
            n = own[calls[block] % len(own)]
            calls[block] += 1
            hook(n, cast(Tensor, state_among(args, kwargs)))

        def leaves(end: nn.Module, _: tuple[Any, ...], y: Any) -> None:
            if calls[end] % len(numbers.get(end, [0])) == 0:
                hook(len(self._blocks), cast(Tensor, state_of(y)))

        handles = [
            b.register_forward_pre_hook(enters, with_kwargs=True, prepend=True) for b in numbers
        ]  # before those that change what enters, which are part of the block
        return [*handles, self._end.register_forward_hook(leaves)]

    def register_leaving_hook(self, n: int, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Of a chain its next state."""
        if not self._chains:
            return super().register_leaving_hook(n, hook)
        stack = next(stack for stack in self.stacks if n in stack.layers)

        def leaves(i: int, x: Tensor) -> None:
            if stack.first + i == n + 1:
                hook(x)

        return self._chains[stack.index].register_state_hook(leaves)

    def past(self, n: int) -> Callable[[Tensor], Tensor]:
        """The shortcut of a block that changes the shape, else the state itself."""
        shortcut = None if self._chains else self._blocks[n].shortcut
        return shortcut or super().past(n)

    @contextmanager
    def passing(self, first: int, x: Tensor | None, last: int) -> Iterator[list[Tensor]]:
        """Some of the blocks, the others bypassed; or of the chains' steps."""
        if not self._chains:
            with passing(self._blocks, first, x, last) as left:
                yield left
            return
        left = []

        def run(stack: Stack, chain: ResidualChain, state: Tensor) -> Tensor:
            for n in stack.layers:
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

    @property
    def replayed(self) -> bool:
        """True where some block is, or the steps of some chain are."""
        if chains := self._chains:
            return any(chain.replayed for chain in chains)
        return any(isinstance(vars(block).get("forward"), ReplayedBlock) for block in self.blocks)

    @property
    def _used(self) -> Sequence[nn.Module]:
        """What states of any stage meet on their way to the logits."""
        return [self.model]

    @contextmanager
    def collect_stage_costs(
        self, costs: Mapping[int, RunningCost], x: Inputs
    ) -> Iterator[list[Tensor]]:
        """The running costs, together once the model has run.

        Those of blocks that are not replayed are computed as the state leaves them.
        """
        statistics = RunningStatistics(m for part in self._used for m in part.modules())

        def charge(n: int, stage: int, state: Tensor, left: Tensor) -> Tensor:
            return costs[n](lambda s: self.through({stage: [s]}, x, statistics), state, left)

        every: list[Tensor] = []
        with ExitStack() as exits:
            paid = []
            for stack, chain in zip(self.stacks, self._chains, strict=False):
                steps = {n: partial(charge, n, stack.index) for n in stack.layers if n in costs}
                own = {n - stack.first: cost for n, cost in steps.items()}
                paid.append(exits.enter_context(chain.collect_stage_costs(own)))
            calls: dict[nn.Module, list[BlockCost | None]] = {}
            for n, b in enumerate(() if paid else self._blocks):
                cost = partial(charge, n, b.stage) if n in costs else None
                calls.setdefault(b.module, []).append(cost)
            paid += [exits.enter_context(collected(m, own)) for m, own in calls.items() if any(own)]
            yield every
            every += [c for own in paid for c in own]

    def with_stacks(self, stacks: Sequence[Stack], neurons: int | None = None) -> nn.Module:
        """The model with chains over other blocks."""
        if not self._chains:
            return super().with_stacks(stacks, neurons)
        others = []
        for chain, stack in zip(self._chains, stacks, strict=True):
            other = copy.deepcopy(chain, dict.fromkeys(map(id, chain)))  # but its blocks
            other._modules.clear()
            other.extend(stack.blocks)
            other.step = stack.step
            others.append(other)
        return self._with(others)

    def leave_out(self, removed: set[int]) -> nn.Module:
        """The same with shorter chains."""
        pairs = zip(self.stacks, self._chains, strict=True)
        return self._with(
            copy.deepcopy(chain.without(n - stack.first for n in removed if n in stack.layers))
            for stack, chain in pairs
        )

    def _with(self, chains: Iterable[nn.Module]) -> nn.Module:
        memo = {id(old): new for old, new in zip(self._chains, chains, strict=True)}
        other: nn.Module = copy.deepcopy(self.model, memo)
        return other


class ChainAnatomy(OfBlocks):
    """Stages are chains; of a bare `ResidualChain` one, whose state is the logits (width C)."""

    model: Any

    @property
    def _blocks(self) -> Sequence[Block]:
        return [Block(self.model, self.model, 0, lambda x: x)]

    @property
    def stem_and_head(self) -> tuple[nn.Module, nn.Module]:
        """Of a chain neither does anything."""
        return nn.Identity(), nn.Identity()

    @property
    def _projections(self) -> Sequence[nn.Module]:
        """The modules that alone stand between two stages."""
        return ()

    @property
    def _used(self) -> Sequence[nn.Module]:
        return [*self._projections, self.stem_and_head[1]]

    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Through the projection behind the stage."""
        y: Tensor = self._projections[stage](x)
        return y

    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """The classifier's head; of a chain the state itself."""
        logits: Tensor = self.stem_and_head[1](x)
        return logits

    def leave_out(self, removed: set[int]) -> nn.Module:
        """The same with shorter chains."""
        smaller: nn.Module = copy.deepcopy(self.model.without(removed))
        return smaller
