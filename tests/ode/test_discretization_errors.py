"""What has no gap: one clear line each."""

import re
from collections.abc import Callable

import pytest
import torch
from gap_models import cifar, classifier, images
from smooth_networks import batch, smooth_chain
from text_families import padded, text_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from deeplimit.errors import InputError, RunError
from deeplimit.network import LinearResidual, ResidualChain, TwoLayerResidual
from deeplimit.ode import discretization_gap, solvers

pytestmark = pytest.mark.slow


class Dropped(nn.Linear):
    """As transformers' attention does it: a rate, and no module of its own."""

    attention_dropout = 0.5

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.attention_dropout = 0.1


class Counting(nn.Linear):
    """A buffer that there is nothing between."""

    def __init__(self, number: int) -> None:
        super().__init__(3, 3)
        self.register_buffer("number", torch.tensor(number))


class Squared(nn.Module):
    """φ = x²: leaves every bound at s = 1/x_0."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Noise(nn.Module):
    """φ of a given size that no step size resolves."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.size * (1e20 * x).cos()


def chain(*blocks: nn.Module, step: float = 0.5) -> ResidualChain:
    return ResidualChain(blocks, step=step)


def infinite() -> nn.Module:
    model = smooth_chain(3)
    with torch.no_grad():
        model[1].outer.weight.fill_(torch.inf)
    return model


X = batch()
WRONG: dict[str, tuple[Callable[[], nn.Module], object, dict, str]] = {
    "one layer": (lambda: chain(nn.Linear(3, 3)), X, {}, "no stage of two layers or more"),
    "other shapes": (
        lambda: chain(TwoLayerResidual(3, 4), TwoLayerResidual(3, 5)),
        X,
        {},
        "same shapes of parameters",
    ),
    "another activation": (
        lambda: chain(*(TwoLayerResidual(3, 4, a) for a in ("relu", "tanh", "tanh"))),
        X,
        {},
        "layer 1 is not what the first of stage 0 is with its parameters",
    ),
    "layers of two kinds": (
        lambda: text_model("Gemma2ForCausalLM"),
        padded(),
        {},
        "layer 1 is not what the first of stage 0 is",
    ),
    "weight norm": (
        lambda: chain(*(nn.Sequential(weight_norm(nn.Linear(3, 3))) for _ in range(2))),
        X,
        {},
        "no bound for blocks of class Sequential: .*Give bound=False for the gap alone",
    ),
    "other counts": (
        lambda: chain(Counting(1), Counting(2)),
        X,
        {},
        "the buffer 'number' holds torch.int64 that differ from block to block",
    ),
    "batch norm": (
        lambda: classifier().train(),
        images(),
        {},
        "in training mode: it normalises by the batch.*call model.eval() first",
    ),
    "batch norm without statistics": (
        lambda: chain(*(nn.BatchNorm1d(3, track_running_stats=False).eval() for _ in range(2))),
        X,
        {},
        "keeps no running statistics",
    ),
    "dropout": (
        lambda: chain(*(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)) for _ in range(2))),
        X,
        {},
        "'0.1' (Dropout) drops at random in training mode.*call model.eval() first",
    ),
    "dropout of attention": (
        lambda: chain(Dropped(), Dropped()),
        X,
        {},
        "'0' (Dropped) drops at random in training mode",
    ),
    "NaN in the input": (lambda: smooth_chain(3), X * torch.nan, {}, "state 0 of stage 0 is not"),
    "infinite weights": (infinite, X, {}, "state 2 of stage 0 is not finite"),
    "stage": (
        classifier,
        images(),
        {"stage": 0},
        "stage 0 given; the stages of ResidualClassifier with two alike layers or more are 1, 2",
    ),
    "width": (
        lambda: smooth_chain(3),
        batch(width=5),
        {},
        "ResidualChain does not run on x, a tensor of shape [6, 5]",
    ),
    "images of another size": (cifar, images()[:, :2], {}, "CifarResNet does not run on x"),
    "names": (
        lambda: text_model("GPT2LMHeadModel"),
        {"words": padded()["input_ids"]},
        {},
        "GPT2LMHeadModel does not run on x, words of shape [3, 7]",
    ),
    "no sample": (lambda: smooth_chain(3), X[:0], {}, "expected [samples, …] with at least one"),
    "no batch": (lambda: smooth_chain(3), X[0], {}, "the states have shape [3]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(what: str):
    make, x, settings, message = WRONG[what]
    with pytest.raises(InputError, match=re.escape(message).replace(r"\.\*", ".*")) as error:
        discretization_gap(make(), x, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_evaluation_mode_is_not_asked_for_where_it_makes_no_difference():
    model = smooth_chain(3)
    assert model.training
    assert discretization_gap(model, X) == discretization_gap(smooth_chain(3).eval(), X)
    normed = chain(*(nn.Sequential(weight_norm(nn.Linear(3, 3))) for _ in range(2)))
    assert max(discretization_gap(normed, X, bound=False).gap) > 0
    dropping = chain(*(nn.Sequential(LinearResidual(3), nn.Dropout(0.0)) for _ in range(2)))
    assert max(discretization_gap(dropping, X).gap) > 0


def test_a_solution_that_leaves_every_bound():
    message = r"dopri5 stopped between layers 0 and 1.*smaller step h"
    with pytest.raises(RunError, match=message) as e:
        discretization_gap(chain(Squared(), Squared(), step=2.0), torch.ones(1, 1))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("size", "message"),
    [(1e-3, "stopped between layers .* at tolerance"), (3e-11, "differ by .* less than float64")],
)
def test_a_field_that_no_solver_resolves(
    size: float, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(solvers, "MAX_STEPS_OF_LAYER", 100)  # not 1,000 of them
    with pytest.raises(RunError, match=message) as error:
        discretization_gap(chain(Noise(size), Noise(size), step=1.0), X)
    assert "\n" not in str(error.value)
