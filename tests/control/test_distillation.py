"""Learning from a teacher: the objective and its gradient against a naive one, in float64."""

import copy

import pytest
import torch
from model_families import sample
from torch import Tensor, nn

from deeplimit.control import Distillation, SoftCrossEntropy, StageCost
from deeplimit.errors import InputError

FAMILY = "three stages, batch"
LOSS = SoftCrossEntropy(4, 0.1)


def naive(model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, w: float, tau: float, gamma):
    """The formula, sample by sample, with the probabilities written out."""
    cost, logits = StageCost(model, LOSS, gamma)(x, y)
    with torch.no_grad():
        taught = copy.deepcopy(teacher).eval()(x)
    total = torch.zeros((), dtype=torch.float64)
    for z, t in zip(logits, taught, strict=True):
        p, q = torch.exp(t / tau), torch.exp(z / tau)
        p, q = p / p.sum(), q / q.sum()
        total = total + (p * (p.log() - q.log())).sum()
    return (1 - w) * cost + w * tau**2 * total / len(y)


@pytest.mark.parametrize(("w", "tau", "gamma"), [(0.5, 2.0, 0.0), (0.9, 4.0, 0.3), (1.0, 1.0, 0.2)])
def test_value_and_gradient(w: float, tau: float, gamma: float) -> None:
    s, teacher = sample(FAMILY), sample(FAMILY, seed=5).model
    other = copy.deepcopy(s.model)
    by_hand = naive(other, teacher, s.x, s.y, w, tau, gamma)
    by_hand.backward()
    objective = Distillation(
        s.model, LOSS, teacher, teacher_weight=w, temperature=tau, weight=gamma
    )
    cost, logits = objective(s.x, s.y)
    cost.backward()
    assert cost.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert logits.shape == (6, 4)
    for p, q in zip(s.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("learns", [True, False])
def test_samples_without_a_label_teach_nothing(learns: bool) -> None:
    s, teacher = sample(FAMILY), sample(FAMILY, seed=5).model
    objective = Distillation(s.model.eval(), LOSS, teacher, learns=learns, weight=0.3).eval()
    some = s.y.clone()
    some[[1, 4]] = -100
    kept = some != -100
    assert objective(s.x, some)[0].item() == pytest.approx(
        objective(s.x[kept], s.y[kept])[0].item(), rel=1e-12
    )
    assert objective(s.x, torch.full_like(s.y, -100))[0].item() == 0


def test_without_weight_it_is_the_stage_cost() -> None:
    s, teacher = sample(FAMILY), sample(FAMILY, seed=5).model
    plain, _ = StageCost(copy.deepcopy(s.model), LOSS, 0.3)(s.x, s.y)
    cost, _ = Distillation(s.model, LOSS, teacher, teacher_weight=0.0, weight=0.3)(s.x, s.y)
    assert cost.item() == plain.item()


def test_a_teacher_that_agrees_costs_nothing() -> None:
    s = sample(FAMILY)
    s.model.eval()
    objective = Distillation(s.model, LOSS, s.model, teacher_weight=1.0)
    objective.eval()
    assert abs(objective(s.x, s.y)[0].item()) < 1e-14


def test_the_teacher_does_not_change() -> None:
    """Neither its parameters nor the running statistics of its norms, nor that of the one given."""
    s, teacher = sample(FAMILY), sample(FAMILY, seed=5).model
    before = copy.deepcopy(teacher.state_dict())
    objective = Distillation(s.model, LOSS, teacher).train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        objective(s.x, s.y)[0].backward()
        optimizer.step()
    assert teacher.training  # as it was given
    assert all(p.requires_grad for p in teacher.parameters())
    for state in (teacher.state_dict(), objective.teacher.state_dict()):
        assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher_weight": 1.5}, "teacher_weight is 1.5; expected a number from 0 to 1"),
        ({"teacher_weight": float("nan")}, "teacher_weight is nan"),
        ({"temperature": 0.0}, "temperature is 0; expected a number above 0"),
        ({"weight": -1.0}, "weight γ is -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], says: str) -> None:
    s = sample(FAMILY)
    with pytest.raises(InputError, match=says):
        Distillation(s.model, LOSS, s.model, **settings)


def test_a_teacher_of_other_classes() -> None:
    from deeplimit.network import CifarArchitecture, CifarResNet

    s = sample("CIFAR ResNet")
    teacher = CifarResNet(CifarArchitecture((1, 1, 1), classes=7)).double()
    with pytest.raises(InputError, match=r"teacher's logits have shape \(6, 7\).*\(6, 4\)"):
        Distillation(s.model, LOSS, teacher)(s.x, s.y)


def test_a_teacher_that_learns_minimises_its_own_loss_alone() -> None:
    s, teacher = sample(FAMILY), sample(FAMILY, seed=5).model
    other, alone = copy.deepcopy(s.model), copy.deepcopy(teacher).train()
    objective = Distillation(s.model, LOSS, teacher, learns=True, teacher_weight=0.7).train()
    cost, _ = objective(s.x, s.y)
    cost.backward()
    own, taught = StageCost(other.train(), LOSS, 0.0), alone(s.x)
    ours, logits = own(s.x, s.y)
    p = (taught.detach() / 2).softmax(-1)
    kl = (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    by_hand = 0.3 * ours + 0.7 * 4 * kl + LOSS(taught, s.y).mean()
    by_hand.backward()
    assert cost.item() == pytest.approx(by_hand.item(), rel=1e-12)
    for model, naive_model in ((s.model, other), (objective.teacher, alone)):
        for p, q in zip(model.parameters(), naive_model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in teacher.parameters())  # a copy learns
