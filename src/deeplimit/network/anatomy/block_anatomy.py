"""Models whose layers are modules of their own; the states are seen in the model's own forward."""

import copy
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit.errors import InputError
from deeplimit.network.anatomy.anatomy import (
    Anatomy,
    Layer,
    RunningCost,
    StateHook,
    layer_numbers,
)
from deeplimit.network.anatomy.config_depth import set_layers
from deeplimit.network.modes import Inputs, RunningStatistics, evaluating

Container = nn.ModuleList | nn.Sequential

# Of the logits' rounding, what the same head may make of the same state in another call. Sums in
# half precision are rounded once, at their end.
SLACK, HALF_SLACK = 100, 4
INDEX = ("layer_idx", "layer_id")  # what a block calls its place, where it knows it


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


class BlockAnatomy(Anatomy):
    """A model whose layers are modules in lists, one list per stage of the model.

    A family says where the lists are, what carries a state past a change of shape, and how the head
    reads it. The anatomy is checked when it is made: on an example of its input each carried state
    must have the next one's shape, and the logits of the last state must be the model's own.

    Attributes:
        may_be_empty: whether the model can be built with one of its lists empty.
        ends: the modules in a block, by their paths, in which its residual branches end.

    Raises:
        InputError: it does not fit.
    """

    may_be_empty = True
    ends: tuple[str, ...] = ()

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.check(self.fitting_example())

    @property
    @abstractmethod
    def containers(self) -> Sequence[Container]:
        """The lists that hold the residual blocks and nothing else, in order."""

    def changes_shape(self, block: nn.Module) -> bool:
        """Whether a block's output has another shape than its input; the model cannot lose it."""
        return False

    def shortcut(self, block: nn.Module, x: Tensor) -> Tensor:
        """What a block that changes the shape makes of a state with its residual branch at zero."""
        return x

    def carry(self, stage: int, x: Tensor) -> Tensor:
        """The shortcut of the block that changes the shape; overridden where other modules do."""
        *_, last = (layer.controls[0] for layer in self.layers if layer.stage == stage)
        return self.shortcut(last, x) if self.changes_shape(last) else x

    def shortened(self, model: nn.Module, kept: list[list[int]]) -> None:
        """After a change of depth: brings up to date what the model says of itself, in place.

        That is the `config` of a model that has one and one list of blocks, by `set_layers`.

        Args:
            model: the model with other lists.
            kept: per list of blocks, the old ones that stand there now, in order; one that was
                repeated is there several times.
        """
        config: Any = getattr(model, "config", None)
        if len(kept) == 1 and hasattr(config, "__dict__"):
            set_layers(config, kept[0], self.horizon)

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """All parameters of the modules named in `ends`."""
        if not self.ends:
            return super().branch_ends(block)
        try:
            return [p for path in self.ends for p in block.get_submodule(path).parameters()]
        except AttributeError as error:
            raise InputError(
                f"{type(self).__name__} looks for the end of a residual branch where "
                f"{type(block).__name__} has none ({error}); override branch_ends"
            ) from error

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All residual blocks in order."""
        return tuple(block for container in self.containers for block in container)

    @property
    def end(self) -> nn.Module:
        """The module whose output is the last state: the last block, if no list can be empty."""
        return self.blocks[-1]

    @property
    def stages(self) -> int:
        """One for each shape of the state."""
        return self._staged[1]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """A layer is a block; one that changes the shape starts from a state of the stage before.

        Where it is the first of all, its stage is one with nothing else in it.
        """
        return tuple(self._staged[0])

    @property
    def _staged(self) -> tuple[list[Layer], int]:
        """The layers, and the number of stages."""
        layers: list[Layer] = []
        stage = 0
        for m, container in enumerate(self.containers):
            blocks = list(container)
            if m and not (blocks and self.changes_shape(blocks[0])):
                stage += 1  # what changes the shape stands before the list
            for block in blocks:
                changes = self.changes_shape(block)
                layers.append(Layer(stage, (block,), removable=not changes))
                stage += changes
        return layers, stage + 1

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The inputs of the blocks, and what comes out at the end."""

        def enters(n: int) -> Callable[..., None]:
            def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hook(n, args[0] if args else kwargs["hidden_states"])

            return seen

        blocks = self.blocks
        handles = [
            block.register_forward_pre_hook(enters(n), with_kwargs=True)
            for n, block in enumerate(blocks)
        ]

        def leaves(_: nn.Module, __: tuple[Any, ...], y: Any) -> None:
            hook(len(blocks), y[0] if isinstance(y, tuple) else y)

        return [*handles, self.end.register_forward_hook(leaves)]

    def check(self, x: Inputs | None) -> None:
        """Carries each state that must be, and compares the last one's logits with the model's own.

        Raises:
            InputError: a shape or the logits differ, or the model does not run.
        """
        what = f"{type(self).__name__} does not fit this {type(self.model).__name__}"
        if len(set(self.blocks)) < len(self.blocks):
            raise InputError(f"{what}: one module is several of its layers; give each its own")
        there = set(self.model.modules())
        for container in self.containers:
            if not isinstance(container, nn.Module) or container not in there:
                raise InputError(
                    f"{what}: one of its containers is a {type(container).__name__} that is no "
                    "part of the model, such as a slice; give the model's own ModuleList or "
                    "Sequential, with the blocks and nothing else in it"
                )
        if x is None:
            return
        with evaluating(self.model), torch.no_grad():
            try:
                states, own = self.states(x)
                mine = self.logits(states[-1:], first=self.horizon)[0]
                stages = self.state_stages
                carried = {
                    n: self.carried(n, states[n]).shape
                    for n in range(self.horizon)
                    if stages[n] < stages[n + 1]
                }
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(f"{what}: {error}") from error
            for n, shape in carried.items():
                if shape != states[n + 1].shape:
                    raise InputError(
                        f"{what}: state {n} is carried to shape {list(shape)}, state {n + 1} has "
                        f"{list(states[n + 1].shape)}"
                    )
            gap = float((mine.float() - own.float().reshape(mine.shape)).abs().max())
            slack = HALF_SLACK if own.dtype.itemsize < 4 else SLACK
            limit = slack * torch.finfo(own.dtype).eps * (1 + float(own.float().abs().max()))
            if not gap <= limit:  # NaN is no agreement
                raise InputError(
                    f"{what}: the logits of its last state differ from the model's own by {gap:.2g}"
                )

    @property
    def replayed(self) -> bool:
        """Whether some block is."""
        return any(isinstance(vars(block).get("forward"), ReplayedBlock) for block in self.blocks)

    @contextmanager
    def charging(self, cost: RunningCost) -> Iterator[list[Tensor]]:
        """The blocks' running costs, together once the model has run.

        Those of blocks that are not replayed are computed as the state enters them.
        """
        statistics = RunningStatistics(self.model.modules())

        def charge(n: int, x: Tensor) -> Tensor:
            with statistics.use():
                for stage in range(self.layers[n].stage, self.stages - 1):
                    x = self.carry(stage, x)
                return cost(self.head, x)

        collected: list[Tensor] = []
        with ExitStack() as stack:
            paid = [
                stack.enter_context(_charged(block, lambda x, n=n: charge(n, x)))  # type: ignore[misc]
                for n, block in enumerate(self.blocks)
            ]
            yield collected
            collected += [c for costs in paid for c in costs]

    def leave_out(self, removed: set[int]) -> nn.Module:
        """A copy with shorter lists; the blocks left out are not copied."""
        return self.repeated([0 if n in removed else 1 for n in range(self.horizon)])

    def repeated(self, times: Sequence[int]) -> nn.Module:
        """A copy with other lists; a block repeated shares nothing but what it shared before."""
        gone = {id(block) for block, count in zip(self.blocks, times, strict=True) if not count}
        other = copy.deepcopy(self.model, dict.fromkeys(gone))
        names = {id(module): name for name, module in self.model.named_modules()}
        kept = []
        for container, layers in zip(self.containers, self._ranges, strict=True):
            mine = other.get_submodule(names[id(container)])
            kept.append([i for i, n in enumerate(layers) for _ in range(times[n])])
            _repeat(mine, [times[n] for n in layers], other)
            _number(mine)
        self.shortened(other, kept)
        return other

    def check_removable(self, removed: Iterable[SupportsIndex]) -> None:
        """Whether the model can do without these layers, together too.

        Raises:
            InputError: one that does not exist or that it needs, all layers, or all of a list that
                cannot be empty.
        """
        removed = layer_numbers(removed)
        super().check_removable(removed)
        lists = [] if self.may_be_empty else self._ranges
        for own in (range(self.horizon), *lists):
            if own and removed.issuperset(own):
                raise InputError(
                    f"all layers {own[0]} … {own[-1]} to be removed; {type(self.model).__name__} "
                    "keeps at least one of them"
                )

    @property
    def _ranges(self) -> list[range]:
        """Which layers each list holds."""
        ends = list(accumulate(len(container) for container in self.containers))
        return [range(a, b) for a, b in pairwise([0, *ends])]


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
            paid.append(cost(args[0] if args else kwargs["hidden_states"]))

    handle = block.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield paid
    finally:
        handle.remove()


def _repeat(container: nn.Module, times: list[int], model: nn.Module) -> None:
    """Block i times[i] times; the numbers that names end in count on from the first one's.

    Names without a number stay; what is repeated then has one appended.
    """
    first = re.search(r"\d+$", next(iter(container._modules), ""))
    start = int(first[0]) if first else 0
    there = []
    for (name, block), count in zip(container._modules.items(), times, strict=True):
        if block is not None:
            copies = [_copied(block, model) for _ in range(count - 1)]
            there += [(name, i, one) for i, one in enumerate((block, *copies))]
    container._modules.clear()
    for number, (name, i, block) in enumerate(there, start):
        named = re.sub(r"\d+$", str(number), name)
        again = named == name and named in container._modules
        container._modules[f"{name}_{i}" if again else named] = block


def _number(container: nn.Module) -> None:
    """Blocks that know which they are, for a cache of keys and values, are told."""
    for i, block in enumerate(container.children()):
        for module in block.modules():
            for name in INDEX:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, i)


def _copied(block: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a block in its model: the configuration, say, stays one for all."""
    inside = set(block.modules())
    shared = [*vars(model).values(), *(m for m in model.modules() if m not in inside)]
    return copy.deepcopy(block, {id(value): value for value in shared})
