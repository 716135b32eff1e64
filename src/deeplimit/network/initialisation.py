"""Starts of a stage's controls: each drawn by itself, as one smooth curve in depth, or equal.

PyTorch draws each layer's parameters by itself; a limit in depth asks that ‖θ_{n+1} − θ_n‖ =
O(1/N), which such a start never has ([SAP22] arXiv 2205.14612, [MWSB23] arXiv 2309.01213).
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from deeplimit._anatomy import anatomy
from deeplimit.errors import InputError
from deeplimit.memory import require
from deeplimit.network.blocks import parameter_groups
from deeplimit.network.cifar_resnet import CifarResNet
from deeplimit.network.classifiers import ResidualClassifier

Initialisation = Literal["independent", "smooth", "identical"]


def initialise(
    model: ResidualClassifier | CifarResNet, initialisation: Initialisation, length_scale: float
) -> None:
    """Gives a newly built network another start than the independent one that it has, in place.

    Stage by stage, among its alike blocks; stem, head and what stands between stages keep theirs.
    No random number is drawn. "independent" changes nothing.
    """
    for stack in anatomy(model).stacks:
        alike = stack.alike()
        blocks = () if alike is None else alike.blocks
        if initialisation == "smooth":
            smooth_start(blocks, length_scale)
        elif initialisation == "identical":
            identical_start(blocks)


@torch.no_grad()
def smooth_start(blocks: Iterable[nn.Module], length_scale: float) -> None:
    """Turns independently drawn blocks into samples of one Gaussian process in depth, in place.

    Of N blocks with independent θ_0 … θ_{N−1} block n, at the depth s_n = n/N, becomes

        θ(s_n) = Σ_m (K^{1/2})_{nm} θ_m,    K_{nm} = k(s_n, s_m) = exp(−(s_n − s_m)²/(2ℓ²)),

    with the symmetric square root. For draws of mean 0 and variance σ² each number has mean 0,
    variance σ² and covariance σ² k(s, s′) in depth; ‖θ_{n+1} − θ_n‖ is about ‖θ_n‖/(Nℓ) where Nℓ
    is well above 1. Numbers that are the same in all blocks (zero biases, norms' scales, a last
    layer that starts at 0) stay what they are, and so does everything that is no parameter. No
    random number is drawn: the blocks' own are mixed, so that the same seed gives the same stem and
    head with either start. The sum of other distributions than the normal tends to it as ℓ grows.

    Args:
        blocks: blocks whose parameters have the same names and shapes, such as a `ResidualChain`.
        length_scale: ℓ > 0 in units of the whole depth; within ℓ the controls stay alike.

    Raises:
        InputError: ℓ is not a positive number, or blocks that differ in names or shapes of their
            parameters, have no values (meta device), or values that are not finite.
    """
    if not (isinstance(length_scale, int | float) and 0 < length_scale < math.inf):
        raise InputError(
            f"the length scale is {length_scale!r}; expected a number above 0, in units of the "
            "whole depth, such as 0.5"
        )
    if not isinstance(blocks, Iterable):
        raise InputError(
            f"the blocks are a {type(blocks).__name__}; expected several, such as a ResidualChain"
        )
    blocks = tuple(blocks)
    root = _root_of_kernel(len(blocks), length_scale)
    for parameters in parameter_groups(blocks).values():
        own = torch.stack([p.detach() for p in parameters]).double()
        mixed = torch.tensordot(root.to(own.device), own, dims=1)
        constant = (own == own[0]).all(dim=0)
        for parameter, was, becomes in zip(parameters, own, mixed, strict=True):
            parameter.copy_(torch.where(constant, was, becomes))


@torch.no_grad()
def identical_start(blocks: Iterable[nn.Module]) -> None:
    """Gives every block the parameters of the first: θ_n = θ_0, each block with its own copy.

    Raises:
        InputError: as `smooth_start`.
    """
    for first, *others in parameter_groups(tuple(blocks)).values():
        for parameter in others:
            parameter.copy_(first)


def check_kernel(count: int) -> None:
    """Raises InputError where K, its eigenvectors and K^{1/2} of so many blocks do not fit."""
    what = f"the covariance of a smooth start in {count} layers does not fit into memory"
    require(4 * 8 * count**2, what, "give fewer layers or another start")


def _root_of_kernel(count: int, length_scale: float) -> Tensor:
    """K^{1/2} [N, N], float64.

    The kernel is singular to working precision: eigenvalues that rounding made negative are 0.
    """
    check_kernel(count)
    s = torch.arange(count, dtype=torch.float64) / max(count, 1)
    kernel = torch.exp(-((s[:, None] - s) ** 2) / (2 * length_scale**2))
    values, vectors = torch.linalg.eigh(kernel)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
