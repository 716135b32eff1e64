"""Residual functions: their formulas, when they vanish, and what their control is."""

import pytest
import torch
import torch.nn.functional as F
from model_families import shaken
from torch import Tensor, nn

from deeplimit import InputError
from deeplimit._anatomy.chain import control
from deeplimit.network import ConvolutionalResidual, LinearResidual, TwoLayerResidual
from deeplimit.network.blocks import ACTIVATIONS, NORMS, rescale_last_layer

BLOCKS = {
    "linear": lambda: (LinearResidual(5), (8, 5)),
    **{
        f"two-layer, {name}": lambda name=name: (TwoLayerResidual(5, 7, name), (8, 5))
        for name in ACTIVATIONS
    },
    **{
        f"convolutional, {name}": lambda name=name: (
            ConvolutionalResidual(4, 6, name),
            (8, 4, 5, 5),
        )
        for name in NORMS
    },
}
LAST = {"linear": ["weight"], "two-layer": ["outer.weight"]}
LAST_CONVOLUTIONAL = {
    "batch": ["norm2.weight", "norm2.bias"],
    "group": ["norm2.weight", "norm2.bias"],
    "none": ["conv2.weight", "conv2.bias"],
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    module, shape = BLOCKS[request.param]()
    generator = torch.Generator().manual_seed(5)
    return request.param, shaken(module), torch.randn(shape, generator=generator).double()


@pytest.mark.parametrize("training", [True, False])
def test_phi_vanishes_with_the_last_layers_parameters(
    block: tuple[str, nn.Module, Tensor], training: bool
) -> None:
    name, phi, x = block
    kind, _, detail = name.partition(", ")
    phi.train(training)
    assert phi(x).abs().max() > 1e-2
    parameters = dict(phi.named_parameters())
    with torch.no_grad():
        for last in LAST.get(kind) or LAST_CONVOLUTIONAL[detail]:
            parameters[last].zero_()
    assert torch.count_nonzero(phi(x)) == 0


@pytest.mark.parametrize("training", [True, False])
def test_rescaling_the_last_layer_multiplies_phi(
    block: tuple[str, nn.Module, Tensor], training: bool
) -> None:
    _, phi, x = block
    phi.train(training)
    before = phi(x)
    rescale_last_layer(phi, -0.5)
    assert torch.allclose(phi(x), -0.5 * before, rtol=1e-12, atol=1e-13)
    rescale_last_layer(phi, 0.0)
    assert torch.count_nonzero(phi(x)) == 0


def test_two_layer_is_a_sum_over_particles() -> None:
    torch.manual_seed(0)
    phi = TwoLayerResidual(3, 5, "tanh").double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    particles = zip(phi.outer.weight.T, phi.inner.weight, phi.inner.bias, strict=True)
    naive = sum(torch.tanh(x @ w + b)[..., None] * v for v, w, b in particles)
    assert torch.allclose(phi(x), naive, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_convolutional_is_its_formula(norm: str) -> None:
    phi = shaken(ConvolutionalResidual(4, 8, norm, "gelu")).eval()
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).double()

    def normalise(layer: nn.Module, groups: int, x: Tensor) -> Tensor:
        if norm == "none":
            return x
        if norm == "batch":
            mean, var = layer.running_mean[:, None, None], layer.running_var[:, None, None]
        else:
            parts = x.reshape(len(x), groups, -1)
            mean, var = parts.mean(-1), parts.var(-1, correction=0)
            mean, var = (
                v.repeat_interleave(x.shape[1] // groups, 1)[..., None, None] for v in (mean, var)
            )
        x = (x - mean) / torch.sqrt(var + 1e-5)
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    y = F.gelu(normalise(phi.norm1, 8, F.conv2d(x, phi.conv1.weight, phi.conv1.bias, padding=1)))
    y = normalise(phi.norm2, 4, F.conv2d(y, phi.conv2.weight, phi.conv2.bias, padding=1))
    assert torch.allclose(phi(x), y, rtol=1e-12, atol=1e-12)


def _named(block: nn.Module) -> list[str]:
    names = {id(p): name for name, p in block.named_parameters()}
    return [names[id(p)] for p in control(block)]


def test_the_control_is_all_parameters_without_a_norm_and_the_last_norm_with_one() -> None:
    assert _named(LinearResidual(3)) == ["weight"]
    assert _named(TwoLayerResidual(3, 4)) == ["inner.weight", "inner.bias", "outer.weight"]
    assert _named(ConvolutionalResidual(4, 4, "none")) == [
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
        "conv2.bias",
    ]
    for norm in ("batch", "group"):
        assert _named(ConvolutionalResidual(4, 4, norm)) == ["norm2.weight", "norm2.bias"]
    instance = nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True))
    assert _named(instance) == ["1.weight", "1.bias"]


FOREIGN = {
    "norm first": lambda: nn.Sequential(
        nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)
    ),
    "norm in the middle": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)
    ),
    "norm last": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.RMSNorm(4)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_phi_vanishes_with_its_control_in_other_peoples_blocks(name: str) -> None:
    phi = shaken(FOREIGN[name]())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in control(phi):
            parameter.zero_()
    assert torch.count_nonzero(phi(x)) == 0


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_control_is_undone_by_a_norm(name: str) -> None:
    """A cost on anything else would be no control cost: φ does not see its scale."""
    phi = shaken(FOREIGN[name]())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    before = phi(x)
    own = {id(p) for p in control(phi)}
    rest = [p for p in phi.parameters() if id(p) not in own]
    with torch.no_grad():
        # The two layers before a last norm are one function of the outer one's scale.
        for parameter in rest[-2:]:
            parameter.mul_(1e3)
    assert torch.allclose(phi(x), before, rtol=1e-3, atol=1e-4)
    assert bool(rest) == (name != "norm first")


@pytest.mark.parametrize(
    ("build", "given", "known"),
    [
        (lambda: TwoLayerResidual(3, 4, "relo"), "relo", "relu"),
        (lambda: ConvolutionalResidual(3, 4, "layer"), "layer", "group"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(build, given: str, known: str) -> None:
    with pytest.raises(InputError, match=f"{given}.*{known}"):
        build()
