"""Models of blocks that are known: modules, or chains, each step of which is a layer."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import count, cycle
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.anatomy import Anatomy, Layer, RunningCost, StateHook
from deeplimit._anatomy.chain import ChainStep, ResidualChain, Stack
from deeplimit._anatomy.evaluation import Inputs, RunningStatistics, concatenated
from deeplimit._anatomy.injection import injected, passing
from deeplimit._anatomy.inputs import FAILS, first_sample, joined, one_token, placed
from deeplimit._anatomy.stacks import Block, itself
from deeplimit._anatomy.stand_ins import (
    BlockCost,
    ReplayedBlock,
    collected,
    state_among,
    state_of,
)
from deeplimit.errors import InputError


class OfBlocks(Anatomy):
    """A model whose layers are its `_blocks`, or the steps of these where they are chains.

    States have the logits that its own forward gives them, put in at the end of their stage while
    all blocks are bypassed. Where the head reads nothing but states (`_free`), it is run on states
    of many layers at once, beside one sample; else layer by layer, beside the batch they are of.
    """

    _free = True

    @property
    @abstractmethod
    def _blocks(self) -> Sequence[Block]: ...

    @cached_property
    def _chains(self) -> list[ResidualChain]:
        """The blocks, where they are chains."""
        modules = [block.module for block in self._blocks]
        chains = [module for module in modules if isinstance(module, ResidualChain)]
        return chains if len(chains) == len(modules) else []

    @cached_property
    def _each(self) -> Sequence[Block]:
        """What is a layer each: the blocks, or the steps of the chains."""
        if not self._chains:
            return self._blocks
        every = enumerate(self._chains)
        return [Block(step, chain, m, itself) for m, chain in every for step in chain.steps]

    @property
    def _called(self) -> Sequence[nn.Module]:
        return [block.module for block in self._each]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All residual blocks in order."""
        return super().blocks if self._chains else tuple(self._called)

    @property
    def stages(self) -> int:
        """One for each chain, or run of blocks between which nothing stands and the shape stays."""
        last = self._blocks[-1]
        return last.stage + 1 + (last.shortcut is not None)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """A layer is a block; one that changes the shape takes a state of the stage before."""
        every = [(b, b.module) for b in self._each]
        return tuple(
            Layer(b.stage, m.controls if isinstance(m, ChainStep) else (m,), b.shortcut is None)
            for b, m in every
        )

    @property
    def _end(self) -> nn.Module:
        """The module that returns the last state."""
        return self._blocks[-1].module

    def _register_end_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls hook(x_N)."""
        calls, end = count(1), self._end
        each = max(sum(block.module is end for block in self._blocks), 1)

        def leaves(_: nn.Module, __: tuple[Any, ...], y: Any) -> None:
            if next(calls) % each == 0:
                hook(cast(Tensor, state_of(y)))

        return end.register_forward_hook(leaves)

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The inputs of the blocks or steps, and what comes out at the end."""
        numbers: dict[nn.Module, list[int]] = {}
        for n, module in enumerate(self._called):
            numbers.setdefault(module, []).append(n)

        def enters(
            turns: Iterator[int], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            hook(next(turns), cast(Tensor, state_among(args, kwargs)))

        handles = [  # before those that change what enters, which are part of the block
            module.register_forward_pre_hook(
                partial(enters, cycle(own)), with_kwargs=True, prepend=True
            )
            for module, own in numbers.items()
        ]
        return [*handles, self._register_end_hook(partial(hook, len(self._called)))]

    def through(
        self,
        at: Mapping[int, Sequence[Tensor]],
        x: Any = None,
        statistics: RunningStatistics | None = None,
        read: int | None = None,
    ) -> Tensor:
        """As of any model; an InputError where the head reads the inputs too and x is None.

        With `read` the states of this stage in place of their logits.
        """
        if self.tokens:
            ((stage, states),) = at.items()
            s = concatenated(states)
            each = s.flatten(0, -2)[:, None]
            if not (tokens := len(each)):  # a model runs on one row at least
                each = torch.cat([each, each.new_zeros(1, *each.shape[1:])])
            # As tried: a row of inputs to each, by whose size some models view the last state.
            driver = joined([one_token(self._given(x))], len(each))
            z = self._injected({stage: each}, driver, statistics)
            return z[:tokens, 0].reshape(*s.shape[:-1], *z.shape[2:])
        if self._free:
            every = {stage: concatenated(states) for stage, states in at.items()}
            try:
                z = self._injected(every, self._driver(x), statistics, read)
                if len(z) == sum(map(len, every.values())):
                    return z
            except FAILS:
                if x is None:
                    raise
            self._free = False  # the head asks the inputs how many samples there are
        alone = [{stage: s} for stage, states in at.items() for s in states]
        return concatenated(
            [self._injected(one, self._driver(x), statistics, read) for one in alone]
        )

    def head(self, x: Tensor, inputs: Any = None) -> Tensor:
        """The logits of states of the last stage; [T, C] of tokens [T, d] (`tokens`)."""
        return self.through({self.stages - 1: [x]}, inputs)

    def carry(self, stage: int, x: Tensor, inputs: Any = None) -> Tensor:
        """Past what stands between two stages: the shortcut of a block, or the model's own."""
        last = next(b for b in reversed(self._blocks) if b.stage == stage)
        if last.shortcut is not None:
            return last.shortcut(x)
        return self.through({stage: [x]}, inputs, read=stage + 1)

    def _given(self, x: Any) -> Any:
        return placed(self.model, self.example()) if x is None else x

    def _driver(self, x: Any) -> Any:
        """The inputs that the model is run with while states are injected."""
        if self._free:
            return first_sample(self._given(x))
        if x is None:
            raise InputError(
                f"the head of {type(self.model).__name__} reads the inputs too; give them with "
                "the states: logits(states, x=inputs)"
            )
        return x

    def _injected(
        self,
        at: Mapping[int, Tensor],
        x: Any,
        statistics: RunningStatistics | None = None,
        read: int | None = None,
    ) -> Tensor:
        return injected(self.model, self._blocks, partial(self.run, x), at, statistics, read)

    def past(self, n: int) -> Callable[[Tensor], Tensor]:
        """The shortcut of a block that changes the shape, else the state itself."""
        return self._each[n].shortcut or super().past(n)

    @contextmanager
    def passing(self, first: int, x: Tensor | None, last: int) -> Iterator[list[Tensor]]:
        """Some of the blocks or steps, the others bypassed."""
        with passing(self._each, first, x, last) as left, ExitStack() as stack:
            if last == self.horizon:
                stack.callback(self._register_end_hook(left.append).remove)
            yield left

    @property
    def replayed(self) -> bool:
        """True where some block or step is."""
        return any(isinstance(vars(m).get("forward"), ReplayedBlock) for m in self._called)

    @contextmanager
    def collect_stage_costs(
        self, costs: Mapping[int, RunningCost], x: Inputs
    ) -> Iterator[list[Tensor]]:
        """The running costs, together once the model has run.

        Those of blocks that are not replayed are computed as the state leaves them.
        """
        statistics = RunningStatistics(self.model.modules())

        def charge(n: int, stage: int, state: Tensor, left: Tensor) -> Tensor:
            return costs[n](lambda s: self.through({stage: [s]}, x, statistics), state, left)

        calls: dict[nn.Module, list[BlockCost | None]] = {}
        for n, b in enumerate(self._each):
            cost = partial(charge, n, b.stage) if n in costs else None
            calls.setdefault(b.module, []).append(cost)
        every: list[Tensor] = []
        with ExitStack() as exits:
            charged = [(m, own) for m, own in calls.items() if any(own)]
            paid = [exits.enter_context(collected(m, own)) for m, own in charged]
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

    def _with(self, chains: Iterable[ResidualChain]) -> nn.Module:
        memo = {id(old): new for old, new in zip(self._chains, chains, strict=True)}
        other: nn.Module = copy.deepcopy(self.model, memo)
        return other


class ChainAnatomy(OfBlocks):
    """A bare `ResidualChain`, whose state is the logits."""

    @property
    def _blocks(self) -> Sequence[Block]:
        return [Block(self.model, self.model, 0, itself)]

    @property
    def stem_and_head(self) -> tuple[nn.Module, nn.Module]:
        """Of a chain neither does anything."""
        return nn.Identity(), nn.Identity()

    def _driver(self, x: Any) -> Any:
        return torch.zeros(1) if x is None else x  # a chain that is bypassed looks at neither
