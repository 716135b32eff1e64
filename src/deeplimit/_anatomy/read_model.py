"""Any model with a stack of blocks, read through its own forward: bypass and inject."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, SupportsIndex, TypeVar, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.anatomy import Anatomy, StateHook
from deeplimit._anatomy.branches import not_zero
from deeplimit._anatomy.chain import ResidualChain, chains_in
from deeplimit._anatomy.checks import check_module, layer_numbers
from deeplimit._anatomy.injection import (
    SAMPLES,
    HeadTrial,
    alike,
    check_answer,
    watched,
)
from deeplimit._anatomy.inputs import (
    FAILS,
    first_sample,
    kind_of,
    unwrapped,
)
from deeplimit._anatomy.of_blocks import ChainAnatomy, OfBlocks
from deeplimit._anatomy.other_depths import check_kept, check_rebuilt, with_times
from deeplimit._anatomy.stacks import Block, beside, find_blocks
from deeplimit._anatomy.stand_ins import standing_aside
from deeplimit.errors import InputError

READ_AS = "_deeplimit_read_as"  # on a model: the example and the blocks that were given for it
FAMILIES: dict[type[nn.Module], Callable[[nn.Module], Anatomy]] = {ResidualChain: ChainAnatomy}

Family = TypeVar("Family", bound=type[Anatomy])


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
        with not_zero([model]):  # a head of zeros says of every reading that it is right
            self._read(example, blocks)

    def _read(self, example: Any, blocks: str | Iterable[nn.Module] | None) -> None:
        model = self.model
        seen, self._example, own = watched(model, example)
        self._found, calls, self.name, self.others = find_blocks(model, seen, own, blocks)
        self._awake = [one for one in beside(self._blocks) if one in seen]
        last = cast(Tensor, calls[-1].left)
        self._check_unwritten(
            [*(cast(Tensor, one.entered) for one in calls), last],
            [*(one.versions[0] for one in calls), calls[-1].versions[1]],
        )
        self._of_tokens = last.dim() == 3
        self._free = False
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
        return read_model(model, self._example, self.name)

    def example(self) -> Any:
        """The batch on which the model was read."""
        return self._example

    def control(self, n: int) -> list[nn.Parameter]:
        """All parameters of a block of tokens, whose attention and MLP each add to the state.

        Of another layer those from its last norm on, where it has one.
        """
        several = self._of_tokens and not self._chains
        return list(self.blocks[n].parameters()) if several else super().control(n)

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """As of any blocks; an InputError where one runs that did not on the example."""

        def wakes(_: nn.Module, __: tuple[Any, ...]) -> None:
            raise InputError(self._apart_from_example("one more than in its example runs"))

        asleep = (one for one in beside(self._blocks) if one not in self._awake)
        idle = [module.register_forward_pre_hook(wakes) for module in asleep]
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
        with alike(self.model), not_zero([self.model]):
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

    def _tried(self, gone: Collection[int], *, shared: bool = True) -> nn.Module:
        """A copy with shorter lists; an InputError where the blocks kept do something else."""
        times = [n not in gone for n in range(self.horizon)]
        smaller = with_times(self.model, self._blocks, times, shared=shared)
        check_kept(self, self._blocks, smaller, gone)
        return smaller

    def leave_out(self, removed: set[int]) -> nn.Module:
        """A copy with shorter lists or chains, to be read by the same ones."""
        if self._chains:
            return super().leave_out(removed)
        return self._remembered(self._tried(removed, shared=False))

    def repeated(self, times: Sequence[int]) -> nn.Module:
        """A copy with other lists; a block repeated shares nothing but what it shared before."""
        if self._chains:
            return super().repeated(times)
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
        if self._chains:
            return
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


def read_model(
    model: nn.Module, example: Any, blocks: str | Iterable[nn.Module] | None
) -> ReadModel:
    """Reads a model by its chains, unless blocks are meant or the chains are parts of some."""
    chains = [chain for _, chain in chains_in(model)]
    if blocks is not None or not chains:
        return ReadModel(model, example, blocks)
    try:
        return ReadModel(model, example, chains)
    except InputError:
        with suppress(InputError):
            return ReadModel(model, example)
        raise


def register(*classes: type[nn.Module]) -> Callable[[Family], Family]:
    """Class decorator: this anatomy reads models of these classes and their subclasses."""

    def enter(family: Family) -> Family:
        for cls in classes:
            FAMILIES[cls] = family
        return family

    return enter


def of_family(model: nn.Module) -> Anatomy | None:
    """The anatomy of a network of our own, or of a class that was registered."""
    return next((FAMILIES[cls](model) for cls in type(model).__mro__ if cls in FAMILIES), None)


def anatomy(
    model: nn.Module | Anatomy,
    example: Any = None,
    blocks: str | Iterable[nn.Module] | None = None,
) -> Anatomy:
    """Reads a model: its residual blocks, their states, and the logits of each state.

    The example and the blocks that were given are remembered on the model: whatever takes the model
    later, or a copy or a crop of it, reads it likewise. `StageCost`, `crop`, `verify_crop`,
    `turnpike_profile`, `choose_cut` and `Fading` take what this returns in its place, too. Wrappers
    of torch.compile, DataParallel and DistributedDataParallel are looked through.

        a = anatomy(model, example=batch, blocks="encoder.layers")
        states, logits = a.states(batch)
        z = a.logits(states, x=batch)       # [N + 1, B, …]

    Args:
        model: any module with a ModuleList or Sequential of blocks that take and return a state of
            one shape; or an anatomy, which is returned.
        example: a batch of inputs on which it is read: a tensor, tensors by name, or a tuple. By
            default one is made: of the width, channels or tokens that its first layer takes.
        blocks: the name of the list that is meant where there are several (an encoder's and a
            decoder's), a pattern such as "layers.*.blocks", or the blocks; by default the list, or
            lists whose names differ in numbers only, with the most blocks.

    Raises:
        InputError: no model, or as `ReadModel`.
    """
    if isinstance(model, Anatomy):
        return model
    check_module(model)
    model = unwrapped(model)
    own = of_family(model)
    if own is not None:
        return own
    before = vars(model).get(READ_AS, (None, None))
    given = example if example is not None else before[0]
    meant = blocks if blocks is not None else before[1]
    with standing_aside(model):
        structure = read_model(model, given, meant)
    if example is not None or blocks is not None:
        vars(model)[READ_AS] = structure.example(), structure.name
    return structure


def model_of(model: nn.Module | Anatomy) -> nn.Module:
    """The model, or the one that an anatomy reads.

    Raises:
        InputError: neither.
    """
    module = model.model if isinstance(model, Anatomy) else model
    check_module(module)
    return module
