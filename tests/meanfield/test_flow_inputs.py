"""What particle_flow and slope refuse: settings, networks and values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from flow_networks import backward, chain
from torch import Tensor, nn

from deeplimit import InputError
from deeplimit.meanfield import particle_flow, slope
from deeplimit.network import (
    ConvolutionalResidual,
    Heun,
    LinearResidual,
    ResidualChain,
    TwoLayerResidual,
)

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "lr 0": ({"lr": 0.0}, "lr is 0.0; expected a number above 0"),
    "lr < 0": ({"lr": -0.1}, "lr is -0.1"),
    "lr nan": ({"lr": math.nan}, "lr is nan"),
    "momentum": ({"lr": 0.1, "momentum": 1.0}, "momentum is 1.0; expected 0 ≤ momentum < 1"),
    "betas": ({"lr": 0.1, "betas": (0.9, 1.0)}, "betas are"),
    "eps infinite": ({"lr": 0.1, "eps": math.inf}, "eps is inf"),
    "both": ({"lr": 0.1, "betas": (0.9, 0.99), "momentum": 0.5}, "expected one of them"),
    "eps": ({"lr": 0.1, "eps": 0.0}, "eps is 0.0"),
    "others": ({"lr": 0.1, "others": -1.0}, "others is -1.0; expected a number ≥ 0"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_out_of_range(case: str) -> None:
    settings, message = SETTINGS[case]
    with pytest.raises(InputError, match=message):
        particle_flow(chain(2, 3), **settings)


class Coupled(TwoLayerResidual):
    """Its hidden neurons see one another, which output weights of zeros do not show."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__(size, hidden)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.inner(x))
        return self.outer(y - y.mean(-1, keepdim=True))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: ResidualChain([LinearResidual(3)]), "LinearResidual is not a mean of part"),
    "norms": (lambda: ResidualChain([ConvolutionalResidual(2, 3, "batch")]), "with norms is not a"),
    "group": (lambda: ResidualChain([ConvolutionalResidual(2, 3, "group")]), "with norms is not a"),
    "Heun": (
        lambda: ResidualChain([TwoLayerResidual(3, 4), TwoLayerResidual(3, 4)], scheme=Heun()),
        "Heun uses two neighbouring controls",
    ),
    "empty": (lambda: ResidualChain([]), "has no layers"),
    "unknown": (lambda: nn.Linear(3, 3), "no stack of blocks in Linear"),
    "coupled": (lambda: ResidualChain([Coupled(3, 4)]), "two halves of its neurons"),
    "frozen": (lambda: chain(2, 3).requires_grad_(False), "no parameter of this ResidualChain"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks_that_are_no_means_of_particles(case: str) -> None:
    make, message = NETWORKS[case]
    with pytest.raises(InputError, match=message):
        particle_flow(make(), 0.1)


def test_values_that_are_not_finite() -> None:
    model = chain(2, 3)
    with pytest.raises(InputError, match=r"no gradients; call loss\.backward"):
        slope(model)
    backward(model)
    model[0].inner.bias.grad[0] = math.inf
    with pytest.raises(InputError, match="gradients have numbers that are not finite"):
        slope(model)
    model[1].inner.bias.data[0] = math.nan
    with pytest.raises(InputError, match=r"1\.inner\.bias has numbers that are not finite"):
        particle_flow(model, 0.1)
