"""Optimisers carried along: the next step moves the output as it would have, to first order."""

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from smooth_networks import MAKERS, batch, folded, slope, smooth_chain
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from deeplimit import InputError
from deeplimit.ode import coarsen, refine, tie, untie
from deeplimit.ode.optimiser_state import RULES, Origin, carry_over

pytestmark = pytest.mark.slow

# With betas as small as these one step's gradient counts as much as the moments do.
OPTIMISERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"momentum": 0.5, "weight_decay": 0.03}),
    "SGD, Nesterov": (SGD, {"momentum": 0.8, "nesterov": True}),
    "Adam": (Adam, {"betas": (0.6, 0.7), "weight_decay": 0.03, "eps": 1e-3}),
    "AdamW": (AdamW, {"betas": (0.6, 0.7), "weight_decay": 2.0, "amsgrad": True}),
}
X, TARGET = batch(), batch(5)


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - TARGET).square().sum()


def step(model: nn.Module, optimizer: Optimizer) -> Tensor:
    """How far one step moves the output."""
    before = model(X).detach()
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    return model(X).detach() - before


def trained(kind: str, horizon: int, name: str, size: float = 1e-4) -> tuple[nn.Module, Optimizer]:
    """A network on a smooth curve after three steps; every depth moves by about as much.

    Gradients inside a block are O(1/N), and what the step is folded into moves by O(1/N).
    """
    model = MAKERS[kind](horizon)
    make, options = OPTIMISERS[name]
    inside, last = horizon if make is SGD else 1, 1 / horizon
    rates = {"": 1.0, "inner": 5.0 * inside, "outer": last if kind == "folded" else inside}
    groups: dict[str, list[nn.Parameter]] = {role: [] for role in rates}
    for key, p in model.named_parameters():
        groups[next((role for role in ("inner", "outer") if role in key), "")].append(p)
    optimizer = make(
        [{"params": own, "lr": size * rates[role]} for role, own in groups.items() if own],
        **options,
    )
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


@cache
def trained_once(kind: str, n: int, name: str) -> tuple[nn.Module, Optimizer, list[Tensor]]:
    """A network and its optimizer, not to be changed, and the effects of its next two steps."""
    model, optimizer = trained(kind, n, name)
    before = copy.deepcopy((model, optimizer))
    return *before, [step(model, optimizer) for _ in range(2)]


def difference(kind: str, n: int, name: str, change: Callable[..., nn.Module]) -> float:
    """Of two steps' effects, before and after a change of depth, relative."""
    *before, effect = trained_once(kind, n, name)
    model, optimizer = copy.deepcopy(before)
    new = change(model, optimizer=optimizer)
    after = [step(new, optimizer) for _ in range(2)]
    gaps = [float((a - b).norm() / a.norm()) for a, b in zip(effect, after, strict=True)]
    return max(gaps)


CHANGES: dict[str, Callable[..., nn.Module]] = {
    "refine": lambda model, **more: refine(model, 2, **more),
    "refine by 3": lambda model, **more: refine(model, 3, **more),
    "coarsen": lambda model, **more: coarsen(model, 2, **more),
    "tie": lambda model, **more: tie(model, 2, **more),
    "tie, then untie": lambda model, **more: untie(tie(model, 4, **more), **more),
}


FAR, NEAR = 8, 24  # layers


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("kind", MAKERS)
def test_after_refine_a_step_does_what_it_did(kind: str, name: str) -> None:
    gaps = [difference(kind, n, name, CHANGES["refine"]) for n in (FAR, NEAR)]
    assert gaps[1] < 0.05
    assert slope((FAR, NEAR), gaps) < -0.7


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", ["Euler", "folded"])
@pytest.mark.parametrize("change", [c for c in CHANGES if c != "refine"])
def test_after_other_changes_too(change: str, kind: str, name: str) -> None:
    gaps = [difference(kind, n, name, CHANGES[change]) for n in (FAR, NEAR)]
    assert gaps[1] < 0.08
    assert slope((FAR, NEAR), gaps) < -0.7


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("kind", MAKERS)
def test_without_rescaled_moments_it_would_not(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the tests above would tell."""
    cls = OPTIMISERS[name][0]
    moments = dict.fromkeys(RULES[cls].moments, 0)
    monkeypatch.setitem(RULES, cls, replace(RULES[cls], moments=moments))
    assert difference(kind, NEAR, name, CHANGES["refine"]) > 0.07


@pytest.mark.parametrize("kind", ["Euler", "folded"])
def test_without_rescaled_rates_it_would_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, SGD, replace(RULES[SGD], settings={}))
    assert difference(kind, NEAR, "SGD", CHANGES["refine"]) > 0.3


class Plain(nn.Module):
    """One parameter."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(value)


scales = st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(4)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cls=st.sampled_from([SGD, Adam, AdamW]),
    gamma=scales,
    rho=scales,
    decay=st.sampled_from([0.0, 0.3]),
    flag=st.booleans(),
    data=st.data(),
)
def test_scaled_parameters_move_by_the_scaled_update(
    cls: type[Optimizer], gamma: Fraction, rho: Fraction, decay: float, flag: bool, data: Any
) -> None:
    """Exactly, with gradients that are exactly γ times as large: θ' = ρθ stays so."""
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": decay, "maximize": flag}
    if cls is SGD:
        momentum = data.draw(st.sampled_from([0.0, 0.9]))
        nesterov = momentum > 0 and data.draw(st.booleans())
        options |= {"momentum": momentum, "nesterov": nesterov}
        options["dampening"] = 0.0 if nesterov else 0.2
    else:
        options |= {"amsgrad": data.draw(st.booleans()), "eps": 0.1}
        options |= {"decoupled_weight_decay": data.draw(st.booleans())} if cls is Adam else {}
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    old = Plain(torch.randn(5, generator=generator, dtype=torch.float64))
    optimizer = cls(old.parameters(), **options)
    for gradient in gradients[:4]:
        old.theta.grad = gradient.clone()
        optimizer.step()
    new = Plain(old.theta.detach() * float(rho))
    carried = cls([nn.Parameter(torch.zeros(1))], **options)
    carried.load_state_dict(optimizer.state_dict())
    carried.param_groups[0]["params"] = [old.theta]
    carried.state = optimizer.state.__class__(dict, {old.theta: dict(optimizer.state[old.theta])})
    origins = {new.theta: Origin(((old.theta, Fraction(1)),), gamma, rho)}
    carry_over(carried, old, new, origins)
    for gradient in gradients[4:]:
        old.theta.grad, new.theta.grad = gradient.clone(), gradient * float(gamma)
        optimizer.step()
        carried.step()
        assert torch.allclose(new.theta, old.theta * float(rho), rtol=1e-12, atol=1e-13)


def test_what_becomes_of_groups_and_state() -> None:
    """By hand, of an Euler chain that is refined by 2, and back."""
    model = smooth_chain(4)
    guest = nn.Parameter(torch.ones(2, dtype=torch.float64))
    first = list(model[0].parameters())
    rest = [p for block in model[1:] for p in block.parameters()]
    optimizer = SGD(
        [{"params": [*first, guest]}, {"params": rest, "lr": 0.5, "weight_decay": 0.2}],
        lr=0.1,
        momentum=0.9,
    )
    LambdaLR(optimizer, lambda _: 0.5)
    loss_of(model).backward()
    guest.grad = torch.ones_like(guest)
    optimizer.step()
    buffers = [optimizer.state[block.inner.weight]["momentum_buffer"] for block in model]
    kept = optimizer.state[guest]["momentum_buffer"]
    fine = refine(model, 2, optimizer=optimizer)
    groups = optimizer.param_groups
    held = {p: group for group in groups for p in group["params"]}
    assert len(held) == 1 + len(list(fine.parameters())) == sum(len(g["params"]) for g in groups)
    assert set(optimizer.state) == set(held)
    for k, block in enumerate(fine):
        for p in block.parameters():
            # Twice what the schedule made of 0.1 and 0.5; what the next one starts from, too.
            assert held[p]["lr"] == pytest.approx(0.1 if k < 2 else 0.5)
            assert held[p]["initial_lr"] == pytest.approx(0.2 if k < 2 else 1.0)
            assert held[p]["weight_decay"] == (0 if k < 2 else 0.1)
        n, odd = divmod(k, 2)
        right = buffers[min(n + odd, 3)]
        expected = (buffers[n] + right) / 2 / 2
        mine = optimizer.state[block.inner.weight]["momentum_buffer"]
        assert torch.allclose(mine, expected, rtol=1e-14)
    assert (held[guest]["lr"], held[guest]["weight_decay"]) == (0.05, 0)
    assert optimizer.state[guest]["momentum_buffer"] is kept
    back = coarsen(fine, 2, optimizer=optimizer)
    held = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert set(optimizer.state) == set(held) == {*back.parameters(), guest}
    for n, block in enumerate(back):
        assert torch.equal(optimizer.state[block.inner.weight]["momentum_buffer"], buffers[n])
        assert held[block.inner.weight]["lr"] == pytest.approx(0.05 if n == 0 else 0.25)
        assert held[block.inner.weight]["weight_decay"] == (0 if n == 0 else 0.2)


def test_what_is_outside_the_stages_keeps_its_state() -> None:
    model, optimizer = trained("folded", 4, "AdamW")
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    fine = refine(model, 2, optimizer=optimizer)
    for name in ("stem.weight", "head.bias"):
        mine = optimizer.state[fine.get_parameter(name)]
        assert list(mine) == list(before[name])
        assert all(torch.equal(mine[key], value) for key, value in before[name].items())
    inner, outer = (optimizer.state[fine.blocks[2].get_parameter(f"{n}.bias")] for n in NAMES)
    old = [before[f"blocks.1.{name}.bias"] for name in NAMES]
    assert torch.equal(inner["exp_avg"], old[0]["exp_avg"] / 2)
    assert torch.equal(inner["exp_avg_sq"], old[0]["exp_avg_sq"] / 4)
    assert torch.equal(inner["max_exp_avg_sq"], old[0]["max_exp_avg_sq"] / 4)
    assert torch.equal(outer["exp_avg"], old[1]["exp_avg"])
    assert float(inner["step"]) == float(outer["step"]) == 3
    assert inner["step"] is not outer["step"]


NAMES = ("inner", "outer")


def test_names_and_what_was_never_stepped() -> None:
    """Groups with names have the new ones; frozen layers have no state, and get none."""
    model = folded(4)
    for p in model.blocks[1].parameters():
        p.requires_grad_(False)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    step(model, optimizer)
    fine = refine(model, 2, optimizer=optimizer)
    called = {name: p for g in optimizer.param_groups for name, p in zip(*columns(g), strict=True)}
    assert called == dict(fine.named_parameters())
    stateless = {
        n for n, block in enumerate(fine.blocks) if block.inner.bias not in optimizer.state
    }
    assert stateless == {1, 2, 3}  # 1 and 3 lie between a frozen layer and another
    assert torch.isfinite(step(fine, optimizer)).all()


def columns(group: dict[str, Any]) -> tuple[list[str], list[nn.Parameter]]:
    return group["param_names"], group["params"]


def test_optimisers_that_are_refused_stay_as_they_are() -> None:
    model = smooth_chain(4)
    with pytest.raises(InputError, match="the optimizer is RMSprop, whose state"):
        refine(model, 2, optimizer=RMSprop(model.parameters()))

    class Own(SGD):
        pass

    with pytest.raises(InputError, match="give SGD, Adam or AdamW"):
        untie(model, optimizer=Own(model.parameters()))
    for change in CHANGES.values():
        with pytest.raises(InputError, match="holds no parameter of this ResidualChain"):
            change(model, optimizer=Adam(smooth_chain(4).parameters()))
    optimizer = SGD(model.parameters(), momentum=0.9)
    step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError):
        coarsen(model, 3, optimizer=optimizer)
    assert str(optimizer.state_dict()) == str(before)


class Head(nn.Module):
    """Its parameters have the names and shapes of a block's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).relu())[:, :3]


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).tanh())


@pytest.mark.parametrize("change", [refine, coarsen])
def test_what_follows_the_blocks_of_a_sequential_keeps_its_own_moments(change: Any) -> None:
    """Its names are others in the new model, and in the old one they are a block's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), *(Added() for _ in range(4)), Head())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    expected = [optimizer.state[p]["exp_avg"].clone() for p in model[-1].parameters()]
    new = change(model, 2, optimizer=optimizer)
    *_, head = new.children()
    for parameter, moment in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], moment, rtol=0, atol=0)
    new(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
