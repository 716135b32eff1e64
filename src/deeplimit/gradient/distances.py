"""How far tensors are apart: norms, and comparisons on a few of their entries."""

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLED = 256  # entries of a state that are kept to know it by


class Sample(NamedTuple):
    """Some entries of a state x and of its update u."""

    x: Tensor
    u: Tensor


def sample(x: Tensor, y: Tensor, dtype: torch.dtype) -> Sample:
    """Some entries of x and of y − x."""
    state = some(x, SAMPLED).to(dtype)
    return Sample(state, _view(y, SAMPLED) - state)


def nearer(known: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """The one of two states that is nearer to what is known of it; nothing waits for the answer."""
    gaps = (norm(some(state, SAMPLED) - known) for state in (z, x))
    return torch.where(torch.lt(*gaps), z, x)


def some(x: Tensor, count: int = 64) -> Tensor:
    """At most so many entries, from all over it."""
    return _view(x, count).clone()


def _view(x: Tensor, count: int) -> Tensor:
    x, size = x.detach() if x.requires_grad else x, x.numel()
    every = -(-size // count) | 1  # odd, or it could be one channel alone
    if type(x) is Tensor and x.is_contiguous():
        return x.as_strided((-(-size // every),), (every,))  # half of a slice's time
    return x.flatten()[::every]


def norm(x: Tensor) -> Tensor:
    """‖x‖, of half-precision numbers in float32."""
    dtype = torch.float32 if x.itemsize < 4 else x.dtype
    found: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return found


def norms(x: Tensor) -> Tensor:
    """‖x_i‖ per sample."""
    if x.dim() < 2:
        return norm(x)[None]
    dtype = torch.float32 if x.itemsize < 4 else x.dtype
    if x.is_contiguous():
        x = x.flatten(1)  # twice as fast as over several dimensions
    found: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=dtype)
    return found


def compared(was: Sample, now: Sample) -> tuple[Tensor, Tensor]:
    """The drift of states that came again, and the response of blocks to them, a row each.

    Of what else a block gives beside its state nothing is known but that it is given the state: the
    response is no smaller than the state's own relative error.
    """
    off = now.x - was.x
    response = torch.maximum(_relative(now.u - was.u, was.u), _relative(off, was.x))
    return _relative(off, was.u), response


def _relative(gap: Tensor, update: Tensor) -> Tensor:
    """Root mean square over a row of gap_i / √(u_i² + m²), with the median m of the |u_i| > 0.

    For entries of one size it is ‖gap‖/‖u‖. A few huge ones, a channel or a sample, neither hide
    what the others feel nor count for more than their own relative error. Where many are 0, m is
    that of √p·|u_i|, with p the share of those that are not.
    """
    if not gap.numel():
        return gap.new_zeros(len(gap))
    size = update.abs()
    share = (size > 0).to(gap.dtype).mean(1, keepdim=True)
    median = torch.where(size > 0, size, torch.nan).nanmedian(1, keepdim=True).values
    usual = median.nan_to_num() * share.sqrt()
    ratios = torch.where(gap == 0, 0.0, gap.square() / (size.square() + usual.square()))
    return ratios.mean(1).sqrt()


def relative_drift(gap: Tensor, updates: list[Tensor]) -> Tensor:
    """Root mean square over samples of ‖x̃_n − x_n‖ / ‖x_{n+1} − x_n‖.

    The update is taken as no larger than the median of those since the last kept state (of some,
    evenly spread over a deep chain): one layer with a huge update, or one sample, would hide an
    error that all others feel. In an empty batch nothing can be off: 0.
    """
    if gap.numel() == 0:
        return torch.zeros((), device=gap.device)
    gaps, own = norms(gap), updates[-1]
    usual = torch.stack(updates).median(dim=0).values
    ratios = torch.where(gaps == 0, 0.0, gaps / torch.minimum(own, usual))
    return ratios.square().mean().sqrt()
