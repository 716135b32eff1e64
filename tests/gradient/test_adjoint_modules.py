"""Norms, dropout, shared and frozen blocks, the ways of asking for a gradient: float64 values."""

from collections.abc import Callable

import pytest
import torch
from adjoint_models import (
    EXACT,
    MANY,
    assert_equal,
    gradients,
    inputs,
    same_gradients,
    sequence,
)
from torch import Tensor, nn

from deeplimit import Heun, ResidualChain, gradient_error, use_adjoint
from deeplimit.gradient import AdjointError
from deeplimit.network.blocks import ConvolutionalResidual


@pytest.mark.parametrize("scheme", [None, Heun()])
@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_batch_norm_moves_once(evaluations: int, scheme: Heun | None) -> None:
    def network() -> ResidualChain:
        torch.manual_seed(0)
        blocks = [ConvolutionalResidual(4, 4, activation="gelu").double() for _ in range(5)]
        for block in blocks:
            block.norm1.momentum = 0.3  # type: ignore[assignment]
        blocks[1].norm2.momentum = None  # type: ignore[assignment]
        blocks[2].norm1.eval()
        return ResidualChain(blocks, step=0.1, scheme=scheme)

    plain, switched = network(), use_adjoint(network(), evaluations=evaluations, on_drift="ignore")
    modes = [m.training for m in switched.modules()]
    for step in range(2):
        x = inputs(3, 4, 6, 6) + step
        gradients(plain, x)
        gradients(switched, x)
        for (name, a), b in zip(switched.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14, msg=name)
    norms = [m for m in switched.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [norms[i].momentum for i in range(4)] == [0.3, 0.1, 0.3, None]
    assert all(m.num_batches_tracked is not None for m in norms)
    assert [m.training for m in switched.modules()] == modes


@pytest.mark.slow
def test_batch_norm_gradients_in_both_modes() -> None:
    torch.manual_seed(0)
    blocks = [ConvolutionalResidual(4, 4, activation="gelu").double() for _ in range(5)]
    chain = ResidualChain(blocks, step=0.05)
    same_gradients(chain.train(), inputs(3, 4, 6, 6))
    same_gradients(chain.eval(), inputs(3, 4, 6, 6))


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_dropout_sees_the_masks_of_the_forward_pass(evaluations: int) -> None:
    """With other masks the error would be of order 1, whatever e; with the same it is small."""
    found = []
    for rate in (0.0, 0.4):
        model = use_adjoint(sequence(dropout=rate), evaluations=evaluations, on_drift="ignore")
        x = inputs(5, 6)
        report = gradient_error(model, lambda m, x: m(x).sin().sum(), x)
        found.append(report.error)
    assert found[1] < 5 * found[0]
    assert found[0] < 0.3**evaluations


def test_dropout_leaves_the_random_stream_where_backpropagation_does() -> None:
    ends = []
    for adjoint in (False, True):
        model = sequence(dropout=0.3)
        if adjoint:
            use_adjoint(model, on_drift="ignore")
        torch.manual_seed(5)
        model(inputs(5, 6)).sum().backward()
        ends.append(torch.rand(3))
    assert torch.equal(*ends)


def test_dropout_with_many_evaluations_is_exact() -> None:
    same_gradients(sequence(dropout=0.3), inputs(5, 6))


def shared() -> nn.Module:
    a, b, c = sequence(3)
    return nn.Sequential(a, b, a, c, a, b)


def frozen() -> nn.Module:
    model = sequence()
    for n in (1, 2, 5):
        model[n].requires_grad_(False)
    model[3].inner.weight.requires_grad_(False)  # type: ignore[union-attr]
    return model


def frozen_start() -> nn.Module:
    model = sequence()
    model[:3].requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [shared, frozen, frozen_start, sequence])
def test_right_values(make: Callable[[], nn.Module]) -> None:
    same_gradients(make(), inputs(5, 6))


@pytest.mark.parametrize("make", [frozen_start, sequence, shared])
def test_an_input_that_needs_no_gradient(make: Callable[[], nn.Module]) -> None:
    model, x = make(), inputs(5, 6)

    def found() -> list[Tensor | None]:
        model.zero_grad()
        model(x).sin().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    expected = found()
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    assert_equal(found(), expected, EXACT)
    assert_equal(found(), expected, EXACT)


def test_only_the_head_is_trained() -> None:
    body, head = sequence().requires_grad_(False), nn.Linear(6, 2).double()
    model, x = nn.ModuleDict({"body": body, "head": head}), inputs(5, 6)
    head(body(x)).square().sum().backward()
    expected = [p.grad.clone() for p in head.parameters() if p.grad is not None]
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    head.zero_grad()
    head(body(x)).square().sum().backward()
    assert_equal([p.grad for p in head.parameters()], list(expected), 1e-15)
    assert all(p.grad is None for p in body.parameters())


@pytest.mark.slow
def test_two_forwards_before_a_backward_and_accumulation() -> None:
    model, x = sequence(), inputs(5, 6)

    def found() -> list[Tensor | None]:
        model.zero_grad()
        (model(x).sin().sum() + model(2 * x).sum()).backward()
        model(x - 1).square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    expected = found()
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    for _ in range(2):
        assert_equal(found(), expected, EXACT)


def test_without_gradients_it_is_the_plain_function() -> None:
    model, x = sequence(), inputs(5, 6)
    expected = model(x)
    use_adjoint(model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = model(x)
        assert torch.equal(found, expected)
        assert not found.requires_grad
    same_gradients(model.eval(), x)
    inference = torch.inference_mode()
    with inference:
        held = model(x)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        model(held).sum().backward()  # as without the adjoint


def test_autograd_grad_and_retain_graph() -> None:
    model, x = sequence(), inputs(5, 6).requires_grad_()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).sin().sum(), [x, *parameters])
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    loss = model(x).sin().sum()
    for _ in range(3):
        got = torch.autograd.grad(loss, [x, *parameters], retain_graph=True)
        assert_equal(list(got), list(expected), EXACT)
    (late,) = torch.autograd.grad(loss, [parameters[-1]], retain_graph=True)
    torch.testing.assert_close(late, expected[-1], rtol=0, atol=EXACT)
    got = torch.autograd.grad(loss, [x, *parameters])
    assert_equal(list(got), list(expected), EXACT)


def test_an_exception_in_a_block_leaves_nothing_behind() -> None:
    model, x = sequence(), inputs(5, 6)
    expected = gradients(model, x)
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    gradients(model, x)
    handle = model[3].inner.register_forward_hook(_fail)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="on purpose"):
        model(x)
    handle.remove()
    assert_equal(gradients(model, x), expected, EXACT)


def _fail(*_: object) -> None:
    raise ValueError("on purpose")


@pytest.mark.parametrize("change", ["optimiser", "functional_call", "one parameter"])
def test_changed_parameters_are_an_error(change: str) -> None:
    model, x = use_adjoint(sequence(), **MANY), inputs(5, 6).requires_grad_()  # type: ignore[arg-type]
    if change == "functional_call":
        other = {name: p.detach() + 1e-3 for name, p in model.named_parameters()}
        loss = torch.func.functional_call(model, other, (x,)).sum()
    else:
        loss = model(x).sum()
    with torch.no_grad():
        if change == "optimiser":
            torch.optim.SGD(model.parameters(), lr=0.0).step()
            for p in model.parameters():
                p.add_(1e-3)
        elif change == "one parameter":
            model[4].outer.bias.add_(1.0)  # type: ignore[union-attr,operator]
    with pytest.raises(AdjointError, match="changed between forward and backward"):
        loss.backward()
