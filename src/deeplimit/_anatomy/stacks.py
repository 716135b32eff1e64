"""Where a model's residual blocks are: seen in one run of its own forward."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from deeplimit._anatomy.chain import ResidualChain
from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.stand_ins import form_of, state_among, state_of, version
from deeplimit.errors import InputError

Form = Callable[[Tensor], Any]
Answer = TypeVar("Answer")
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
ACTIVATIONS = ("act3", "act2", "act", "relu", "activation")  # a block's last one, whatever its name
TORCHS = "torch.nn.modules."
NORMS = {TORCHS + kind for kind in ("normalization", "batchnorm", "instancenorm", "dropout")}


@dataclass
class Seen:
    """One call of a module: the state that entered, its arguments, the state that left, its output.

    `order` counts the calls as they begin, `versions` how often the states had been written over.
    """

    entered: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    order: int
    left: Tensor | None = None
    output: Any = None
    versions: tuple[int, ...] = ()

    @property
    def keeps_shape(self) -> bool:
        """True where the first argument and the first output are states of one shape."""
        a, b = self.entered, self.left
        return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype)


Calls = dict[nn.Module, list[Seen]]


class Place(NamedTuple):
    """A call of a block, and the list that the block stands in."""

    container: nn.Module
    module: nn.Module
    call: Seen


@dataclass(frozen=True)
class Block:
    """A block of a stack.

    Attributes:
        module: the block; one that is called several times in a forward is as many blocks.
        container: the list it stands in; the module itself, where it stands in none.
        stage: of the state that enters it.
        form: puts a state in the form of what the block returns.
        shortcut: of a block that changes the shape, what it does with its branch at zero.
        apart: whether something stands between it and the next block.
    """

    module: nn.Module
    container: nn.Module
    stage: int
    form: Form
    shortcut: Callable[[Tensor], Tensor] | None = None
    apart: bool = False


def itself(x: Tensor) -> Tensor:
    """The form of a block that returns its state alone."""
    return x


class Watch:
    """Sees the calls of modules in a run.

    Attributes:
        seen: the calls of each module.
        ended: the modules as their calls ended.
    """

    def __init__(self, modules: Iterable[nn.Module], *, copies: bool = False):
        """With `copies` the states are copies, since some are written over later."""
        self.seen: Calls = {}
        self.ended: list[nn.Module] = []
        self._modules, self._copies, self._order = list(modules), copies, count()

    def run(self, forward: Callable[[], Answer]) -> Answer:
        """Runs a forward; its answer."""
        with ExitStack() as stack:
            for module in self._modules:
                hook = module.register_forward_pre_hook(
                    self._enters, with_kwargs=True, prepend=True
                )
                stack.callback(hook.remove)
                stack.callback(module.register_forward_hook(self._leaves).remove)
            return forward()

    def _enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = state_among(args, kwargs)
        call = Seen(self._kept(x), args, kwargs, next(self._order), versions=(version(x),))
        self.seen.setdefault(module, []).append(call)

    def _leaves(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        call, y = self.seen[module][-1], state_of(output)
        call.left, call.output = self._kept(y), output
        call.versions += (version(y),)
        self.ended.append(module)

    def _kept(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or not self._copies else x.clone()


class Found(NamedTuple):
    """The blocks of one group of lists, in order, with their calls, its name and the other ones."""

    blocks: list[Block]
    calls: list[Seen]
    name: str | None
    others: list[str]


def find_blocks(
    model: nn.Module, seen: Calls, answer: Tensor, asked: str | Iterable[nn.Module] | None
) -> Found:
    """Finds the blocks of a model that has just run, by the name of a list, a pattern, or as given.

    Lists whose names differ in numbers only are one group, such as a stage each. Of several groups
    the one with the most blocks is taken, the last in the forward among equals. An InputError where
    there is no stack, none of that name, or its blocks do not make one.
    """
    groups, name = _groups(model, seen), asked
    if name is None:
        if not groups:
            raise InputError(_none(model, seen))
        name = max(groups, key=lambda n: (len(groups[n]), max(at.call.order for at in groups[n])))
    if isinstance(name, str):
        places = _asked(model, seen, name, groups)
        places = _less_head(places, answer, least=2 if asked is None else 1)
    else:
        given = list(name) if isinstance(name, Iterable) else []
        if not given or not all(isinstance(block, nn.Module) for block in given):
            raise InputError(
                f"blocks={shown(asked)} given; expected the name of a list of blocks, a pattern, "
                "or the blocks"
            )
        given = list(dict.fromkeys(given))
        holders: dict[nn.Module, nn.Module] = {b: b for b in given if isinstance(b, ResidualChain)}
        holders |= {b: one for one in _lists(model).values() for b in one.children()}
        for strange in (b for b in given if b not in seen or b not in holders):
            raise InputError(
                f"a {type(strange).__name__} given among the blocks is in no ModuleList or "
                f"Sequential of {type(model).__name__}, or is not called in its forward"
            )
        places = [Place(holders[b], b, at) for b in given for at in seen[b]]
    places = sorted(places, key=lambda place: place.call.order)
    blocks = _staged(model, places, seen)
    others = [other for other in groups if other != name]
    return Found(blocks, [p.call for p in places], name if isinstance(name, str) else None, others)


def _less_head(places: list[Place], answer: Tensor, least: int) -> list[Place]:
    """Without a last block that gives the model's answer and is of another class than all others.

    It is a head of the state's own width.
    """
    last = max(places, key=lambda place: place.call.order)
    others = [place for place in places if place.module is not last.module]
    kinds = {type(place.module) for place in others}
    head = len(others) >= least and type(last.module) not in kinds
    return others if head and same(last.call.left, answer) else places


def beside(blocks: Sequence[Block]) -> list[nn.Module]:
    """Finds modules of the same lists and classes that are no blocks."""
    mine, kinds = {b.module for b in blocks}, {type(b.module) for b in blocks}
    lists = dict.fromkeys(b.container for b in blocks)
    every = dict.fromkeys(child for one in lists for child in one.children())
    return [child for child in every if child not in mine and type(child) in kinds]


def _lists(model: nn.Module) -> dict[str, nn.Module]:
    # The modules in a chain return no states.
    every = ((name, m) for name, m in model.named_modules() if isinstance(m, LISTS))
    return {name: m for name, m in every if not isinstance(m, ResidualChain)}


def _groups(model: nn.Module, seen: Calls) -> dict[str, list[Place]]:
    """The blocks of each group, by its starred name; outer lists before what is inside.

    Of a model without such lists a module that is called again and again; else a list of one block,
    as a model has that was cut to it.
    """
    by_name: dict[str, dict[str, nn.Module]] = {}
    for name, one in _lists(model).items():
        by_name.setdefault(re.sub(r"\d+", "*", name), {})[name] = one
    taken: dict[str, list[Place]] = {}
    single: dict[str, list[Place]] = {}
    prefixes: list[str] = []
    for starred, lists in by_name.items():
        found = _within(lists.values(), seen)
        if starred.startswith(tuple(prefixes)) or not found:
            continue
        name = starred if len(lists) > 1 else next(iter(lists))
        if len(found) > 1:
            taken[name] = found
            prefixes.append(f"{starred}.")
        elif len(list(found[0].container.children())) == 1:
            single[name] = found
    if taken:
        return taken
    for name, module in model.named_modules():
        calls = seen.get(module, ())
        if len(calls) > 1 and _is_block(module, seen):
            return {name: [Place(module, module, at) for at in calls]}
    return dict(list(single.items())[:1])


def _within(lists: Iterable[nn.Module], seen: Calls) -> list[Place]:
    """The blocks of lists; those that are called again and again, if none is called once."""
    found = [(one, b) for one in lists for b in _blocks_of(one, seen)]
    once = [(one, b) for one, b in found if len(seen[b]) == 1]
    return [Place(one, b, at) for one, b in once or found for at in seen[b]]


def _blocks_of(container: nn.Module, seen: Calls) -> list[nn.Module]:
    """The blocks in a list; a mapping of parts of several kinds is none."""
    kinds = set(map(type, container.children()))
    if isinstance(container, nn.ModuleDict) and len(kinds) > 1:
        return []
    return [child for child in container.children() if _is_block(child, seen)]


def _is_block(module: nn.Module, seen: Calls) -> bool:
    """Tells whether it has parameters, and keeps the shape or has a shortcut."""
    calls = seen.get(module)
    weights = next(module.parameters(), None) is not None
    # As torch.ao keeps quantised ones.
    if not calls or not (weights or any(hasattr(m, "_packed_params") for m in module.modules())):
        return False
    if isinstance(module, LISTS) and any(_is_block(child, seen) for child in module.children()):
        return False  # a stage of blocks
    if any(a.entered is None or a.left is None or not a.entered.is_floating_point() for a in calls):
        return False
    if all(at.keeps_shape for at in calls):
        return True
    return len(calls) == 1 and shortcut_of(module) is not None


def is_plain(module: nn.Module) -> bool:
    """Tells whether it is one of torch's own layers, or a kind of norm, without parts."""
    kinds = {cls.__module__ for cls in type(module).__mro__}
    own = type(module).__module__.startswith(TORCHS) or bool(kinds & NORMS)
    return own and next(module.children(), None) is None


def _asked(
    model: nn.Module, seen: Calls, asked: str, groups: dict[str, list[Place]]
) -> list[Place]:
    if asked in groups:
        return groups[asked]
    lists = {name: m for name, m in _lists(model).items() if fnmatch.fnmatchcase(name, asked)}
    chosen = _within(lists.values(), seen)
    alone = dict(model.named_modules()).get(asked)
    if not chosen and alone is not None and _is_block(alone, seen):
        chosen = [Place(alone, alone, at) for at in seen[alone]]
    if not chosen:
        raise InputError(
            f"blocks={asked!r} given; {type(model).__name__} has no such list of blocks; found: "
            + (", ".join(groups) or "none")
        )
    return chosen


def _staged(model: nn.Module, places: list[Place], seen: Calls) -> list[Block]:
    """The blocks of these calls; a stage ends where something comes between two."""
    blocks, stage = [], 0
    followers = [*(place.call for place in places[1:]), None]
    for (container, module, at), follower in zip(places, followers, strict=True):
        shortcut = None if at.keeps_shape else shortcut_of(module)
        if apart := follower is not None and not same(at.left, follower.entered):
            _check_first(model, module, at, follower)
        blocks.append(Block(module, container, stage, form_of(at.output), shortcut, apart))
        stage += apart or shortcut is not None or isinstance(module, ResidualChain)
    for one in beside(blocks):
        if len(seen.get(one, ())) > 1:
            raise InputError(
                f"{type(model).__name__} cannot be read: one {type(one).__name__} is called "
                f"{len(seen[one])} times in a forward, others once; give each layer a block of its "
                "own"
            )
    return blocks


def _check_first(model: nn.Module, module: nn.Module, at: Seen, follower: Seen) -> None:
    """Raises InputError where the state is not the first output, or the next's first argument."""
    output = list(at.output.values()) if isinstance(at.output, Mapping) else at.output
    others = output[1:] if isinstance(output, tuple | list) else ()
    for i, other in enumerate(others, 1):
        if isinstance(other, Tensor) and same(other, follower.entered):
            raise InputError(_elsewhere(model, module, i))
    given = (*follower.args, *follower.kwargs.values())
    if any(isinstance(other, Tensor) and same(at.left, other) for other in given):
        raise InputError(
            f"a block of {type(model).__name__} takes the state of {type(module).__name__} as "
            "another argument than its first; expected it first: forward(state, …)"
        )


def _elsewhere(model: nn.Module, module: nn.Module, i: int) -> str:
    return (
        f"{type(module).__name__} of {type(model).__name__} returns its state as output {i}; "
        "expected it first: return (state, …)"
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Tells whether it is the same tensor, or the same numbers in memory."""
    if a is None or b is None or a.shape != b.shape or a.stride() != b.stride():
        return False
    return a is b or (not a.is_meta and a.data_ptr() == b.data_ptr() and a.numel() > 0)


def _none(model: nn.Module, seen: Calls) -> str:
    """Why there is no stack."""
    name = type(model).__name__
    what = ""
    for module, at in ((module, at) for module, calls in seen.items() for at in calls):
        if at.entered is None or at.left is None or at.keeps_shape or not list(module.children()):
            continue
        shape = at.entered.shape
        parts = at.output if isinstance(at.output, tuple | list) else ()
        for i, part in enumerate(parts):
            if isinstance(part, Tensor) and part.shape == shape:
                return _elsewhere(model, module, i)
        takes = f"{list(shape)} and returns {list(at.left.shape)}"
        what = what or f"; a {type(module).__name__} takes {takes}"
    return (
        f"no stack of blocks in {name}: expected a ModuleList or Sequential with two blocks or "
        f"more that return a state of the shape they take, as first argument and first output{what}"
    )


def shortcut_of(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """σ(projection(x)) of a residual block that changes the shape; None where it has no such."""
    for name in ("downsample", "shortcut"):
        projection = getattr(block, name, None)
        if not isinstance(projection, nn.Module) or isinstance(projection, nn.Identity):
            continue
        activation = next(
            (getattr(block, n) for n in ACTIVATIONS if callable(getattr(block, n, None))), None
        )
        if activation is not None:
            return lambda x: cast(Any, activation)(projection(x))
    return None
