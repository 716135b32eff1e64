"""Where a model's residual blocks are: seen in one run of its own forward."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network.anatomy.shortcuts import shortcut_of
from deeplimit.network.anatomy.stand_ins import form_of, state_among, state_of
from deeplimit.network.checks import shown

Form = Callable[[Tensor], Any]
LISTS = (nn.ModuleList, nn.Sequential)


@dataclass
class Seen:
    """What a module was called with and what it returned; of the first call, and how many."""

    entered: Tensor | None
    order: int
    left: Tensor | None = None
    form: Form | None = None
    output: Any = None
    calls: int = 1

    @property
    def keeps_shape(self) -> bool:
        """Whether the first argument and the first output are states of one shape."""
        return (
            self.entered is not None
            and self.left is not None
            and self.entered.shape == self.left.shape
            and self.entered.dtype == self.left.dtype
        )


@dataclass(frozen=True)
class Block:
    """A block of a stack.

    Attributes:
        module: the block.
        container: the list it stands in.
        stage: of the state that enters it.
        form: puts a state in the form of what the block returns.
        shortcut: of a block that changes the shape, what it does with its branch at zero.
    """

    module: nn.Module
    container: nn.Module
    stage: int
    form: Form
    shortcut: Callable[[Tensor], Tensor] | None = None


@dataclass
class Watch:
    """Sees the modules in a model's lists while it runs."""

    model: nn.Module
    seen: dict[nn.Module, Seen] = field(default_factory=dict)

    def run(self, forward: Callable[[], Tensor]) -> Tensor:
        """The forward's output."""
        lists = [m for m in self.model.modules() if isinstance(m, LISTS)]
        watched = {child for one in lists for child in one.children()}
        handles = []
        for module in watched:
            handles.append(module.register_forward_pre_hook(self._enters, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaves))
        try:
            return forward()
        finally:
            for handle in handles:
                handle.remove()

    def _enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in self.seen:
            self.seen[module].calls += 1
        else:
            self.seen[module] = Seen(state_among(args, kwargs), len(self.seen))

    def _leaves(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen = self.seen[module]
        if seen.calls == 1:
            seen.left, seen.form, seen.output = state_of(output), form_of(output), output


def find_blocks(
    model: nn.Module, seen: dict[nn.Module, Seen], asked: str | Iterable[nn.Module] | None
) -> tuple[list[Block], str | None, list[str]]:
    """The blocks of one group of lists, in order, its name, and those of the other groups.

    Lists whose names differ in numbers only are one group, such as a stage each. Of several groups
    the one with the most blocks is taken, the last in the forward among equals.

    Args:
        model: it has just run.
        seen: what `Watch` saw.
        asked: the name of a list, a pattern of names, or the blocks themselves; None: the longest.

    Raises:
        InputError: there is no stack, none of that name, or its blocks do not make one.
    """
    groups = _groups(model, seen)
    if asked is None:
        if not groups:
            raise InputError(_none(model, seen))
        asked = max(groups, key=lambda n: (len(groups[n]), max(_order(groups[n], seen))))
    if isinstance(asked, str):
        chosen = _asked(model, seen, asked, groups)
    else:
        asked = _distinct(asked)
        holders = {child: one for one in _lists(model).values() for child in one.children()}
        strange = next((b for b in asked if b not in holders or b not in seen), None)
        if strange is not None:
            raise InputError(
                f"a {type(strange).__name__} given among the blocks is in no ModuleList or "
                f"Sequential of {type(model).__name__}, or is not called in its forward"
            )
        chosen = [(holders[b], b) for b in asked]
    others = [name for name in groups if name != asked]
    return _staged(model, chosen, seen), asked if isinstance(asked, str) else None, others


def beside(blocks: Sequence[Block]) -> list[nn.Module]:
    """What stands in the same lists and is of the same classes, and is no block."""
    mine, kinds = {b.module for b in blocks}, {type(b.module) for b in blocks}
    every = dict.fromkeys(child for b in blocks for child in b.container.children())
    return [child for child in every if child not in mine and type(child) in kinds]


def _distinct(asked: Any) -> list[nn.Module]:
    """Blocks given, each once.

    Raises:
        InputError: something else is given.
    """
    given = list(asked) if isinstance(asked, Iterable) else []
    if not given or not all(isinstance(block, nn.Module) for block in given):
        raise InputError(
            f"blocks={shown(asked)} given; expected the name of a list of blocks, a pattern, or "
            "the blocks"
        )
    return list(dict.fromkeys(given))


def _lists(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LISTS)}


def _groups(
    model: nn.Module, seen: dict[nn.Module, Seen]
) -> dict[str, list[tuple[nn.Module, nn.Module]]]:
    """(list, block) of each group, by its starred name; outer lists before what is inside."""
    for least in (2, 1):  # of a model cut to one block this one is taken
        taken: dict[str, list[tuple[nn.Module, nn.Module]]] = {}
        prefixes: list[str] = []
        by_name: dict[str, dict[str, nn.Module]] = {}
        for name, one in _lists(model).items():
            by_name.setdefault(re.sub(r"\d+", "*", name), {})[name] = one
        for starred, lists in by_name.items():
            if starred.startswith(tuple(prefixes)):
                continue
            found = [
                (one, child)
                for one in lists.values()
                for child in one.children()
                if _is_block(child, seen)
            ]
            if len(found) >= least and (least == 2 or type(found[0][0]) is nn.ModuleList):
                taken[starred if len(lists) > 1 else next(iter(lists))] = found
                prefixes.append(f"{starred}.")
        if taken:
            return taken
    return {}


def _is_block(module: nn.Module, seen: dict[nn.Module, Seen]) -> bool:
    """Whether it is made of parts, has parameters, and keeps the shape or has a shortcut."""
    at = seen.get(module)
    if at is None or at.calls != 1 or at.entered is None or at.left is None:
        return False
    plain = type(module).__module__.startswith("torch.nn.modules.") and not len(
        list(module.children())
    )
    if plain or next(module.parameters(), None) is None or not at.entered.is_floating_point():
        return False
    return at.keeps_shape or shortcut_of(module) is not None


def _asked(
    model: nn.Module,
    seen: dict[nn.Module, Seen],
    asked: str,
    groups: dict[str, list[tuple[nn.Module, nn.Module]]],
) -> list[tuple[nn.Module, nn.Module]]:
    if asked in groups:
        return groups[asked]
    lists = {name: m for name, m in _lists(model).items() if fnmatch.fnmatchcase(name, asked)}
    chosen = [(m, c) for m in lists.values() for c in m.children() if _is_block(c, seen)]
    if not chosen:
        known = ", ".join(groups) or "none"
        raise InputError(
            f"blocks={asked!r} given; {type(model).__name__} has no such list of blocks; found: "
            f"{known}"
        )
    return chosen


def _order(chosen: list[tuple[nn.Module, nn.Module]], seen: dict[nn.Module, Seen]) -> list[int]:
    return [seen[block].order for _, block in chosen]


def _staged(
    model: nn.Module, chosen: list[tuple[nn.Module, nn.Module]], seen: dict[nn.Module, Seen]
) -> list[Block]:
    """The blocks in the order of their calls; a stage ends where something comes between two."""
    chosen = sorted(chosen, key=lambda pair: seen[pair[1]].order)
    blocks, stage = [], 0
    followers = [*(seen[module] for _, module in chosen[1:]), None]
    for (container, module), follower in zip(chosen, followers, strict=True):
        at = seen[module]
        shortcut = None if at.keeps_shape else shortcut_of(module)
        blocks.append(Block(module, container, stage, cast(Form, at.form), shortcut))
        apart = follower is not None and not _same(at.left, follower.entered)
        if apart:
            _check_first(model, module, at, cast(Seen, follower))
        stage += apart or shortcut is not None
    for one in beside(blocks):
        if one in seen and seen[one].calls > 1:
            raise InputError(f"{type(model).__name__} cannot be read: {_again(one, seen[one])}")
    return blocks


def _again(module: nn.Module, at: Seen) -> str:
    return (
        f"one {type(module).__name__} is called {at.calls} times in a forward; give each layer a "
        "block of its own"
    )


def _check_first(model: nn.Module, module: nn.Module, at: Seen, follower: Seen) -> None:
    """Raises InputError where the next block goes on from another output than the first."""
    others = at.output[1:] if isinstance(at.output, tuple | list) else ()
    for i, other in enumerate(others, 1):
        if isinstance(other, Tensor) and _same(other, follower.entered):
            raise InputError(_elsewhere(model, module, i))


def _elsewhere(model: nn.Module, module: nn.Module, i: int) -> str:
    return (
        f"{type(module).__name__} of {type(model).__name__} returns its state as output {i}; "
        "expected it first: return (state, …)"
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether it is the same tensor, or the same numbers in memory."""
    if a is None or b is None or a.shape != b.shape or a.stride() != b.stride():
        return False
    return a is b or (not a.is_meta and a.data_ptr() == b.data_ptr() and a.numel() > 0)


def _none(model: nn.Module, seen: dict[nn.Module, Seen]) -> str:
    """Why there is no stack."""
    name = type(model).__name__
    repeated = next((m for m, at in seen.items() if at.calls > 1), None)
    if repeated is not None:
        return f"no stack of blocks in {name}: {_again(repeated, seen[repeated])}"
    what = ""
    for module, at in seen.items():
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
