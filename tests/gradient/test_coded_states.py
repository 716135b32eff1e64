"""Coded states: right by a reference written out, for every block of one shape, and measured."""

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_codes import naive_chain
from torch import Tensor, nn

from deeplimit import InputError, drift, gradient_error, use_adjoint
from deeplimit.gradient import AdjointError, DriftWarning, codes, layout
from deeplimit.gradient.node import Node
from deeplimit.gradient.stand_ins import engines

WIDTH, DEPTH = 16, 7


class Norm(nn.Module):
    """A norm after the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.branch(x))
        return y


class Residual(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))  # type: ignore[no-any-return]


class Relu(Norm):
    """An activation after the addition."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()  # type: ignore[no-any-return]


class Gated(Norm):
    """A mixture, in which no way passes additions only."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.norm(x).sigmoid()
        return share * x + (1 - share) * self.branch(x)  # type: ignore[no-any-return]


class Plain(Norm):
    """Not residual at all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.branch(x))  # type: ignore[no-any-return]


BLOCKS = (Residual, Norm, Relu, Gated, Plain)


def stack(block: Callable[[], nn.Module], depth: int = DEPTH, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(block() for _ in range(depth))).double()


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(7))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y.sin() + y.square() / 2).mean()


def reference(model: nn.Sequential, x: Tensor, bits: int) -> list[Tensor]:
    """∇x_0 and all ∇θ with block n at x̂_n; x_0, x_1 and x_{N−1} are exact."""
    with torch.no_grad():
        states = [x]
        for block in model:
            states.append(block(states[-1]))
    at = [states[0], *naive_chain(states[1:-1], bits)[:-1], *states[-2:]]
    leaf = at[-1].clone().requires_grad_()
    (adjoint,) = torch.autograd.grad((leaf.sin() + leaf.square() / 2).mean(), [leaf])
    found: list[Tensor] = []
    for block, state in reversed(list(zip(model, at, strict=False))):
        leaf = state.clone().requires_grad_()
        own = list(block.parameters())
        adjoint, *parts = torch.autograd.grad(
            block(leaf), [leaf, *own], adjoint, materialize_grads=True
        )
        found[:0] = parts
    return [adjoint, *found]


@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_gradient_is_that_at_the_coded_states(block: type[nn.Module], bits: int) -> None:
    model, x = stack(block), batch(5, 3, WIDTH).requires_grad_()
    expected = reference(model, x.detach(), bits)
    use_adjoint(model, bits=bits, on_drift="ignore")
    for _ in range(2):  # the first run, in which blocks are found, and a later one
        got = torch.autograd.grad(
            loss_of(model, x), [x, *model.parameters()], materialize_grads=True
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert layout(model).coded == dict.fromkeys(map(str, range(DEPTH)), bits)
    assert str(layout(model)) == f"coded in {bits} bits: 0, 1, 2, 3, 4, 5, 6"
    assert 0 < drift(model) < 2


@pytest.mark.parametrize("block", [Residual, Norm])
def test_each_evaluation_brings_the_state_nearer_where_blocks_contract(block: type[Norm]) -> None:
    torch.manual_seed(0)
    model = stack(block, 12)
    with torch.no_grad():
        for part in model:
            part.branch[2].weight.mul_(0.3)
    errors = []
    for evaluations in (1, 2, 3):
        use_adjoint(model, bits=4, evaluations=evaluations, on_drift="ignore")
        loss_of(model, batch(5, WIDTH)).backward()
        errors.append(gradient_error(model, loss_of, batch(5, WIDTH)).error)
    if block is Residual:
        assert errors[2] < 0.3 * errors[1] < 0.1 * errors[0]
    else:  # a norm after the addition does not, and is not asked to
        assert len(set(errors)) == 1


def test_a_change_of_shape_begins_another_chain() -> None:
    torch.manual_seed(0)
    stages = [nn.Sequential(*(Norm() for _ in range(5))), nn.Linear(WIDTH, WIDTH)]
    model = nn.Sequential(*stages, nn.Sequential(*(Relu() for _ in range(5)))).double()
    use_adjoint(model, bits=8, on_drift="ignore")
    error = gradient_error(model, loss_of, batch(6, WIDTH))
    assert len(layout(model).coded) == 10
    assert 0 < error.error < 0.02
    (engine,) = engines(model)
    engine.chains = []
    loss_of(model, batch(6, WIDTH))
    assert [len(chain) for chain in engine.chains] == [5, 5]


class Branch(nn.Module):
    """x + two parts of one shape, one after another: a chain inside a branch, which is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Plain(), Plain())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x)  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Blocks in a part that keeps the shape itself."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(block() for _ in range(4)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("block", "coded"),
    [
        (Branch, ["0", "1", "2", "3"]),
        (lambda: Stage(Norm), [f"{n}.blocks.{k}" for n in range(4) for k in range(4)]),
        (lambda: Stage(Residual), [f"{n}.blocks.{k}" for n in range(4) for k in range(4)]),
    ],
)
def test_chains_are_found_at_the_right_level(
    block: Callable[[], nn.Module], coded: list[str]
) -> None:
    model = stack(block, 4)
    use_adjoint(model, bits=8, on_drift="ignore")
    assert gradient_error(model, loss_of, batch(6, WIDTH)).error < 0.05
    assert sorted(layout(model).coded) == coded


def test_a_gradient_beyond_the_tolerance_is_said() -> None:
    model = use_adjoint(stack(Norm), bits=2)
    with pytest.warns(DriftWarning, match=r"drift 0\..*More bits \(4 instead of 2\)"):
        loss_of(model, batch(5, WIDTH)).backward()
    use_adjoint(model, bits=2, on_drift="raise")
    with pytest.raises(AdjointError, match=r"beyond the tolerance 0\.01"):
        loss_of(model, batch(5, WIDTH)).backward()
    use_adjoint(model, bits=8, tolerance=0.1, on_drift="raise")
    loss_of(model, batch(5, WIDTH)).backward()
    (engine,) = engines(model)
    error = gradient_error(model, loss_of, batch(5, WIDTH)).error
    assert error < engine.meter.bound < 200 * error


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_an_update_that_is_not_finite_is_an_error(value: float) -> None:
    class Breaking(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + value * torch.eye(5, WIDTH, dtype=x.dtype)

    model = use_adjoint(
        nn.Sequential(*stack(Norm, 3), Breaking(), *stack(Norm, 3)).double(), bits=4
    )
    with pytest.raises(AdjointError, match=r"^3: its update .* is not finite, or beyond 3e38"):
        model(batch(5, WIDTH))


def test_an_empty_batch() -> None:
    model = use_adjoint(stack(Norm), bits=4, on_drift="raise")
    x = batch(0, WIDTH).requires_grad_()
    for _ in range(2):
        model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert drift(model) == 0


@pytest.mark.parametrize("bits", [1, 3, 16, -2])
def test_bits_that_cannot_be(bits: Any) -> None:
    model = stack(Norm)
    with pytest.raises(InputError, match=r"expected 0 \(no codes\), 2, 4, 8 or 'auto'"):
        use_adjoint(model, bits=bits)
    assert "forward" not in vars(model[0])


def test_integers_and_complex_numbers_are_left_plain() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.complex(self.inner(x.real), x.imag)
            return y

    model = nn.Sequential(*(Turning() for _ in range(4)))
    use_adjoint(model, bits=4)
    with pytest.warns(DriftWarning, match="no state will be rebuilt: 0 is given no state"):
        model(torch.ones(2, 4, dtype=torch.complex64)).abs().sum().backward()


def test_feedback_lives_as_long_as_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several forwards before a backward have each their own; none is left, without a collector."""
    alive: weakref.WeakSet[codes.Feedback] = weakref.WeakSet()
    start = codes.Feedback.__init__

    def counted(self: codes.Feedback, x: Tensor) -> None:
        start(self, x)
        alive.add(self)

    monkeypatch.setattr(codes.Feedback, "__init__", counted)
    model, xs = stack(Norm), [batch(5, WIDTH) + n for n in range(3)]
    expected = [
        torch.stack([p.square().sum() for p in reference(model, x, 4)[1:]]).sum() for x in xs
    ]
    use_adjoint(model, bits=4, on_drift="ignore")
    loss_of(model, xs[0]).backward()
    gc.collect()
    gc.disable()
    try:
        assert len(alive) == 0
        losses = [loss_of(model, x) for x in xs]
        assert len(alive) == 3
        for n in (1, 0, 2):
            for _ in range(2):  # retained: the end of the run has taken the feedback's place
                got = torch.autograd.grad(losses[n], list(model.parameters()), retain_graph=True)
                total = torch.stack([g.square().sum() for g in got]).sum()
                torch.testing.assert_close(total, expected[n], rtol=1e-10, atol=0)
        del losses
        assert len(alive) == 0
        loss_of(model, xs[0])  # dropped without a backward pass
        assert len(alive) == 0
        with torch.no_grad():
            loss_of(model, xs[0])
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 3, dtype=torch.float64))
        assert len(alive) == 0
    finally:
        gc.enable()


def test_later_states_go_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept last state among them: a node lives as long as its own graph, not its chain's."""
    alive: weakref.WeakSet[Node] = weakref.WeakSet()
    link = Node.link

    def counted(self: Node) -> None:
        link(self)
        alive.add(self)

    monkeypatch.setattr(Node, "link", counted)
    model, seen = use_adjoint(stack(Norm), bits=4, on_drift="ignore"), []
    loss_of(model, batch(5, WIDTH)).backward()
    assert len(alive) == 0
    for block in model:
        block.norm.register_full_backward_hook(lambda *_: seen.append(len(alive)))
    loss_of(model, batch(5, WIDTH)).backward()
    assert seen == [*range(DEPTH, 1, -1), 2]  # the first, whose input is kept, holds the second


def test_a_chain_goes_on_after_a_backward_pass() -> None:
    """The loss on an intermediate state, then on the last: the codes are there for both."""
    model, x = stack(Norm, 8), batch(5, WIDTH)
    expected = reference(model, x, 8)[1:]
    use_adjoint(model, bits=8, on_drift="ignore")
    loss_of(model, x).backward()
    model.zero_grad()
    middle = model[:5](x)
    torch.autograd.grad(middle.sum(), list(model[:5].parameters()), retain_graph=True)
    y = model[5:](middle)
    got = torch.autograd.grad((y.sin() + y.square() / 2).mean(), list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_of_less_precision(dtype: torch.dtype) -> None:
    """At 8 bits what is lost is the type's own, and x̂ is summed in float32."""
    model, x = stack(Norm, 24), batch(16, WIDTH)
    exact = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    less = stack(Norm, 24).to(dtype)

    def error() -> float:
        got = torch.autograd.grad(loss_of(less, x.to(dtype)).float(), list(less.parameters()))
        gap = sum(float((a.double() - b).square().sum()) for a, b in zip(got, exact, strict=True))
        return math.sqrt(gap / sum(float(b.square().sum()) for b in exact))

    own = error()
    use_adjoint(less, bits=8, on_drift="ignore")
    error()
    assert error() < own + 5e-3


def test_anchors_are_exact_and_begin_another_run() -> None:
    model, x = stack(Norm, 9), batch(5, WIDTH)
    found = []
    for every in (None, 3, 1):
        use_adjoint(model, bits=2, anchor_every=every, on_drift="ignore")
        found.append(gradient_error(model, loss_of, x).error)
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-14


def test_a_huge_update_in_one_layer_does_not_hide_the_error() -> None:
    class Shifting(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e4 * torch.eye(1, WIDTH, dtype=x.dtype)

    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual(), *(Shifting() for _ in range(6))).double()
    use_adjoint(model, bits=8)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x)[:, 1:].square().mean()

    x = batch(8, WIDTH)
    with pytest.warns(DriftWarning, match="beyond the tolerance"):
        loss(model, x).backward()
    (engine,) = engines(model)
    assert engine.meter.bound > gradient_error(model, loss, x).error


def test_switching_back_and_rebuilding_without_codes() -> None:
    """With bits=0 blocks that do not add their input are plain again."""
    model = use_adjoint(stack(Norm), bits=4, on_drift="ignore")
    loss_of(model, batch(5, WIDTH)).backward()
    use_adjoint(model, bits=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_of(model, batch(5, WIDTH)).backward()
    assert not layout(model).coded
    assert all("does not add its input" in why for why in layout(model).plain.values())
