"""Any model with a stack of blocks, read through its own forward: bypass and inject."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, SupportsIndex, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit.errors import InputError
from deeplimit.network.anatomy.anatomy import Anatomy, Layer, RunningCost, StateHook, layer_numbers
from deeplimit.network.anatomy.calling import batch_of, call, examples, mapped, placed
from deeplimit.network.anatomy.config_depth import set_depths
from deeplimit.network.anatomy.lists import relisted
from deeplimit.network.anatomy.rebuilding import check_rebuilt
from deeplimit.network.anatomy.shortcuts import ends_of
from deeplimit.network.anatomy.stacks import Block, Watch, find_blocks
from deeplimit.network.anatomy.stand_ins import standing_in, state_among, state_of
from deeplimit.network.modes import Inputs, RunningStatistics, evaluating

# Of the logits' rounding, what the same head may make of the same state in another call. Sums in
# half precision are rounded once, at their end.
SLACK, HALF_SLACK = 100, 4
FAILS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError)


@runtime_checkable
class ReplayedBlock(Protocol):
    """What may stand in a block's attributes for its forward: it replays it in the backward pass.

    Attributes:
        running_cost: where one is put here, each run with gradients charges it for the block's
            input, inside the replay.
        paid: what was charged.
    """

    running_cost: Callable[[Tensor], Tensor] | None
    paid: list[Tensor]


class ReadModel(Anatomy):
    """A model whose layers are modules in lists; nothing about its class is known.

    Its forward is run twice on an example. Once to see which modules in lists take and return
    states of one shape: the blocks. Then with every block *bypassed*, so that it returns its input,
    but for the last, which answers with states that are *injected*: what comes out are their
    logits, whatever norm, pooling, projection or head follows. The states injected are the last
    ones, for which these must be the model's own logits. What stands between two stages, such as a
    downsampling, is the model's own; where a block itself changes the shape its shortcut carries
    the state, if it is known.

    Where the head reads nothing but states, it is run on states of many layers at once; where it
    reads each token by itself, on any of them; where it reads the inputs too, such as a mask or a
    decoder's text, it is run with the batch that the states are of, layer by layer. Which of these
    it is, is tried out on the example, against inputs that are others.

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
        blocks: str | Sequence[nn.Module] | None = None,
    ):
        super().__init__(model)
        self._asked = blocks
        watch, self._example, own = self._watched(example)
        self._blocks, self.found = find_blocks(model, watch.seen, blocks)
        self._ends = {b.stage: b.module for b in self._blocks}
        state = watch.seen[self._blocks[-1].module].left
        self._of_tokens = state is not None and state.dim() == 3
        self.tokens = self._free = False
        self._kinds: set[Any] = set()
        self._refusals: dict[frozenset[int], str | None] = {}
        if not own.is_meta:
            self._probe(self._example)

    def _watched(self, example: Any) -> tuple[Watch, Any, Tensor]:
        """What was seen in a run on the example, which is made where none was given."""
        name, reason = type(self.model).__name__, "none could be made"
        for given in examples(self.model) if example is None else [example]:
            x, watch = placed(self.model, given), Watch(self.model)
            try:
                with self._alike():
                    return watch, x, watch.run(partial(self.run, x))
            except FAILS as error:
                reason = _told(error)
        what = "the example" if example is not None else "an example made for it"
        raise InputError(
            f"{name} does not run on {what} ({reason}); give a batch of its inputs: "
            "anatomy(model, example=…), and that in place of the model"
        )

    @contextmanager
    def _alike(self) -> Iterator[None]:
        """Evaluation mode without gradients, and one random state for every run."""
        with torch.random.fork_rng(_devices(self.model)), evaluating(self.model), torch.no_grad():
            torch.manual_seed(0)
            yield

    def _probe(self, x: Any) -> None:
        """What the head reads besides states, on inputs x; that the last one has its logits.

        Raises:
            InputError: it has not.
        """
        self._kinds.add(_kind(x))
        with self._alike():
            states, own = self.states(x)
            stages, batch, other = self.state_stages, len(states[-1]), mapped(x, _otherwise)
            by_stage = _by_stage(states, stages)
            if self.stages == 1 and self._of_tokens and own.shape[:-1] == states[-1].shape[:-1]:
                every = torch.stack(states).flatten(0, 2)[:, None]
                z = self._tried({0: every}, _one(other))
                if _close(None if z is None else z[-batch * own.shape[1] :, 0], own.flatten(0, 1)):
                    self.tokens = self._free = True
                    return
            self.tokens = False
            z = self._tried(by_stage, _first(other))
            self._free = z is not None and len(z) == len(states) * batch and _close(z[-batch:], own)
            if self._free:
                return
            z = self._tried({stages[-1]: states[-1]}, x)
        if not _close(z, own):
            raise InputError(
                f"{type(self.model).__name__} cannot be read: {self._apart(z, own)}, so that "
                "something but the last block's state decides them; the blocks read are those of "
                f"{', '.join(self.found)}"
            )

    _why = ""

    def _tried(self, at: dict[int, Tensor], x: Any) -> Tensor | None:
        try:
            return self._injected(at, x)
        except (InputError, *FAILS) as error:
            self._why = _told(error)
            return None

    def _apart(self, z: Tensor | None, own: Tensor) -> str:
        if z is None:
            return f"with its blocks bypassed it does not run ({self._why})"
        how = f"in shape, {list(z.shape)} and {list(own.shape)}"
        if z.shape == own.shape:
            how = f"by {float((z.float() - own.float()).abs().max()):.2g}"
        return f"with its blocks bypassed, the logits of its last state differ from its own {how}"

    def like(self, model: nn.Module) -> "ReadModel":
        """Another model of this kind, read on the same example."""
        asked = self._asked if isinstance(self._asked, str) else None
        return ReadModel(model, self._example, asked)

    def run(self, x: Inputs) -> Tensor:
        """The logits of the model's own forward."""
        return call(self.model, x)

    def example(self) -> Inputs | None:
        """The batch on which the model was read."""
        return cast(Inputs, self._example)

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
        """A layer is a block; one that changes the shape starts from a state of the stage before."""
        return tuple(
            Layer(b.stage, (b.module,), removable=b.shortcut is None) for b in self._blocks
        )

    def control(self, n: int) -> list[nn.Parameter]:
        """All parameters of a layer of tokens, whose attention and MLP each add to the state.

        Of another layer those from its last norm on, where it has one.
        """
        return list(self.blocks[n].parameters()) if self._of_tokens else super().control(n)

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """Those of the first row of the table `ENDS` that fits the block."""
        found = ends_of(block)
        if found is None:
            raise InputError(
                f"where the residual branches of {type(block).__name__} end is not known, so the "
                "step of its layers cannot be changed, nor the depth; tie and untie work"
            )
        return found

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The inputs of the blocks, and what comes out at the end."""

        def enters(n: int) -> Callable[..., None]:
            def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hook(n, cast(Tensor, state_among(args, kwargs)))

            return seen

        blocks = self.blocks
        handles = [
            block.register_forward_pre_hook(enters(n), with_kwargs=True)
            for n, block in enumerate(blocks)
        ]

        def leaves(_: nn.Module, __: tuple[Any, ...], y: Any) -> None:
            hook(len(blocks), cast(Tensor, state_of(y)))

        return [*handles, blocks[-1].register_forward_hook(leaves)]

    def states(self, x: Inputs) -> tuple[list[Tensor], Tensor]:
        """The states x_0 … x_N and the model's own logits for a batch of inputs.

        Raises:
            InputError: as for any model; a block was called more than once or not at all.
        """
        if _kind(x) not in self._kinds:
            self._probe(x)
        states, logits = super().states(x)
        if len(states) != self.horizon + 1:
            raise InputError(
                f"{type(self.model).__name__} has {self.horizon} blocks, and {len(states)} states "
                "were seen in this forward: its blocks are not called once each (LayerDrop, an "
                "early exit, a condition); states can be read where every block runs"
            )
        return states, logits

    def logits(
        self,
        states: Sequence[Tensor],
        first: int = 0,
        statistics: RunningStatistics | None = None,
        x: Inputs | None = None,
    ) -> Tensor:
        """The logits z_n [len(states), B, …] of the states first, first + 1, ….

        Raises:
            InputError: no states; the head reads the inputs too, and x is not given.
        """
        if not states:
            raise InputError("no states given; expected at least one")
        stages = self.state_stages[first : first + len(states)]
        if self.tokens:
            return self._head_of(0, torch.stack(list(states)), x, statistics)
        if not self._free:
            pairs = zip(states, stages, strict=True)
            return torch.stack([self._injected({m: s}, self._driver(x), statistics) for s, m in pairs])
        z = self._injected(_by_stage(states, stages), self._driver(x), statistics)
        return z.reshape(len(states), -1, *z.shape[1:])

    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """The logits of states of the last stage; [T, C] of tokens [T, d] (`tokens`)."""
        return self._head_of(self.stages - 1, x, inputs)

    def _head_of(
        self, stage: int, x: Tensor, inputs: Any, statistics: RunningStatistics | None = None
    ) -> Tensor:
        """The logits of states of any stage, or of single tokens."""
        if not self.tokens:
            return self._injected({stage: x}, self._driver(inputs), statistics)
        driver = _one(self._example if inputs is None else inputs)
        z = self._injected({stage: x.flatten(0, -2)[:, None]}, driver, statistics)
        return z[:, 0].unflatten(0, x.shape[:-1])

    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """What stands between two stages: the shortcut of a block, or the model's own."""
        last = next(b for b in reversed(self._blocks) if b.stage == stage)
        if last.shortcut is not None:
            return last.shortcut(x)
        return self._injected({stage: x}, self._driver(inputs), read=stage + 1)

    def past(self, n: int) -> Callable[[Tensor], Tensor]:
        """The shortcut of a block that changes the shape, else the state itself."""
        return self._blocks[n].shortcut or super().past(n)

    def _driver(self, x: Any) -> Any:
        """The inputs that the model is run with while states are injected."""
        if self._free:
            return _first(self._example if x is None else x)
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
        """The logits of states put in at the end of their stages, all blocks bypassed.

        Args:
            at: the states by their stage; those of earlier stages come first in the answer.
            x: the inputs that the model is run with.
            statistics: of batch norms; by default those of now.
            read: a stage; then what enters it is returned, in place of the logits.
        """
        rows, entered, taken = 0, -1, []

        def bypass(block: Block, *args: Any, **kwargs: Any) -> Any:
            nonlocal rows, entered
            h = cast(Tensor, state_among(args, kwargs))
            if block.stage != entered:
                entered = block.stage
                if rows and len(h) != rows:
                    raise InputError(
                        f"its stage {block.stage} does not go on from the one before; choose a "
                        f"list of blocks with blocks=…: {', '.join(self.found)}"
                    )
                if entered == read:
                    taken.append(h)
            ends = [block.stage] if block.module is self._ends[block.stage] else []
            if block is self._blocks[-1] and block.shortcut is not None:
                ends.append(block.stage + 1)
            for stage in range(block.stage, block.stage + 2):
                if stage > block.stage and block.shortcut is not None:
                    h = block.shortcut(h)
                if stage in ends and stage in at:
                    h = torch.cat([h, at[stage]]) if rows else at[stage]
                    rows = len(h)
            return block.form(h)

        stand_ins = {b.module: partial(bypass, b) for b in self._blocks}
        statistics = statistics or RunningStatistics(self.model.modules())
        random = torch.random.fork_rng(_devices(self.model))
        with random, statistics.use(), standing_in(stand_ins):
            z = self.run(x)
        return z if read is None else taken[0]

    @contextmanager
    def bypassing(self, removed: Iterable[int]) -> Iterator[None]:
        """The model's own forward without these layers, in place: they return their input."""
        gone = [self._blocks[n] for n in removed]

        def bypass(block: Block, *args: Any, **kwargs: Any) -> Any:
            return block.form(cast(Tensor, state_among(args, kwargs)))

        with standing_in({b.module: partial(bypass, b) for b in gone}):
            yield

    @property
    def replayed(self) -> bool:
        """Whether some block is."""
        return any(isinstance(vars(block).get("forward"), ReplayedBlock) for block in self.blocks)

    @contextmanager
    def charging(self, cost: RunningCost, x: Inputs) -> Iterator[list[Tensor]]:
        """The blocks' running costs, together once the model has run.

        Those of blocks that are not replayed are computed as the state enters them.
        """
        statistics = RunningStatistics(self.model.modules())

        def charge(stage: int, state: Tensor) -> Tensor:
            return cost(lambda s: self._head_of(stage, s, x, statistics), state)

        collected: list[Tensor] = []
        with ExitStack() as stack:
            paid = [
                stack.enter_context(_charged(b.module, partial(charge, b.stage)))
                for b in self._blocks
            ]
            yield collected
            collected += [c for costs in paid for c in costs]

    # -- other depths

    def leave_out(self, removed: set[int]) -> nn.Module:
        """A copy with shorter lists; the blocks left out are not copied.

        Raises:
            InputError: the blocks kept do something else than before.
        """
        smaller = self.repeated([0 if n in removed else 1 for n in range(self.horizon)])
        self._check_kept(smaller, removed)
        return smaller

    def repeated(self, times: Sequence[int], *, shared: bool = False) -> nn.Module:
        """A copy with other lists; a block repeated shares nothing but what it shared before.

        `shared` leaves the parameters the model's own: to try something.
        """
        places = [(b.container, b.module) for b in self._blocks]
        other = relisted(self.model, places, times, shared=shared)
        kept: dict[str, list[int]] = {}
        before: dict[str, int] = {}
        names = {m: name for name, m in self.model.named_modules()}
        for (container, _), count in zip(places, times, strict=True):
            name = names[container]
            i = before.get(name, 0)
            before[name] = i + 1
            kept.setdefault(name, []).extend([i] * count)
        set_depths(other, before, kept)
        return other

    def _check_kept(self, smaller: nn.Module, removed: set[int]) -> None:
        """The smaller model is the model with these layers bypassed, on the example."""
        if any(p.is_meta for p in self.model.parameters()) or not removed:
            return
        with self._alike():
            with self.bypassing(removed):
                expected = self.run(self._example)
            torch.manual_seed(0)
            name = type(self.model).__name__
            try:
                with evaluating(smaller):
                    own = call(smaller, self._example)
            except FAILS as error:
                raise InputError(
                    f"{name} does not run without layers {_listed(removed)} ({_told(error)})"
                ) from error
        if not _close(own, expected):
            gap = "in shape"
            if own.shape == expected.shape:
                gap = f"by {float((own.float() - expected.float()).abs().max()):.2g}"
            raise InputError(
                f"without layers {_listed(removed)} the other layers of {name} do something else "
                f"(its answers differ {gap}): they depend on their place; only layers at the end "
                "can be removed"
            )

    def _refusal(self, removed: frozenset[int]) -> str | None:
        """Why these layers cannot be removed, tried on a copy that shares the parameters."""
        if removed not in self._refusals:
            times = [0 if n in removed else 1 for n in range(self.horizon)]
            why = None
            try:
                smaller = self.repeated(times, shared=True)
                self._check_kept(smaller, set(removed))
                check_rebuilt(self, smaller)
            except InputError as error:
                why = str(error)
            self._refusals[removed] = why
        return self._refusals[removed]

    def check_removable(self, removed: Iterable[SupportsIndex]) -> None:
        """Whether the model can do without these layers, together too.

        Raises:
            InputError: one that does not exist or that it needs; all layers, or all of a list that
                cannot be empty; the model is quantised, or its layers depend on their place.
        """
        gone = layer_numbers(removed)
        super().check_removable(gone)
        if not gone:
            return
        name = type(self.model).__name__
        if len(gone) == self.horizon:
            raise InputError(
                f"all layers 0 … {self.horizon - 1} to be removed; {name} keeps at least one of "
                "them"
            )
        if getattr(self.model, "is_quantized", False):
            raise InputError(
                f"{name} is quantised; cut the model it was made from, then quantise the result"
            )
        emptied = [own for own in self._lists() if gone.issuperset(own)]
        tail = gone == set(range(self.horizon - len(gone), self.horizon))
        if tail and not emptied:
            return
        for own in emptied:
            if self._refusal(frozenset(own)) is not None:
                raise InputError(
                    f"all layers {own[0]} … {own[-1]} to be removed; {name} keeps at least one of "
                    "them"
                )
        why = self._refusal(frozenset(gone))
        if why is not None:
            raise InputError(why)

    def _lists(self) -> list[list[int]]:
        """Which layers each list holds that has nothing else in it."""
        lists: dict[nn.Module, list[int]] = {}
        for n, block in enumerate(self._blocks):
            lists.setdefault(block.container, []).append(n)
        return [own for container, own in lists.items() if len(own) == len(list(container.children()))]


@contextmanager
def _charged(block: nn.Module, cost: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Collects cost(x) for every input x of a block, inside its replay where it has one."""
    standing = vars(block).get("forward")
    if isinstance(standing, ReplayedBlock):
        standing.running_cost, standing.paid = cost, []
        try:
            yield standing.paid
        finally:
            standing.running_cost, standing.paid = None, []
        return
    paid: list[Tensor] = []

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            paid.append(cost(cast(Tensor, state_among(args, kwargs))))

    handle = block.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield paid
    finally:
        handle.remove()


def _by_stage(states: Sequence[Tensor], stages: Sequence[int]) -> dict[int, Tensor]:
    """The states of each stage, one after the other."""
    pairs = list(zip(states, stages, strict=True))
    return {m: torch.cat([s for s, at in pairs if at == m]) for m in sorted(set(stages))}


def _close(z: Tensor | None, own: Tensor) -> bool:
    """Whether they are equal but for rounding; NaN is no agreement."""
    if z is None or z.shape != own.shape:
        return False
    if own.numel() == 0:
        return True
    slack = HALF_SLACK if own.dtype.itemsize < 4 else SLACK
    limit = slack * torch.finfo(own.dtype).eps * (1 + float(own.float().abs().max()))
    return bool(float((z.float() - own.float()).abs().max()) <= limit)


def _first(x: Any) -> Any:
    """The first sample of a batch."""
    count = batch_of(x)
    return mapped(x, lambda v: v[:1] if v.dim() and len(v) == count else v)


def _one(x: Any) -> Any:
    """The first token of the first sample, of what has tokens."""
    return mapped(_first(x), lambda v: v if v.is_floating_point() or v.dim() < 2 else v[:, :1])


def _otherwise(x: Tensor) -> Tensor:
    """Other inputs of the same kind: what a head that reads them would answer otherwise to."""
    other = x.flip(0).clone()
    if other.is_floating_point():
        return other * -0.7 + 0.1
    if other.dim() > 1 and other.dtype != torch.bool:
        half = other.shape[1] // 2
        other[:, half:] = other[:, :1] if other.unique().numel() > 1 else 0
    return other


def _kind(x: Any) -> Any:
    """Of inputs, their names and dimensions."""
    if isinstance(x, Tensor):
        return x.dim()
    if isinstance(x, Mapping):
        parts = x.items()
    else:
        parts = enumerate(x)  # type: ignore[assignment]
    return frozenset((name, v.dim()) for name, v in parts if isinstance(v, Tensor))


def _devices(model: nn.Module) -> list[int]:
    """The devices other than the CPU whose random state a forward may change."""
    found = {p.device for p in model.parameters()}
    return sorted({d.index or 0 for d in found if d.type == "cuda"})


def _told(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first[:200] or type(error).__name__


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
