"""Networks and batches looked at before anything is computed with them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network import ResidualChain
from deeplimit.network.checks import shown


def check_model(model: object) -> None:
    """Raises InputError unless it is a network."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{shown(model)} given as the network; expected a torch.nn.Module, such as "
            "deeplimit.network.load(path) or the .network() of a LayerwiseMeasure"
        )


def check_batch(model: nn.Module, x: object, shape: Sequence[int]) -> None:
    """Raises InputError unless x is a batch of samples of this shape, in the model's precision.

    The stem of a `ResidualClassifier` standardises what is of lower precision to the model's own.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{shown(x)} given as the samples; expected a tensor, one row per sample")
    dtype = next(p.dtype for p in model.parameters())
    taken = x.dtype if isinstance(model, ResidualChain) else torch.promote_types(x.dtype, dtype)
    if taken != dtype:
        raise InputError(
            f"samples of {x.dtype} given to a network of {dtype}; expected one precision: give "
            f"x.to({dtype})"
        )
    if x.shape[x.dim() - len(shape) :] != tuple(shape):
        size = ", ".join(map(str, shape))
        raise InputError(
            f"samples of shape {list(x.shape)} given; the network takes [samples, {size}]"
        )
