"""The gradient's cost: errors against gradient_error, memory against arithmetic, kept states."""

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from deeplimit import ResidualChain, drift, gradient_error, plan_memory, use_adjoint
from deeplimit.errors import InputError
from deeplimit.gradient.accuracy import peak_memory
from deeplimit.gradient.meter import KEPT
from deeplimit.gradient.stand_ins import switches
from deeplimit.network.blocks import ConvolutionalResidual, TwoLayerResidual
from deeplimit.records import from_plain, to_plain
from deeplimit.report import gradient_answer, gradient_cost_figure, gradient_summary
from deeplimit.studies import GradientCost, measure_gradient_cost

WIDTH, BATCH, DEPTH = 16, 64, 16
CPU = torch.device("cpu")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).sin() + x.square()).mean()


def chain(depth: int = DEPTH, step: float = 2.0, kind: str = "tanh") -> ResidualChain:
    torch.manual_seed(0)
    blocks = [TwoLayerResidual(WIDTH, 2 * WIDTH, kind) for _ in range(depth)]
    return ResidualChain(blocks, step=step / depth).double()


def batch() -> Tensor:
    return torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def cost() -> GradientCost:
    return measure_gradient_cost(chain(), loss_of, batch(), name="a chain", steps=2)


@pytest.mark.slow
def test_errors_and_drifts_are_those_of_gradient_error(cost: GradientCost) -> None:
    for row in cost.methods:
        if row.method == "adjoint":
            model = use_adjoint(chain(), evaluations=row.evaluations or 0, on_drift="ignore")
            expected = gradient_error(model, loss_of, batch())
            assert row.error == pytest.approx(expected.error, rel=1e-6)
            assert row.drift == pytest.approx((expected.drift,), rel=1e-6)
            assert drift(model) > 0
        if row.method == "coded":
            model = use_adjoint(chain(), bits=row.bits or 0, on_drift="ignore")
            assert row.error == pytest.approx(gradient_error(model, loss_of, batch()).error, 1e-6)


def test_plain_and_checkpointed_are_exact_and_more_evaluations_are_better(
    cost: GradientCost,
) -> None:
    plain, checkpointed, first, second, third, *coded, planned = (row.error for row in cost.methods)
    assert plain == 0
    assert checkpointed == 0
    assert 0.2 > first > 10 * second > 100 * third > 0
    assert 0.1 > coded[0] > 3 * coded[1] > 9 * coded[2] > 0
    assert planned <= cost.tolerance


def test_memory_is_what_must_be_kept(cost: GradientCost) -> None:
    """Plain: two tensors of the hidden layer's size or more per block; checkpointed: the states."""
    plain, checkpointed, *adjoints = (row.memory for row in cost.methods)
    state, hidden = BATCH * WIDTH * 8, BATCH * 2 * WIDTH * 8
    assert plain > DEPTH * (state + hidden)
    assert DEPTH * state < checkpointed < 0.7 * plain
    for memory in adjoints[:3]:
        assert memory < checkpointed / 2
        assert memory < DEPTH * state
    assert adjoints[3] <= adjoints[4] <= adjoints[5] < plain


@pytest.mark.slow
def test_the_adjoints_memory_does_not_grow_with_depth(cost: GradientCost) -> None:
    deeper = measure_gradient_cost(chain(2 * DEPTH), loss_of, batch(), steps=1, tolerance=1.0)
    assert deeper.plain.memory > 1.8 * cost.plain.memory
    for row, other in zip(cost.methods[2:5], deeper.methods[2:5], strict=True):
        assert other.memory == pytest.approx(row.memory, rel=0.05)


def test_peak_memory_by_hand() -> None:
    """Two tensors of 8 kB at once, freed before the third; gradients are there before."""
    x = torch.randn(1000, dtype=torch.float64)
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(1000, dtype=torch.float64))

    def step() -> None:
        held = x + x, x.exp()
        del held
        x.log1p()

    assert peak_memory(step, model, CPU) == 16000
    assert model.w.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_plain_keeps_more_than_the_adjoint() -> None:
    cost = measure_gradient_cost(chain().cuda(), loss_of, batch().cuda(), steps=1)
    plain, checkpointed, *adjoints = (row.memory for row in cost.methods)
    assert plain > checkpointed > max(adjoints[:3])
    assert cost.device.startswith("cuda")


def test_states_kept(cost: GradientCost) -> None:
    assert [len(c) for c in cost.chains] == [DEPTH]
    assert [row.kept for row in cost.methods[:8]] == [DEPTH, DEPTH, *[2] * 6]


@pytest.mark.slow
def test_a_plan_keeps_the_tolerance_where_rebuilding_would_not() -> None:
    stiff = chain(8, step=6.0)
    tight = measure_gradient_cost(stiff, loss_of, batch(), tolerance=1e-3, steps=1)
    planned = tight.methods[-1]
    assert min(row.error for row in tight.methods[2:5]) > 1e-3
    assert planned.error <= 1e-3
    assert "coded in" in planned.plan
    assert planned.kept == 2 + len(planned.anchors)
    plan = plan_memory(use_adjoint(chain(8, 6.0), bits=4), loss_of, batch(), 1e-3)
    assert sum(way == KEPT for way in plan.ways.values()) == len(planned.anchors)
    assert plan.error == pytest.approx(planned.error, rel=1e-6)


class ReluAfter(nn.Module):
    """ReLU after the addition: not invertible."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x).tanh()).relu()


@pytest.mark.slow
def test_a_plan_that_keeps_every_state_is_a_checkpoint_and_called_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(ReluAfter() for _ in range(6))).double()
    cost = measure_gradient_cost(model, loss_of, batch(), tolerance=1e-9, steps=1)
    assert len(cost.methods[-1].anchors) == 4
    assert cost.methods[-1].plan == "4 kept"
    assert cost.best is None or cost.best.method == "checkpointed"


class Stages(nn.Module):
    """Two chains with a projection between them; batch norms, whose statistics move."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = ResidualChain([ConvolutionalResidual(4, 4) for _ in range(4)], step=0.25)
        self.between = nn.Conv2d(4, 4, 1)
        self.second = nn.Sequential(*[nn.Sequential(Residual()) for _ in range(3)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.conv(x).tanh()


@pytest.mark.slow
def test_drift_is_of_each_chain_and_the_model_is_left_as_it_was() -> None:
    model = Stages()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    cost = measure_gradient_cost(model, loss_of, x, steps=1)
    assert [len(c) for c in cost.chains] == [4, 3]
    for row in cost.methods[2:5]:
        assert min(row.drift) > 0
        assert row.drift[0] != row.drift[1]
        use_adjoint(model, evaluations=row.evaluations or 0, on_drift="ignore")
        gradient_error(model, loss_of, x)
        assert max(row.drift) == pytest.approx(gradient_error(model, loss_of, x).drift, rel=1e-6)
    cost_again = measure_gradient_cost(model, loss_of, x, steps=1)
    assert [m.error for m in cost_again.methods] == [m.error for m in cost.methods]
    assert not switches(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


class Opposite(nn.Module):
    """No block keeps the state's shape."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ((4, 5), (5, 4))
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(*p), nn.Tanh()) for p in pairs])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_without_residual_blocks_there_is_one_row_and_the_reasons() -> None:
    cost = measure_gradient_cost(Opposite(), loss_of, torch.randn(3, 4), steps=1)
    assert [row.method for row in cost.methods] == ["plain"]
    assert [left.block for left in cost.left_plain] == ["layers.0", "layers.1"]
    shown = rendered(cost)
    assert shown.startswith("Nothing to save")
    assert "layers.0: turns a state (3, 4), torch.float32 into (3, 5), torch.float32" in shown


@pytest.mark.slow
def test_where_plain_backpropagation_does_not_fit_the_others_are_measured() -> None:
    model = chain(6)

    def scarce(model: nn.Module, x: Tensor) -> Tensor:
        stood_in = any("forward" in vars(step) for step in model.steps)
        switched = stood_in and not any(s.engine.paused for s in switches(model))
        if not switched:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_of(model, x)

    cost = measure_gradient_cost(model, scarce, batch(), steps=1)
    plain, checkpointed, *adjoints, planned = cost.methods
    assert plain.failed == "OutOfMemoryError: CUDA out of memory."
    assert (plain.memory, plain.seconds, plain.error, plain.kept) == (None, None, None, None)
    for row in (checkpointed, *adjoints):
        assert row.memory > 0
        assert row.seconds > 0
        assert row.error is None
    assert 0 < planned.error <= cost.tolerance  # of the gradient with every state kept
    assert "out of memory" in gradient_answer(cost)
    assert "plain: OutOfMemoryError: CUDA out of memory." in rendered(cost)
    assert list(gradient_cost_figure(cost).data[0].x) == [r.memory for r in cost.methods[1:]]
    assert [row.seconds for row in from_plain(GradientCost, to_plain(cost)).methods] == [
        row.seconds for row in cost.methods
    ]


def fails(model: nn.Module, x: Tensor) -> Tensor:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("settings", "loss", "says"),
    [
        ({"steps": 0}, loss_of, "steps is 0"),
        ({"tolerance": 0.0}, loss_of, "tolerance is 0"),
        ({}, lambda model, x: model(x), "expected a scalar"),
        ({}, fails, "KeyError: 'labels'"),
    ],
)
def test_wrong_input(
    settings: dict[str, float], loss: Callable[[nn.Module, Tensor], Tensor], says: str
) -> None:
    model = chain(3)
    with pytest.raises(InputError, match=says):
        measure_gradient_cost(model, loss, batch(), **settings)  # type: ignore[arg-type]
    assert not switches(model)


def made(cost: GradientCost, *changes: dict[str, float]) -> GradientCost:
    rows = (replace(row, **change) for row, change in zip(cost.methods, changes, strict=False))
    return replace(cost, methods=tuple(rows))


def test_the_answer_is_the_least_memory_within_the_tolerance(cost: GradientCost) -> None:
    rows: list[dict[str, float]] = [
        {"memory": 6100, "seconds": 1.0, "error": 0.0},
        {"memory": 3000, "seconds": 1.2, "error": 0.0},
        {"memory": 900, "seconds": 1.3, "error": 0.3},
        {"memory": 1000, "seconds": 1.5, "error": 0.004},
        {"memory": 1001, "seconds": 1.9, "error": 0.0001},
    ]
    answered = made(cost, *rows)
    assert answered.best == answered.methods[3]
    assert gradient_answer(answered).replace("\u00a0", " ") == (
        "Adjoint with e = 2: 6.1 times less memory than plain backpropagation at a gradient error "
        "of 0.40 %, for 1.5 times the time."
    )
    strict = replace(answered, tolerance=1e-5)
    assert strict.best == strict.methods[1]
    assert "the gradient exact" in gradient_answer(strict)
    assert made(cost, rows[0], rows[0]).best is None


def rendered(cost: GradientCost) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(gradient_summary(cost))
    return out.getvalue().replace("\u00a0", " ")


def test_table_and_figure_show_the_numbers(cost: GradientCost) -> None:
    shown = rendered(cost)
    figure = gradient_cost_figure(cost)
    memories, times, errors = (list(trace.x) for trace in figure.data)
    assert memories == [row.memory for row in cost.methods]
    assert times == [row.seconds for row in cost.methods]
    assert errors == [100 * row.error if row.error else None for row in cost.methods]
    for text in (*figure.data[0].text, *figure.data[2].text[2:]):
        assert text.replace("\u00a0", " ") in shown
    json.dumps(to_plain(cost), allow_nan=False)
