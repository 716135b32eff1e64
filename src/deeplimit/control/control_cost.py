"""Control costs beside the squared norm: kinetic energy, and norms under which layers vanish."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.block_call import BlockCall
from deeplimit._anatomy.branches import find_branches, linear_end, not_zero
from deeplimit._anatomy.by_branch import ByBranch, check_granularity
from deeplimit._anatomy.chain import layers_of
from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import evaluating
from deeplimit._anatomy.inputs import FAILS, examples, placed
from deeplimit.control.soft_cross_entropy import widened
from deeplimit.errors import InputError

ControlCost = Literal["squared", "kinetic", "group"]
Group = list[nn.Parameter]


def check_kind(kind: str) -> None:
    """Raises InputError unless it is the name of a control cost."""
    if kind not in get_args(ControlCost):
        known = ", ".join(map(repr, get_args(ControlCost)))
        raise InputError(f"control_cost_kind is {kind!r}; expected one of {known}")


class KineticEnergy:
    """w·mean_i ‖x_{n+1}^i − x_n^i‖² of a batch, with x_{n+1} as it leaves layer n.

    Of states [B, L, d] the samples i are tokens: those whose target is not −100 where each has one,
    else those that the attention mask counts. Where the layer changes the shape it is 0.
    """

    def __init__(self, structure: Anatomy, x: Any, y: Any, weight: float):
        counts = x.get("attention_mask") if isinstance(x, Mapping) else None
        if structure.tokens and isinstance(y, Tensor) and y.dim() == 2:
            counts = y != IGNORED
        self._counts: Tensor | None = None if counts is None else counts != 0
        self._weight = weight

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        """The energy of one layer."""
        if before.shape != after.shape:
            return widened(before).new_zeros(())
        squares = self._weight * (widened(after) - widened(before)).square()
        if before.dim() != 3:
            return squares.flatten(1).sum(1).mean()
        squares, counts = squares.sum(-1), self._counts
        if counts is None or counts.shape != squares.shape:
            return squares.mean()
        return squares.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


@contextmanager
def ends_of_stages(structure: Anatomy, energy: KineticEnergy | None) -> Iterator[dict[int, Tensor]]:
    """Collects for an energy, by n, the states that leave layers behind which a stage begins."""
    stages = structure.state_stages
    left: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for n in range(structure.horizon):
            if energy is not None and stages[n] != stages[n + 1]:
                handle = structure.register_leaving_hook(n, partial(left.__setitem__, n))
                stack.callback(handle.remove)
        yield left


def squared_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """‖θ_g‖² [G]; of sharded parameters with one sum over the processes for all."""
    squares = torch.stack(
        [torch.stack([widened(p).square().sum() for p in group]).sum() for group in groups]
    )
    whole = getattr(squares, "full_tensor", None)  # of a DTensor
    return squares if whole is None else whole()


class ProximalStep:
    """θ_g ← θ_g·max(0, 1 − η r/‖θ_g‖) after an optimiser's step, with its learning rate η.

    Where the members of a group have rates of their own each shrinks by its own. Groups shrink that
    the optimiser holds whole and that train, as it is at the step, unless a GradScaler skips it.
    """

    def __init__(self, optimizer: Optimizer, groups: Sequence[Group], weight: float):
        if any("lr" not in settings for settings in optimizer.param_groups):
            raise InputError(
                f"{type(optimizer).__name__} has no learning rate, by which the proximal step of a "
                "group cost shrinks controls; give an optimiser with lr, such as AdamW or SGD"
            )
        held = _rates(optimizer).keys()
        if groups and not any(held >= set(group) for group in groups):
            raise InputError(
                "the optimiser holds the last layer of no residual branch; make it of "
                "stage_cost.parameters(), after the stage cost was wrapped, and give it then"
            )
        self._groups, self._weight = groups, weight

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """The step, as a hook."""
        rates = _rates(optimizer)
        held = {p for p in rates if p.requires_grad}
        groups = [group for group in self._groups if held.issuperset(group)]
        if not groups:
            return
        norms = squared_norms(groups).sqrt()
        every = [p for group in groups for p in group]
        counts = torch.tensor([len(group) for group in groups], device=norms.device)
        norm = norms.repeat_interleave(counts)
        cut = norm.new_tensor([self._weight * float(rates[p]) for p in every])
        skipped = getattr(optimizer, "found_inf", None)  # set by a GradScaler while a step runs
        if skipped is not None:
            cut = cut.where(skipped.to(cut.device) == 0, 0.0)
        factors = torch.where(norm > cut, 1 - cut / norm, 0.0).unbind()
        for p, factor in zip(every, factors, strict=True):
            p.mul_(factor)


def _rates(optimizer: Optimizer) -> dict[nn.Parameter, float | Tensor]:
    return {p: settings["lr"] for settings in optimizer.param_groups for p in settings["params"]}


def every_group(structure: Anatomy) -> list[list[str]]:
    """The names of the parameters of each residual branch's last layer, of all removable layers."""
    names = {p: name for name, p in structure.model.named_parameters()}
    removable = (n for n, layer in enumerate(structure.layers) if layer.removable)
    groups = (group for n in removable for group in vanishing_groups(structure, n))
    # Each once: neighbouring steps may share a block.
    return [list(own) for own in dict.fromkeys(tuple(names[p] for p in g) for g in groups)]


@torch.no_grad()
def vanishing_groups(structure: Anatomy, n: int) -> list[Group]:
    """The last layer of each residual branch of layer n, tried out.

    Where it is 0, weight and bias, what the branch adds is exactly 0. Of a layer that changes the
    shape there is none.

    Raises:
        InputError: there is no such layer.
    """
    adds = next(stack.adds for stack in structure.stacks if n in stack.layers)
    blocks = structure.layers[n].controls
    with evaluating(structure.model), not_zero(blocks):
        return _ends_of_branches(structure, n) if adds else [_end_of_residual(b) for b in blocks]


def _end_of_residual(block: nn.Module) -> Group:
    """The last layer of a residual function, which a chain adds."""
    last = list(layers_of(block)[-1].parameters(recurse=False))
    for x in examples(block):
        with suppress(*FAILS):
            if not bool(functional_call(block, _zeros(block, last), placed(block, x)).any()):
                return last
            break
    raise _no_end(block)


def _ends_of_branches(structure: Anatomy, n: int) -> list[Group]:
    """The last layer of each branch of a block, which adds to its input by itself."""
    x = structure.fitting_example()
    if x is None:
        raise InputError(
            f"{type(structure).__name__} has no example of its model's input, on which the last "
            "layers of its residual branches are found; override example"
        )
    call = BlockCall(structure, n, x)
    if call.x is None or call.out is None or call.x.shape != call.out.shape:
        return []
    branches, groups = find_branches(call), []
    for branch in branches:
        last = linear_end(call, branch, [b.end for b in branches if b is not branch])
        added = call.again(values=_zeros(call.block, last), read=branch.end)
        if not last or bool(added.any()):
            raise _no_end(call.block)
        groups.append(last)
    if not groups:
        raise _no_end(call.block)
    return groups


def _zeros(block: nn.Module, group: Group) -> dict[str, Tensor]:
    own = set(group)
    return {name: torch.zeros_like(p) for name, p in block.named_parameters() if p in own}


def _no_end(block: nn.Module) -> InputError:
    return InputError(
        f"no last layer is found in {type(block).__name__} with which, at 0, its residual branches "
        "add exactly 0, so it cannot vanish by a group cost; take another kind of control cost"
    )


def vanished(
    model: nn.Module | Anatomy, *, granularity: Literal["layer", "branch"] = "layer"
) -> list[Any]:
    """The layers that are exactly the identity: the last layers of all their branches are 0.

    `crop(model, remove=vanished(model))` gives the same answers as the model, with no tolerance.
    Where a model cannot do without all of them, such as the layers of a stage of a ResNet of
    transformers, crop says so: leave one of them out of the list.
    With granularity "branch" the branches of blocks that add exactly 0, as pairs for
    `crop(model, remove=…, granularity="branch")`; of a block that is not the identity without them,
    for a norm behind the sum, all but the last. A network trained with a group control cost
    (`StageCost.proximal`) has such layers; every network of ours is made of them at its start.

        >>> vanished(model)
        []
        >>> with torch.no_grad():
        ...     _ = anatomy(model).blocks[1].outer.weight.zero_()
        >>> vanished(model), torch.equal(crop(model, remove=[1])(x), model(x))
        ([1], True)

    Raises:
        InputError: a model that `anatomy` cannot read, or by branches one that has none.
    """
    check_granularity(granularity)
    structure = anatomy(model)
    by_branch = ByBranch(structure) if granularity == "branch" else None
    found: list[Any] = []
    for n in range(structure.horizon):
        silent = _silent(structure, n)
        if by_branch is not None:
            if silent and all(silent) and not _is_identity(structure, n):
                silent[-1] = False  # without all of them the norms behind the sums would go too
            parts = by_branch.parts[n] if silent else []
            found += [(n, part.name) for part, zero in zip(parts, silent, strict=True) if zero]
        elif silent and all(silent) and _is_identity(structure, n):
            found.append(n)
    return found


def _silent(structure: Anatomy, n: int) -> list[bool]:
    """Tells of each branch of a layer whether its last layer is 0; nothing of unknown ones."""
    layer = structure.layers[n]
    # Few layers have parameters that are all 0: the others need not be tried out.
    some = any(not bool(p.any()) for block in layer.controls for p in block.parameters())
    if layer.removable and some:
        with suppress(InputError):
            return [not any(map(torch.any, group)) for group in vanishing_groups(structure, n)]
    return []


@torch.no_grad()
def _is_identity(structure: Anatomy, n: int) -> bool:
    """Tells whether a layer whose branches add 0 adds nothing else: no norm is behind the sum."""
    if not next(stack.adds for stack in structure.stacks if n in stack.layers):
        return True
    with evaluating(structure.model):
        call = BlockCall(structure, n, structure.fitting_example())
        return call.x is not None and call.out is not None and call.out.equal(call.x)


def control_norms(model: nn.Module | Anatomy) -> tuple[float, ...]:
    """‖θ_n‖ of the last layers of each layer's branches: 0 where the layer has vanished.

    NaN of a layer where they are not known, that changes the shape, or that is not the identity
    although they are 0, for a norm behind the sum.

        >>> len(control_norms(model)) == anatomy(model).horizon
        True

    Raises:
        InputError: a model that `anatomy` cannot read.
    """
    structure, norms = anatomy(model), []
    for n in range(structure.horizon):
        norm = math.nan
        with suppress(InputError), torch.no_grad():
            groups = vanishing_groups(structure, n)
            found = math.sqrt(sum(float(p.double().square().sum()) for g in groups for p in g))
            if groups and (found or _is_identity(structure, n)):
                norm = found
        norms.append(norm)
    return tuple(norms)
