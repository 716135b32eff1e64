"""A linear map folded into the weights in which a branch ends."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.block_call import End, is_transposed


def fold(end: End, a: Tensor, c: Tensor, covariance: Tensor, offset: float = 0.0) -> None:
    """Changes an end in place so that it gives m + (a m + c) / gain in place of m.

    Of a batch norm behind a convolution the latter takes the map, and the norm's running statistics
    become those of what it normalises then, so that it can be trained on.

    Args:
        end: to be changed.
        a: [d, d], diagonal where the end does not mix channels.
        c: [d], zero where it has no bias.
        covariance: of m, [d, d].
        offset: what a norm adds to its weight before it multiplies by it.
    """
    module = cast(Any, end.module)
    t = torch.eye(len(c), dtype=a.dtype, device=a.device) + a / end.gain[:, None]
    e = c / end.gain
    weight = module.weight.double()
    if end.convolution is not None:
        _fold_convolution(module, end.convolution, t, e, covariance)
        return
    if weight.dim() == 1:
        new = (weight + offset) * t.diagonal() - offset
    elif is_transposed(module):
        new = weight @ t.T
    else:
        new = torch.einsum("ij,j...->i...", t, weight)
    bias = t @ module.bias.double() + e if end.biased else None
    with torch.no_grad():
        module.weight.copy_(new)
        if bias is not None:
            module.bias.copy_(bias)


def _fold_convolution(
    norm: Any, convolution: nn.Conv2d, t: Tensor, e: Tensor, covariance: Tensor
) -> None:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    td = t * scale
    variance = (t @ covariance @ t.T).diagonal().clamp(min=0)
    with torch.no_grad():
        convolution.weight.copy_(torch.einsum("ij,j...->i...", td, convolution.weight.double()))
        if convolution.bias is not None:
            convolution.bias.copy_(td @ convolution.bias.double())
        norm.running_mean.copy_(td @ norm.running_mean.double())
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(t @ norm.bias.double() + e)
