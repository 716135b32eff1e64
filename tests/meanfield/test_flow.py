"""The flow against a naive one in the particles themselves, and what it must not depend on."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from flow_networks import STATE, X, backward, chain, drawn, risk_of, split_depth, split_width
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from deeplimit.meanfield import ParticleFlow, particle_flow, slope
from deeplimit.network import (
    Architecture,
    ConvolutionalResidual,
    ResidualChain,
    TwoLayerResidual,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.8},
    "Adam": {"betas": (0.8, 0.95), "eps": 1e-3},
}
LR = {"plain": 0.3, "momentum": 0.1, "Adam": 0.02}


class Particles(nn.Module):
    """x + 1/(N·M_n) Σ_i u_i tanh(w_i·x + b_i): the particles are the parameters."""

    def __init__(self, model: ResidualChain) -> None:
        super().__init__()
        n = len(model)
        self.u = nn.ParameterList(
            b.outer.weight.detach().T * (n * b.inner.out_features * model.step) for b in model
        )
        self.w = nn.ParameterList(b.inner.weight.detach().clone() for b in model)
        self.b = nn.ParameterList(b.inner.bias.detach().clone() for b in model)

    def forward(self, x: Tensor) -> Tensor:
        for u, w, b in zip(self.u, self.w, self.b, strict=True):
            x = x + torch.tanh(x @ w.T + b) @ u / (len(self.u) * len(u))
        return x

    def masses(self) -> list[tuple[nn.Parameter, float]]:
        """Every parameter with N·M of its layer."""
        every = (*self.u, *self.w, *self.b)
        return [(p, float(len(self.u) * len(p))) for p in every]


def naive(name: str, model: Particles) -> Optimizer:
    """torch's own optimisers, for gradients that are multiplied by N·M beforehand."""
    if name == "Adam":
        return Adam(model.parameters(), lr=LR[name], **VARIANTS[name])
    return SGD(model.parameters(), lr=LR[name], **VARIANTS[name])


def gap(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("step", [0.25, 1.0, 0.07])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_particles_move_as_in_the_naive_flow(name: str, step: float) -> None:
    """ω ← ω − lr·N·M·∂L/∂ω in (u, w, b) themselves; layers of unequal widths, h ≠ 1/N too."""
    model = chain(4, [5, 2, 9, 5], step=step)
    reference = Particles(model)
    assert gap(reference(X), model(X)) < 1e-14
    flow, optimizer = particle_flow(model, LR[name], **VARIANTS[name]), naive(name, reference)
    start = risk = backward(model)
    for _ in range(30):
        risk = backward(model)
        flow.step()
        optimizer.zero_grad()
        risk_of(reference).backward()
        for p, mass in reference.masses():
            p.grad.mul_(mass)
        optimizer.step()
    assert risk < 0.8 * start
    mine = Particles(model)
    for p, q in zip(mine.parameters(), reference.parameters(), strict=True):
        assert gap(p, q) < 1e-11


def trajectory(model: nn.Module, name: str, steps: int = 40) -> Tensor:
    """Outputs after each step."""
    flow = particle_flow(model, LR[name], **VARIANTS[name])
    outputs = []
    for _ in range(steps):
        backward(model)
        flow.step()
        outputs.append(model(X).detach())
    return torch.stack(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_splitting_every_particle_in_two_changes_nothing(name: str) -> None:
    model = chain(4, 6)
    other = split_width(model)
    mine, split = trajectory(model, name), trajectory(other, name)
    assert float((mine[-1] - X).abs().max()) > 0.1
    assert gap(split, mine) < 1e-10
    for a, b in zip(model, other, strict=True):
        assert gap(b.inner.weight, a.inner.weight.repeat(2, 1)) < 1e-10
        assert gap(b.outer.weight, a.outer.weight.repeat(1, 2) / 2) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_another_step_for_the_same_measure_changes_nothing(name: str) -> None:
    """h and V with h·V fixed."""
    first = trajectory(chain(4, 6, step=0.25), name)
    assert gap(trajectory(chain(4, 6, step=3.0), name), first) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_doubling_the_depth_moves_the_trajectory_by_one_over_n(name: str) -> None:
    gaps = []
    for horizon in (8, 24):
        model = chain(horizon, 5)
        other = split_depth(model)
        gaps.append(gap(trajectory(other, name, 15), trajectory(model, name, 15)))
    assert math.log(gaps[1] / gaps[0]) / math.log(3) == pytest.approx(-1, abs=0.2)


def test_without_the_scaling_it_would_depend_on_the_width() -> None:
    """That the tests above would tell."""
    model = chain(4, 6)
    outputs = []
    for each in (model, split_width(model)):
        optimizer = SGD(each.parameters(), lr=0.3)
        for _ in range(40):
            backward(each)
            optimizer.step()
        outputs.append(each(X).detach())
    assert gap(outputs[1], outputs[0]) > 0.01


def test_the_risk_falls_by_the_square_of_the_slope() -> None:
    """dL/dt = −‖∇L‖²: one Euler step of size lr, extrapolated to lr = 0."""
    model = chain(4, [5, 2, 9, 5], step=0.6)
    risk = backward(model)
    expected = -(slope(model) ** 2)

    def fall(lr: float) -> float:
        other = copy.deepcopy(model)
        backward(other)
        particle_flow(other, lr).step()
        return (float(risk_of(other).detach()) - risk) / lr

    coarse, fine, finest = (fall(lr) for lr in (0.02, 0.01, 0.005))
    errors = [abs(f - expected) for f in (coarse, fine, finest)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)
    assert abs(2 * finest - fine - expected) < min(0.05 * errors[2], 1e-4 * abs(expected))


def test_the_risk_falls_at_every_small_step() -> None:
    model = chain(4, 6)
    flow = particle_flow(model, 0.2)
    risks = []
    for _ in range(50):
        risks.append(backward(model))
        flow.step()
    assert all(b < a for a, b in pairwise(risks))
    assert risks[-1] < 0.5 * risks[0]


def test_the_slope_is_the_one_of_the_particles() -> None:
    model = chain(4, [5, 2, 9, 5], step=0.6)
    backward(model)
    reference = Particles(model)
    risk_of(reference).backward()
    expected = sum(mass * float(p.grad.square().sum()) for p, mass in reference.masses())
    assert slope(model) ** 2 == pytest.approx(expected, rel=1e-12)
    assert slope(split_width_with_gradients(model)) == pytest.approx(slope(model), rel=1e-12)


def split_width_with_gradients(model: ResidualChain) -> ResidualChain:
    other = split_width(model)
    backward(other)
    return other


class Offset(TwoLayerResidual):
    """V σ(W x + b) + c."""

    def __init__(self, width: int) -> None:
        super().__init__(STATE, width, "tanh")
        self.outer = nn.Linear(width, STATE)


def classifier(others: float) -> tuple[nn.Module, ParticleFlow]:
    torch.manual_seed(0)
    a = Architecture("vector", (5,), 3, (4,), STATE, hidden=6, activation="tanh", step=0.5)
    model = a.build().double()
    for p in model.parameters():
        p.data.normal_()
    return model, particle_flow(model, 0.1, others=others)


def test_stem_and_head_take_an_ordinary_step() -> None:
    x, y = drawn(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for others in (1.0, 0.3, 0.0):
        model, flow = classifier(others)
        before = copy.deepcopy(model)
        nn.functional.cross_entropy(model(x), y).backward()
        slopes = slope(model, others=others), slope(model, others=0.0)
        flow.step()
        square = 0.0
        for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
            if "stages" in name:
                factor = 1 / (4 * 6 * 0.25) if "outer" in name else 24.0
            else:
                factor = others
                square += others * float(p.grad.square().sum())
            assert torch.allclose(p, q - 0.1 * factor * p.grad, rtol=1e-12, atol=1e-14), name
        assert slopes[0] ** 2 - slopes[1] ** 2 == pytest.approx(square, rel=1e-9, abs=1e-12)


def test_adam_moves_stem_and_head_by_its_own_rate() -> None:
    model, _ = classifier(1.0)
    flow = particle_flow(model, 0.1, betas=(0.9, 0.999), eps=1e-30, others=0.3)
    before = copy.deepcopy(model)
    nn.functional.cross_entropy(model(drawn(7, 5)), torch.tensor([0, 1, 2, 0, 1, 2, 0])).backward()
    flow.step()
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        lr = 0.1 if "stages" in name else 0.03
        lr /= 4 * 6 * 0.5 if "outer" in name else 1
        moved = p.grad.abs() > 1e-12
        assert torch.allclose((p - q).abs()[moved], torch.full_like(p, lr)[moved], rtol=1e-9), name


def test_a_bias_behind_the_particles_and_a_layer_that_is_used_twice() -> None:
    """c moves by −∂L/∂c/(N·h²), as a density N·h·c; a shared layer has twice the mass."""
    torch.manual_seed(1)
    shared, own = Offset(5).double(), Offset(5).double()
    model = ResidualChain([shared, own, shared], step=0.4)
    before = copy.deepcopy(model)
    backward(model)
    particle_flow(model, 0.1).step()
    for n, times in ((0, 2), (1, 1)):
        new, old = model[n], before[n]
        rates = {"outer.weight": 1 / (15 * 0.16), "outer.bias": 1 / (3 * 0.16), "inner.bias": 15.0}
        for name, rate in rates.items():
            p, q = new.get_parameter(name), old.get_parameter(name)
            moved = q - 0.1 * rate / times * p.grad
            assert torch.allclose(p, moved, rtol=1e-13, atol=1e-15), name


def test_a_channel_is_a_particle() -> None:
    """Splitting hidden channels in two changes nothing."""
    x, y = drawn(3, 2, 4, 4), drawn(3, 2, 4, 4, seed=5)
    narrow = ResidualChain(
        [ConvolutionalResidual(2, 3, "none", "tanh").double() for _ in range(3)], step=0.5
    )
    wide = ResidualChain([ConvolutionalResidual(2, 6, "none", "tanh").double() for _ in narrow])
    wide.step = narrow.step
    with torch.no_grad():
        for a, b in zip(narrow, wide, strict=True):
            b.conv1.weight.copy_(a.conv1.weight.repeat(2, 1, 1, 1))
            b.conv1.bias.copy_(a.conv1.bias.repeat(2))
            b.conv2.weight.copy_(a.conv2.weight.repeat(1, 2, 1, 1) / 2)
            b.conv2.bias.copy_(a.conv2.bias)
    outputs = []
    for model in (narrow, wide):
        flow = particle_flow(model, 0.05)
        for _ in range(20):
            flow.zero_grad()
            risk_of(model, x, y).backward()
            flow.step()
        outputs.append(model(x).detach())
    assert gap(outputs[1], outputs[0]) < 1e-10
    assert gap(outputs[0], x) > 0.1


GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 8}
LLAMA = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "max_position_embeddings": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_hidden_neuron_of_a_transformer_is_a_particle(family: str) -> None:
    """Split in two, also in a gated MLP and in layers that hold their weights transposed."""
    transformers = pytest.importorskip("transformers")
    tokens = torch.tensor([[1, 4, 2, 7], [3, 3, 9, 0]])

    def made(width: int) -> nn.Module:
        torch.manual_seed(0)
        if family == "GPT2":
            config = transformers.GPT2Config(**GPT2, n_inner=width)
            return transformers.GPT2LMHeadModel(config).double().eval()
        config = transformers.LlamaConfig(**LLAMA, intermediate_size=width)
        return transformers.LlamaForCausalLM(config).double().eval()

    narrow, wide = made(6), made(12)
    wide.load_state_dict(
        {
            name: _split(name, value, wide.state_dict()[name].shape)
            for name, value in narrow.state_dict().items()
        }
    )
    outputs = []
    for model in (narrow, wide):
        flow = particle_flow(model, 0.05, others=0.5)
        for _ in range(10):
            flow.zero_grad()
            logits = model(tokens, use_cache=False).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            flow.step()
        outputs.append(logits.detach())
    assert gap(outputs[1], outputs[0]) < 1e-10


def _split(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Twice along the axis that grew; half of what the MLP ends in."""
    axis = next((i for i, size in enumerate(shape) if size != value.shape[i]), None)
    if axis is None:
        return value
    ends = name.endswith(("c_proj.weight", "down_proj.weight"))
    return torch.cat([value, value], dim=axis) / (2 if ends else 1)


def test_state_schedulers_and_closure() -> None:
    """A run that is saved and resumed goes on as one that was not; the rate is one for all."""

    def made() -> tuple[ResidualChain, ParticleFlow, LambdaLR]:
        model = chain(3, 4)
        flow = particle_flow(model, 0.02, betas=(0.9, 0.99))
        return model, flow, LambdaLR(flow, lambda k: 0.9**k)

    def run(model: nn.Module, flow: ParticleFlow, scheduler: LambdaLR, steps: int) -> None:
        for _ in range(steps):
            risk = flow.step(lambda: _closure(model, flow))
            assert risk.requires_grad
            scheduler.step()

    model, flow, scheduler = made()
    run(model, flow, scheduler, 6)
    again, other, resumed = made()
    run(again, other, resumed, 3)
    saved = copy.deepcopy((again.state_dict(), other.state_dict(), resumed.state_dict()))
    third, last, rest = made()
    for part, state in zip((third, last, rest), saved, strict=True):
        part.load_state_dict(state)
    run(third, last, rest, 3)
    for p, q in zip(third.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert {group["lr"] for group in flow.param_groups} == {0.02 * 0.9**6}
    cosine = CosineAnnealingLR(particle_flow(chain(3, 4), 0.02), T_max=4, eta_min=0.01)
    assert isinstance(cosine.optimizer, Optimizer)


def _closure(model: nn.Module, flow: Optimizer) -> Tensor:
    flow.zero_grad()
    risk = risk_of(model)
    risk.backward()
    return risk


def test_frozen_parameters_stay() -> None:
    model = chain(3, 4)
    for block in model:
        block.inner.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    backward(model)
    particle_flow(model, 0.1).step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"{n}.outer.weight" for n in range(3)}
