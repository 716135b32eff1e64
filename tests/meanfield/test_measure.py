"""LayerwiseMeasure: particles by hand, the network back, order and weights, what is refused."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_networks import NETWORKS, classifier, inputs, output, relative
from model_families import shaken
from torch import Tensor, nn

from deeplimit import Heun, InputError, ResidualChain, use_adjoint
from deeplimit.meanfield import LayerwiseMeasure
from deeplimit.network import LinearResidual, TwoLayerResidual, load, save


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_comes_back(name: str) -> None:
    model = NETWORKS[name]().eval()
    x = inputs(model)
    back = LayerwiseMeasure.of(model).network()
    assert relative(output(back, x), output(model, x)) < 1e-12
    assert back.state_dict().keys() == model.state_dict().keys() or "user" in name
    assert getattr(back, "architecture", None) == getattr(model, "architecture", None)


def test_particles_are_scaled_as_a_mean_over_depth_and_width() -> None:
    """x + Δ Σ_i u_i σ(w_i x + b_i) / M, written out, with u = N M h V."""
    model = NETWORKS["chain"]()
    particles = LayerwiseMeasure.of(model).particles
    assert particles.shape == (3, 6, 9)
    for n, block in enumerate(model):
        expected = 3 * 6 * 0.3 * block.outer.weight.T
        assert torch.allclose(particles[n, :, :4], expected, rtol=1e-15)
        assert torch.equal(particles[n, :, 4:8], block.inner.weight)
        assert torch.equal(particles[n, :, 8], block.inner.bias)
    x = inputs(model)
    state = x
    for layer in particles:
        u, w, b = layer.split([4, 4, 1], dim=1)
        state = state + (state @ w.T + b.T).relu() @ u / 6 / 3
    assert relative(state, output(model, x)) < 1e-13


def test_stages_divide_depth_evenly() -> None:
    measure = LayerwiseMeasure.of(NETWORKS["convolutional, two stages"]())
    assert measure.breakpoints == (0.0, 0.5, 0.75, 1.0)
    chain = NETWORKS["convolutional, two stages"]().stages[0]
    u = chain[0].conv2.weight.transpose(0, 1).flatten(1) * (4 * chain.step / 0.5)
    assert torch.allclose(measure.layers[0][:, : 4 * 9], u, rtol=1e-15)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 10**6))
def test_the_order_of_particles_does_not_matter(name: str, seed: int) -> None:
    model = NETWORKS[name]().eval()
    measure = LayerwiseMeasure.of(model)
    generator = torch.Generator().manual_seed(seed)
    mixed = [layer[torch.randperm(len(layer), generator=generator)] for layer in measure.layers]
    other = LayerwiseMeasure(mixed, breakpoints=measure.breakpoints, frame=measure.frame)
    x = inputs(model, seed)
    assert relative(output(other.network(), x), output(model, x)) < 1e-12


def test_weights_breakpoints_and_widths_are_folded_into_the_network() -> None:
    frame = NETWORKS["chain"]()
    generator = torch.Generator().manual_seed(3)
    layers = [torch.randn(m, 9, generator=generator, dtype=torch.float64) for m in (2, 5)]
    masses = [
        torch.tensor(mass, dtype=torch.float64)
        for mass in ([0.25, 0.75], [0.1, 0.2, 0.0, 0.3, 0.4])
    ]
    grid = (0.0, 0.3, 1.0)
    measure = LayerwiseMeasure(layers, masses, grid, frame=frame)
    network = measure.network()
    x = state = inputs(frame)
    for layer, mass, length in zip(layers, masses, (0.3, 0.7), strict=True):
        u, w, b = layer.split([4, 4, 1], dim=1)
        state = state + length * (state @ w.T + b.T).relu() @ (mass[:, None] * u)
    assert relative(output(network, x), state) < 1e-13
    assert [len(block.inner.bias) for block in network] == [5, 5]
    again = LayerwiseMeasure.of(network).network()
    assert relative(output(again, x), state) < 1e-13


def test_a_network_of_another_width_is_saved_and_loaded(tmp_path) -> None:
    model = classifier("convolutional", depths=(1, 2))
    measure = LayerwiseMeasure.of(model)
    wider = [torch.cat([layer, layer]) for layer in measure.layers]
    network = LayerwiseMeasure(wider, breakpoints=measure.breakpoints, frame=model).network()
    assert network.architecture.hidden == 12
    save(network.float(), tmp_path / "wide.safetensors")
    x = inputs(model).float()
    assert torch.equal(output(load(tmp_path / "wide.safetensors").eval(), x), output(network, x))


def test_batch_norms_are_read_as_in_evaluation_mode() -> None:
    model = NETWORKS["convolutional, batch norms"]()
    x = inputs(model)
    expected = output(model, x)
    back = LayerwiseMeasure.of(model.train()).network()
    assert back.training
    assert relative(output(back.eval(), x), expected) < 1e-12
    mine, its = (network.stages[0][0].norm1 for network in (model, back))
    assert relative(its.weight, mine.weight.abs()) < 1e-12
    assert relative(its.running_var, mine.running_var) < 1e-12
    assert relative(output(back.train(), x), output(model, x)) < 1e-12


def test_norms_are_of_as_many_particles() -> None:
    measure = LayerwiseMeasure.of(NETWORKS["convolutional, batch norms"]())
    with pytest.raises(InputError, match=r"norms of \[6, 6, 12\] particles given for \[3, 3, 3\]"):
        LayerwiseMeasure(
            [layer[:3] for layer in measure.layers], frame=measure.frame, norms=measure.norms
        )


@torch.no_grad()
def test_a_channel_of_scale_zero_is_a_constant() -> None:
    model = NETWORKS["convolutional, batch norms"]()
    for norm in (model.stages[0][0].norm1, model.stages[0][1].norm2):
        norm.weight[:2] = 0
    x = inputs(model)
    back = LayerwiseMeasure.of(model).network()
    assert relative(output(back, x), output(model, x)) < 1e-12
    assert relative(output(back.train(), x), output(model.train(), x)) < 1e-12


def test_the_measure_is_independent_of_the_model() -> None:
    model = classifier()
    before = copy.deepcopy(model)
    measure = LayerwiseMeasure.of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    x = inputs(model)
    assert relative(output(measure.network(), x), output(before, x)) < 1e-12
    one, other = measure.network(), measure.network()
    ids = {id(p) for p in one.parameters()}
    assert not any(id(p) in ids for p in other.parameters())
    assert all(p.requires_grad for p in one.parameters())


def test_a_model_with_the_adjoint_is_read() -> None:
    model = classifier()
    x = inputs(model)
    expected = output(model, x)
    back = LayerwiseMeasure.of(use_adjoint(model)).network()
    assert relative(output(back, x), expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_output_weights_of_zeros_are_read(name: str, dtype: torch.dtype) -> None:
    model = NETWORKS[name]().to(dtype).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if any(last in key for last in ("outer", "conv2", ".2.weight")):
                value.zero_()
    before = copy.deepcopy(model.state_dict())
    x = inputs(model).to(dtype)
    back = LayerwiseMeasure.of(model).network()
    assert relative(output(back, x), output(model, x)) < 100 * torch.finfo(dtype).eps
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Normed(TwoLayerResidual):
    """Its hidden neurons see one another."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.inner(x))
        return self.outer(y - y.mean(-1, keepdim=True))


@torch.no_grad()
def silent(model: nn.Module) -> nn.Module:
    """With output weights of zeros, a common start: as it is, a sum of neurons whatever it does."""
    for block in model:
        block.outer.weight.zero_()
    return model


class WithNorm(TwoLayerResidual):
    """It has parameters that belong to no particle."""

    def __init__(self) -> None:
        super().__init__(4, 5)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def user_block(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), *more)


def diverged() -> nn.Module:
    model = classifier()
    model.stages[0][1].inner.weight.data[0, 0] = math.nan
    return model


def learned() -> nn.Module:
    block = TwoLayerResidual(4, 5)
    block.activation = nn.PReLU()
    return ResidualChain([block])


NO_MEASURE = {
    "linear": (lambda: ResidualChain([LinearResidual(4)]), "LinearResidual is not a mean"),
    "group norm": (lambda: classifier("convolutional", norm="group"), "GroupNorm, which couples"),
    "Heun": (
        lambda: ResidualChain([TwoLayerResidual(4, 5) for _ in range(3)], scheme=Heun()),
        "two neighbouring controls",
    ),
    "coupled": (lambda: shaken(ResidualChain([Normed(4, 5)])), "two halves of its neurons"),
    "coupled, silent": (
        lambda: silent(ResidualChain([Normed(4, 5)]).double()),
        "two halves of its neurons",
    ),
    "coupled, silent, float32": (
        lambda: silent(ResidualChain([Normed(4, 5)])),
        "two halves of its neurons",
    ),
    "coupled behind others": (
        lambda: shaken(ResidualChain([user_block(), user_block(nn.Tanh())])),
        "two halves of its neurons",
    ),
    "norm besides": (lambda: shaken(ResidualChain([WithNorm()])), "norm.weight, norm.bias"),
    "not finite": (diverged, r"stages\.0\.1\.inner\.weight .* not finite"),
    "learned activation": (learned, "PReLU has parameters"),
    "no layers": (lambda: ResidualChain([]), "no layers"),
    "no residual network": (lambda: nn.Linear(3, 3), "Linear"),
    "meta": (lambda: classifier().to("meta"), "meta device"),
}


@pytest.mark.parametrize("name", NO_MEASURE)
def test_networks_that_are_no_mean_of_particles(name: str) -> None:
    make, message = NO_MEASURE[name]
    with pytest.raises(InputError, match=message):
        LayerwiseMeasure.of(make())


GOOD = torch.ones(2, 3, 9, dtype=torch.float64)
WRONG = {
    "flat": ({"particles": torch.ones(2, 3)}, r"shape \[3\]"),
    "whole": ({"particles": torch.ones(2, 3, 9, dtype=torch.long)}, "int64"),
    "nothing": ({"particles": []}, "no layers"),
    "infinite": ({"particles": GOOD / 0}, "not finite"),
    "negative": ({"weights": torch.tensor([[2, -1, 0], [1, 0, 0]]).double()}, "layer 0: weights"),
    "sum": ({"weights": torch.full((2, 3), 0.5).double()}, "of sum 1.5"),
    "weights' shape": ({"weights": torch.ones(2, 1).double()}, "for 3 particles"),
    "weights' number": ({"weights": torch.ones(1, 3).double() / 3}, "of 1 layers given for 2"),
    "breakpoints' number": ({"breakpoints": (0.0, 1.0)}, "2 breakpoints given for 2 layers"),
    "falling": ({"breakpoints": (0.0, 1.0, 1.0)}, "expected 0 = s_0"),
    "NaN": ({"breakpoints": (0.0, math.nan, 1.0)}, "expected 0 = s_0"),
    "another size": ({"frame": classifier(width=3)}, "9 numbers given, .* 7 numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_measures(name: str) -> None:
    given, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        LayerwiseMeasure(**({"particles": GOOD} | given))


def test_without_a_frame_there_is_no_network() -> None:
    with pytest.raises(InputError, match="frame=model"):
        LayerwiseMeasure(GOOD).network()


@pytest.mark.slow
def test_half_precision_is_read_in_full() -> None:
    """u = N M h V is beyond what float16 holds where V is not."""
    torch.manual_seed(0)
    wide = ResidualChain([TwoLayerResidual(3, 4000) for _ in range(20)], step=1.0)
    with torch.no_grad():
        for block in wide:
            block.outer.weight.mul_(100)
    half = copy.deepcopy(wide).half()
    largest = max(float(block.outer.weight.abs().max()) for block in half)
    assert largest * 20 * 4000 > torch.finfo(torch.float16).max
    measure = LayerwiseMeasure.of(half)
    assert measure.layers[0].dtype == torch.float32
    full = LayerwiseMeasure.of(half.float())
    for mine, theirs in zip(measure.layers, full.layers, strict=True):
        assert torch.equal(mine, theirs)
    back = LayerwiseMeasure.of(copy.deepcopy(wide).half()).network()
    for name, value in copy.deepcopy(wide).half().state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_in_half_precision_too_a_block_must_be_a_sum() -> None:
    class Product(TwoLayerResidual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.2 + 0.05 * super().forward(x).square()

    chain = ResidualChain([Product(3, 8) for _ in range(2)]).bfloat16()
    with pytest.raises(InputError, match="is not a mean of particles: two halves"):
        LayerwiseMeasure.of(chain)
