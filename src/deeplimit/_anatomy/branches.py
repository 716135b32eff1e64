"""The residual branches of a block, found by trial: no class and no name of a module is known.

A module ends a branch where random numbers added to its output come out of the block again, each
channel times a constant, and zeros in its place leave something: what the branch is added to. Found
from the block's end on, each is set to zero before the next is looked for.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeplimit._anatomy.block_call import BlockCall, End, axis_of, channels_of
from deeplimit._anatomy.injection import slack_of

if TYPE_CHECKING:
    from deeplimit._anatomy.anatomy import Anatomy

NEARLY = 1e-3  # 0, of a scale: layer scales begin with 1e-6, and what they hide passes as rounding
TRIED = 8  # modules of a block that could be folded into, from its end


class Branch(NamedTuple):
    """A residual branch: it is added to the state at one place of a block.

    The output of the outermost module `end` is what is added; the sum is the input of the module
    `at`, such as a norm behind it, or the block's output where that is None.
    """

    end: nn.Module
    at: nn.Module | None = None


def find_branches(call: BlockCall) -> list[Branch]:
    """The branches of a block in order; a norm or a ReLU may stand behind each sum."""
    found: list[Branch] = []
    silent: list[nn.Module] = []
    at: nn.Module | None = None
    for module in reversed(call.order):
        m, given = call.outputs[module], call.inputs.get(module)
        itself = call.x is not None and m.shape == call.x.shape and m.equal(call.x)
        if itself or any(module in end.modules() for end in silent):
            continue  # what a branch is added to, or a part of one that was found
        if call.passed(module, silent, at) is None:
            continue
        if bool(call.without([*silent, module], at).any()):
            found.append(Branch(module, at))
            silent.append(module)
        elif not list(module.children()) and given is not None and given.shape == m.shape:
            at = module  # all that there is: a norm, say, behind the sum
    return found[::-1]


@contextmanager
def not_zero(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Random numbers in place of what hides a branch, or what a head reads: parameters that are all
    0, and numbers of scales and other vectors that are nearly.

    Of a graph that is there already they are no change. Sharded ones stay.
    """
    generator = torch.Generator().manual_seed(0)
    every = dict.fromkeys(p for block in blocks for p in block.parameters())
    found = [p.data for p in every if type(p.data) is Tensor and _hides(p)]
    hidden = [(p, p.clone() if bool(p.any()) else None) for p in found]
    for p, was in hidden:
        drawn = torch.randn(p.shape, generator=generator).to(p)
        p.copy_(drawn if was is None else torch.where(was.abs() < NEARLY, drawn, was))
    try:
        yield
    finally:
        for p, was in hidden:
            p.zero_() if was is None else p.copy_(was)


def _hides(p: Tensor) -> bool:
    """Tells whether a parameter is all 0, or one along an axis that is nearly 0 somewhere.

    Of most a few numbers say no.
    """
    if p.is_meta or p.is_inference() or not p.is_floating_point() or p.itemsize < 2:
        return False
    if p.numel() == max(p.shape, default=1):
        return bool((p.detach().abs() < NEARLY).any())
    return not (bool(p.detach().flatten()[:64].any()) or bool(p.any()))


def parameter_ends(call: BlockCall) -> list[nn.Parameter]:
    """The parameters in which the branches of a block end: times c they give c times what is added.

    Where nothing is linear in its parameters, those of the last module that has any.
    """
    found = find_branches(call)
    each = (linear_end(call, b, [o.end for o in found if o is not b]) for b in found)
    return [p for ends in each for p in ends]


def mixes_tokens(call: BlockCall, branch: Branch, silent: Collection[nn.Module]) -> str:
    """“attention” of a branch in which a token hears of others, “mlp” of one in which none does.

    Nothing where states are no tokens [B, L, d], or there is one only.
    """
    x, m = call.x, call.outputs[branch.end]
    if x is None or x.dim() != 3 or x.shape[1] < 2:
        return ""
    flat = m.shape[:1] == (len(x) * x.shape[1],)  # some blocks take all tokens as one batch
    if not flat and m.shape[:2] != x.shape[:2]:
        return ""
    other = x.clone()
    other[:, 0] += torch.linspace(-1, 1, x.shape[-1]).to(x)
    zeros = dict.fromkeys(silent, torch.zeros_like)
    a, b = (
        call.again(zeros, read=branch.end, x=state).reshape(*x.shape[:2], -1)
        for state in (x, other)
    )
    return "mlp" if a[:, 1:].equal(b[:, 1:]) else "attention"


def linear_end(
    call: BlockCall, branch: Branch, silent: Collection[nn.Module]
) -> list[nn.Parameter]:
    """The parameters in which a branch ends, found with the others silent."""
    start = call.order.index(branch.end)
    last: list[nn.Parameter] = []
    for module in reversed(call.order[: start + 1]):
        sets = list(_parameter_sets(call, module))
        if not sets:
            continue
        end = call.passed(module, silent, branch.at)
        if end is None:
            continue
        scale = _scale(call, end)
        if scale is not None:
            return [scale]
        for own in sets:
            if _is_linear(call, module, own):
                return own
        last = last or sets[0]
    return last


def _parameter_sets(call: BlockCall, module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Its own parameters, with those of parts that are not called: all, by part, one by one."""
    own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
    unseen = [part for part in module.children() if part not in call.calls]
    parts = [list(part.parameters()) for part in unseen]
    every = [group for group in [own, *parts] if group]
    if len(every) > 1:
        yield [p for group in every for p in group]
    yield from every
    yield from ([p] for group in every for p in reversed(group) if len(group) > 1)


def _scale(call: BlockCall, end: End) -> nn.Parameter | None:
    """The parameter of the block itself by whose entries what the end returns is multiplied."""
    if bool((end.gain == 1).all()):
        return None
    for p in reversed(list(call.block.parameters(recurse=False))):
        given = p.detach().double().flatten()
        if given.shape == end.gain.shape and torch.allclose(given, end.gain, rtol=1e-3, atol=0):
            return p
    return None


def _is_linear(call: BlockCall, module: nn.Module, own: list[nn.Parameter]) -> bool:
    """Tells whether half the parameters give half the output, near their values."""
    generator = torch.Generator().manual_seed(0)
    names = {p: name for name, p in call.block.named_parameters()}
    near = {names[p]: p + torch.randn(p.shape, generator=generator).to(p) for p in own}
    half = {name: p / 2 for name, p in near.items()}
    m, halved = (call.again(values=v, read=module) for v in (near, half))
    largest = float(m.abs().max())
    apart = float((halved - m / 2).abs().max())
    return largest > 0 and apart <= slack_of(m.dtype) * largest


def find_end(structure: "Anatomy", n: int, x: Any) -> End | str:
    """The last module of layer n that a map can be folded into; or why there is none."""
    layer = structure.layers[n]
    if len(layer.controls) > 1:
        return f"the step of layer {n} uses {len(layer.controls)} blocks"
    call = BlockCall(structure, n, x)
    if call.out is None:
        return f"layer {n} gives no state"
    uses: dict[int, int] = {}
    for _, p in structure.model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    foldable = [m for m in reversed(call.order) if channels_of(m)][:TRIED]
    for module in foldable:
        m = call.outputs[module]
        if any(uses[id(p)] > 1 for p in module.parameters(recurse=False)) or not axis_of(module, m):
            continue
        end = call.passed(module, clipped=False) or _clipped(call, module)
        if end is not None:
            return replace(end, convolution=_convolution(call, module))
    return f"where the last branch of {type(call.block).__name__} ends is not found in its modules"


def _clipped(call: BlockCall, module: nn.Module) -> End | None:
    """The end x = ReLU(y + m), with y the block's input or its shortcut's output."""
    m, out = call.outputs[module], cast(Tensor, call.out)
    if m.shape != out.shape or bool(out.min() < 0):
        return None
    shortcuts = [getattr(call.block, k, None) for k in ("downsample", "shortcut")]
    given = [(s, call.outputs.get(s)) for s in shortcuts if isinstance(s, nn.Module)]
    for rest, y in [*given, (call.block, call.x)]:
        if y is None or y.shape != m.shape or rest is module:
            continue
        apart = float(((y + m).relu() - out).abs().max())
        if apart <= slack_of(m.dtype) * float(out.max()):
            axis = cast(int, axis_of(module, m))
            gain = torch.ones(m.shape[axis], dtype=torch.float64, device=m.device)
            return End(call.names[module], module, None, axis, axis, gain, rest)
    return None


def _convolution(call: BlockCall, module: nn.Module) -> nn.Conv2d | None:
    """The convolution whose output a batch norm normalises by its running statistics, if any."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return None
    convolutions = (m for m in call.order if isinstance(m, nn.Conv2d))
    return next((m for m in convolutions if call.follows(m, module)), None)
