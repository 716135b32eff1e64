"""Any model with a stack of blocks, read through its own forward: bypass and inject."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.anatomy import Anatomy, Layer, RunningCost, StateHook
from deeplimit._anatomy.checks import layer_numbers
from deeplimit._anatomy.evaluation import Inputs, RunningStatistics
from deeplimit._anatomy.injection import by_stage, injected, passing
from deeplimit._anatomy.inputs import FAILS, call, first_sample, kind_of, one_token
from deeplimit._anatomy.other_depths import check_kept, with_times
from deeplimit._anatomy.probing import SAMPLES, HeadTrial, alike, check_answer, watched
from deeplimit._anatomy.rebuilding import check_rebuilt
from deeplimit._anatomy.stacks import Block, beside, find_blocks
from deeplimit._anatomy.stand_ins import (
    BlockCost,
    ReplayedBlock,
    collected,
    state_among,
    state_of,
)
from deeplimit.errors import InputError

READ_AS = "_deeplimit_read_as"  # on a model: the example and the blocks that were given for it


class OfBlocks(Anatomy):
    """A model whose layers are modules: `_blocks`, in order."""

    @property
    @abstractmethod
    def _blocks(self) -> Sequence[Block]: ...

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All residual blocks in order."""
        return tuple(block.module for block in self._blocks)

    @property
    def stages(self) -> int:
        """One for each run of blocks between which nothing stands and the shape stays."""
        last = self._blocks[-1]
        return last.stage + 1 + (last.shortcut is not None)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """A layer is a block; one that changes the shape takes a state of the stage before."""
        return tuple(
            Layer(b.stage, (b.module,), removable=b.shortcut is None) for b in self._blocks
        )

    @property
    def _end(self) -> nn.Module:
        """The module that returns the last state."""
        return self._blocks[-1].module

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The inputs of the blocks, and what comes out at the end."""
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

        handles = [b.register_forward_pre_hook(enters, with_kwargs=True) for b in numbers]
        return [*handles, self._end.register_forward_hook(leaves)]

    def past(self, n: int) -> Callable[[Tensor], Tensor]:
        """The shortcut of a block that changes the shape, else the state itself."""
        return self._blocks[n].shortcut or super().past(n)

    def passing(
        self, first: int, x: Tensor | None, last: int
    ) -> AbstractContextManager[list[Tensor]]:
        """Some of the blocks; the others are bypassed."""
        return passing(self._blocks, first, x, last)


class ReadModel(OfBlocks):
    """A model whose layers are modules in lists; nothing about its class is known.

    Its forward is run on an example, to see which modules in lists take and return states of one
    shape: the blocks. Then it is run with every block *bypassed*, so that it returns its input,
    but for the last, which answers with states that are *injected*: what comes out are their
    logits, whatever norm, pooling, projection or head follows. The states injected are the last
    ones, for which these must be the model's own logits. What stands between two stages, such as a
    downsampling, is the model's own; where a block itself changes the shape its shortcut carries
    the state, if it is known.

    Where the head reads nothing but states, it is run on states of many layers at once; where it
    reads each token by itself, on any of them; where it reads the inputs too, such as a mask or a
    decoder's text, it is run with the batch that the states are of, layer by layer. This is tried
    in the second run: other inputs are further samples of it.

    Args:
        model: any module.
        example: a batch of its inputs, a tensor, tensors by name, or a tuple; by default made.
        blocks: the name of the list whose blocks are meant, a pattern such as "layers.*.blocks",
            or the blocks.

    Raises:
        InputError: it has no stack of blocks, does not run on the example, or the logits of its
            last state differ from the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        blocks: str | Iterable[nn.Module] | None = None,
    ):
        super().__init__(model)
        watch, self._example, own = watched(model, example)
        self._found, calls, self.name, self.others = find_blocks(model, watch, blocks)
        self._idle = [one for one in beside(self._blocks) if one not in watch.seen]
        last = cast(Tensor, calls[-1].left)
        self._check_unwritten(
            [*(cast(Tensor, one.entered) for one in calls), last],
            [*(one.versions[0] for one in calls), calls[-1].versions[1]],
        )
        self._of_tokens = last.dim() == 3
        self.tokens = self._free = False
        self._kinds: set[Any] = {kind_of(self._example)}
        self._refusals: dict[frozenset[int], str | None] = {}
        if not own.is_meta:
            self._try_head(self._example, last, own)
            self._check_between()

    @property
    def _blocks(self) -> list[Block]:
        return self._found

    def _try_head(self, x: Any, last: Tensor, own: Tensor) -> None:
        check_answer(self.model, own)
        with alike(self.model):
            head = HeadTrial(
                self.model, lambda s, x: self._injected({self.stages - 1: s}, x), x, last, own
            )
            self.tokens = self.stages == 1 and self._of_tokens and head.reads_tokens()
            self._free = self.tokens or head.reads_states()
            if not self._free:
                head.check(self.name)

    def _check_between(self) -> None:
        """Raises InputError where what stands between blocks tells a bypass from a cut."""
        if not any(a.container is b.container and a.apart for a, b in pairwise(self._blocks)):
            return
        try:
            self._tried({n for n, b in enumerate(self._blocks) if n and b.shortcut is None})
        except InputError as error:
            raise InputError(
                f"{type(self.model).__name__} cannot be read: something stands between its "
                f"blocks, which stays where they are bypassed and goes where they are cut "
                f"({error})"
            ) from error

    def like(self, model: nn.Module) -> "ReadModel":
        """Another model of this kind, read on the same example."""
        return ReadModel(model, self._example, self.name)

    def run(self, x: Any) -> Tensor:
        """The logits of the model's own forward."""
        return call(self.model, x)

    def example(self) -> Any:
        """The batch on which the model was read."""
        return self._example

    def control(self, n: int) -> list[nn.Parameter]:
        """All parameters of a layer of tokens, whose attention and MLP each add to the state.

        Of another layer those from its last norm on, where it has one.
        """
        return list(self.blocks[n].parameters()) if self._of_tokens else super().control(n)

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """As of any blocks; an InputError where one runs that did not on the example."""

        def wakes(_: nn.Module, __: tuple[Any, ...]) -> None:
            raise InputError(self._apart_from_example("one more than in its example runs"))

        idle = [module.register_forward_pre_hook(wakes) for module in self._idle]
        return [*super().register_state_hook(hook), *idle]

    def _apart_from_example(self, what: str) -> str:
        return (
            f"{type(self.model).__name__} has {self.horizon} blocks, and {what} in this forward: "
            "its blocks are not called once each (LayerDrop, an early exit, a condition); states "
            "can be read where every block runs"
        )

    def try_kind(self, x: Any) -> None:
        """Tries the head on inputs of a kind that it was not tried on."""
        if kind_of(x) in self._kinds:
            return
        self._kinds.add(kind_of(x))
        part = first_sample(x, SAMPLES)
        with alike(self.model):
            try:
                states, logits = self.states(part)
            except FAILS:  # it runs on the whole batch alone
                part, (states, logits) = x, self.states(x)
        self._try_head(part, states[-1], logits)

    def states(self, x: Any) -> tuple[list[Tensor], Tensor]:
        """As of any model; an InputError where a block is not called, or more than once."""
        self.try_kind(x)
        states, logits = super().states(x)
        if len(states) != self.horizon + 1:
            raise InputError(self._apart_from_example(f"{len(states)} states were seen"))
        return states, logits

    def logits(
        self,
        states: Sequence[Tensor],
        first: int | Sequence[int] = 0,
        statistics: RunningStatistics | None = None,
        x: Any = None,
    ) -> Tensor:
        """As of any model; an InputError where the head reads the inputs too and x is None."""
        if not states:
            raise InputError("no states given; expected at least one")
        stages = self._stages_of(first, len(states))
        if self.tokens:
            return self.head_of(0, torch.stack(list(states)), x, statistics)
        if self._free:
            z = self._together(by_stage(states, stages), x, statistics)
            if z is not None:
                return z.reshape(len(states), -1, *z.shape[1:])
        each = zip(states, stages, strict=True)
        return torch.stack([self._injected({m: s}, self._driver(x), statistics) for s, m in each])

    def head(self, x: Tensor, inputs: Any = None) -> Tensor:
        """The logits of states of the last stage; [T, C] of tokens [T, d] (`tokens`)."""
        return self.head_of(self.stages - 1, x, inputs)

    def head_of(
        self, stage: int, x: Tensor, inputs: Any, statistics: RunningStatistics | None = None
    ) -> Tensor:
        """The logits of states of any stage, or of single tokens."""
        if self.tokens:
            driver = one_token(self._example if inputs is None else inputs)
            z = self._injected({stage: x.flatten(0, -2)[:, None]}, driver, statistics)
            return z[:, 0].reshape(*x.shape[:-1], *z.shape[2:])
        return self._alone(stage, x, inputs, statistics)

    def _alone(
        self,
        stage: int,
        x: Tensor,
        inputs: Any,
        statistics: RunningStatistics | None = None,
        read: int | None = None,
    ) -> Tensor:
        z = self._together({stage: x}, inputs, statistics, read) if self._free else None
        if z is not None:
            return z
        return self._injected({stage: x}, self._driver(inputs), statistics, read)

    def _together(
        self,
        at: Mapping[int, Tensor],
        x: Any,
        statistics: RunningStatistics | None,
        read: int | None = None,
    ) -> Tensor | None:
        """The logits of states of many layers on one sample's run; None where that does not do."""
        try:
            z = self._injected(at, self._driver(x), statistics, read)
            if len(z) == sum(map(len, at.values())):
                return z
        except FAILS:
            if x is None:
                raise
        self._free = False  # the head asks the inputs how many samples there are
        return None

    def carry(self, stage: int, x: Tensor, inputs: Any = None) -> Tensor:
        """Past what stands between two stages: the shortcut of a block, or the model's own."""
        last = next(b for b in reversed(self._blocks) if b.stage == stage)
        if last.shortcut is not None:
            return last.shortcut(x)
        return self._alone(stage, x, inputs, read=stage + 1)

    def _driver(self, x: Any) -> Any:
        """The inputs that the model is run with while states are injected."""
        if self._free:
            return first_sample(self._example if x is None else x)
        if x is None:
            raise InputError(
                f"the head of {type(self.model).__name__} reads the inputs too; give them with "
                "the states: logits(states, x=inputs)"
            )
        return x

    @property
    def replayed(self) -> bool:
        """True where some block is."""
        return any(isinstance(vars(block).get("forward"), ReplayedBlock) for block in self.blocks)

    @contextmanager
    def collect_stage_costs(
        self, costs: Mapping[int, RunningCost], x: Inputs
    ) -> Iterator[list[Tensor]]:
        """The blocks' running costs, together once the model has run.

        Those of blocks that are not replayed are computed as the state leaves them.
        """
        statistics = RunningStatistics(self.model.modules())

        def charge(n: int, stage: int, state: Tensor, left: Tensor) -> Tensor:
            return costs[n](lambda s: self.head_of(stage, s, x, statistics), state, left)

        calls: dict[nn.Module, list[BlockCost | None]] = {}
        for n, b in enumerate(self._blocks):
            own = partial(charge, n, b.stage) if n in costs else None
            calls.setdefault(b.module, []).append(own)
        every: list[Tensor] = []
        with ExitStack() as stack:
            paid = [stack.enter_context(collected(m, own)) for m, own in calls.items() if any(own)]
            yield every
            every += [c for own in paid for c in own]

    def _injected(
        self,
        at: Mapping[int, Tensor],
        x: Any,
        statistics: RunningStatistics | None = None,
        read: int | None = None,
    ) -> Tensor:
        return injected(self.model, self._blocks, partial(self.run, x), at, statistics, read)

    def _tried(self, gone: Collection[int], *, shared: bool = True) -> nn.Module:
        """A copy with shorter lists; an InputError where the blocks kept do something else."""
        times = [n not in gone for n in range(self.horizon)]
        smaller = with_times(self.model, self._blocks, times, shared=shared)
        check_kept(self, self._blocks, smaller, gone)
        return smaller

    def leave_out(self, removed: set[int]) -> nn.Module:
        """A copy with shorter lists, to be read by the same ones."""
        return self._remembered(self._tried(removed, shared=False))

    def repeated(self, times: Sequence[int]) -> nn.Module:
        """A copy with other lists; a block repeated shares nothing but what it shared before."""
        return self._remembered(with_times(self.model, self._blocks, times))

    def _remembered(self, other: nn.Module) -> nn.Module:
        if self.name is not None:
            example, _ = vars(self.model).get(READ_AS, (None, None))
            vars(other)[READ_AS] = example, self.name
        return other

    def check_removable(self, removed: Iterable[SupportsIndex]) -> None:
        """As of any model; together too, and of no model that is quantised."""
        gone = layer_numbers(removed)
        super().check_removable(gone)
        name = type(self.model).__name__
        if gone and getattr(self.model, "is_quantized", False):
            raise InputError(
                f"{name} is quantised; cut the model it was made from, then quantise the result"
            )
        lists: dict[nn.Module, list[int]] = {}
        for n, block in enumerate(self._blocks):
            lists.setdefault(block.container, []).append(n)
        emptied = [
            own
            for one, own in lists.items()
            if gone.issuperset(own) and len(own) == len(list(one.children()))
        ]
        every = list(range(self.horizon))
        for own in [every, *emptied]:
            if gone.issuperset(own) and (own == every or self._refusal(own)):
                raise InputError(
                    f"all layers {own[0]} … {own[-1]} to be removed; {name} keeps at least one of "
                    "them"
                )
        tail = gone == set(every[self.horizon - len(gone) :])
        if (emptied or not tail) and (why := self._refusal(gone)):
            raise InputError(why)

    def _refusal(self, removed: Iterable[int]) -> str | None:
        """Why these layers cannot be removed, tried on a copy that shares the parameters."""
        gone = frozenset(removed)
        if gone not in self._refusals:
            self._refusals[gone] = None
            try:
                check_rebuilt(self, self._tried(gone))
            except InputError as error:
                self._refusals[gone] = str(error)
        return self._refusals[gone]
