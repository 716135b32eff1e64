"""Networks whose gap to the Neural ODE is measured, and what holds of every gap."""

import torch
from model_families import shaken
from torch import Tensor, nn

from deeplimit.network import (
    Architecture,
    CifarArchitecture,
    CifarResNet,
    Heun,
    ResidualChain,
    TwoLayerResidual,
)
from deeplimit.ode import DiscretizationGap

IMAGE = (3, 8, 8)


def images(count: int = 2, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


def classifier(norm: str = "batch", scheme: str = "euler") -> nn.Module:
    """Three stages of 1, 4 and 2 steps; figures in the norms that differ from layer to layer."""
    architecture = Architecture(
        "convolutional", IMAGE, 3, (1, 4, 2), 4, 5, "gelu", norm, 0.25, scheme, reduction=1
    )
    return shaken(architecture.build()).eval()


def cifar() -> nn.Module:
    return shaken(CifarResNet(CifarArchitecture((3, 1, 1), classes=3))).eval()


def rough_chain(horizon: int = 5, scheme: Heun | None = None) -> ResidualChain:
    """Independent controls of order one, h = 1: hard for a solver, far from its limit."""
    torch.manual_seed(3)
    blocks = [
        TwoLayerResidual(3, 6, "tanh").double() for _ in range(horizon + (scheme is not None))
    ]
    with torch.no_grad():
        for block in blocks:
            for p in block.parameters():
                p.normal_()
    return ResidualChain(blocks, step=1.0, scheme=scheme)


def assert_bounds_hold(found: DiscretizationGap) -> None:
    rounding = found.solver_error + 1e-12 * max(found.state_norm)
    for gap, integral, bound in zip(found.gap, found.integral_bound, found.bound, strict=True):
        assert gap <= integral + rounding
        assert integral <= bound * (1 + 1e-9)
    assert found.gap[0] == found.integral_bound[0] == found.bound[0] == 0
    assert max(found.gap) > 0
