"""Blocks that do more than give an output: state of their own, random depth, losses kept aside."""

import random
from typing import Any

import pytest
import torch
from adjoint_references import Block, exact_gradients, gradients, inputs, relative_error, tower
from torch import Tensor, nn

from deeplimit import drift, use_adjoint
from deeplimit.gradient import AdjointError, layout


class Counting(Block):
    """A state of its own that no buffer holds."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.residual(x) / self.calls


class OwnGenerator(Block):
    """Dropout from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=self.generator, dtype=x.dtype) < 0.5
        return x + self.residual(x) * kept


class PythonRandom(Block):
    """Random numbers that are not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) * random.random()


@pytest.mark.parametrize("block", [Counting, OwnGenerator, PythonRandom])
@pytest.mark.parametrize("evaluations", [1, 2])
@pytest.mark.parametrize("anchor_every", [1, None])
def test_a_block_that_cannot_be_run_again_is_an_error(
    block: type[Block], evaluations: int, anchor_every: int | None
) -> None:
    model = tower(block)
    use_adjoint(model, evaluations=evaluations, anchor_every=anchor_every, on_drift="ignore")
    for _ in range(2):
        with pytest.raises(AdjointError, match=r"blocks\.4: gives another output when it is run"):
            gradients(model, inputs())


def test_one_that_starts_with_training_mode_is_found_there() -> None:
    class OnlyInTraining(PythonRandom):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else x + self.residual(x)

    model, x = tower(OnlyInTraining).eval(), inputs()
    _, exact = exact_gradients(model, x)
    use_adjoint(model, evaluations=6, on_drift="ignore")
    _, found = gradients(model, x)
    assert 0 < relative_error(found, exact) < 1e-5
    with pytest.raises(AdjointError, match="another output when it is run again"):
        gradients(model.train(), x)


class RandomDepth(Block):
    """Left out now and then, as in stochastic depth; the input itself is the output then."""

    left_out = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.5:
            type(self).left_out += 1
            return x
        return x + self.residual(x)


@pytest.mark.slow
def test_random_depth_sees_the_same_depth() -> None:
    RandomDepth.left_out = 0
    model = tower(RandomDepth, depth=8)
    exact = [exact_gradients(model, inputs(seed), seed=seed) for seed in range(6)]
    assert 6 < RandomDepth.left_out < 42
    use_adjoint(model, evaluations=9, on_drift="ignore")
    drifts = []
    for seed, (loss, wanted) in enumerate(exact):
        loss_now, found = gradients(model, inputs(seed), seed=seed)
        assert float(loss_now) == float(loss)
        assert relative_error(found, wanted) < 1e-6
        drifts.append(drift(model))
    # Not known (NaN) where the first block is left out: nothing calls for its replay.
    assert any(0 < d < 1e-6 for d in drifts)
    assert not any(d > 1e-6 for d in drifts)
    assert len(layout(model).rebuilt) == 8


class LossAside(Block):
    """Keeps a part of the loss in an attribute, as mixtures of experts do."""

    aside: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(x)
        self.aside = y.square().mean()
        return x + y


def with_what_is_aside(model: nn.Module, x: Tensor) -> Tensor:
    """A loss with a share of every block."""
    loss = model(x).square().mean()
    return loss + sum(block.aside for block in model.blocks)


def test_losses_kept_in_attributes_have_their_gradients() -> None:
    model, x = tower(LossAside), inputs()
    _, exact = exact_gradients(model, x, with_what_is_aside)
    use_adjoint(model, evaluations=9, on_drift="ignore")
    for _ in range(2):
        _, found = gradients(model, x, with_what_is_aside)
        assert 0 < relative_error(found, exact) < 1e-6


class Conditioned(nn.Module):
    """Its condition is an attribute that the caller sets before each forward pass."""

    cond: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.a(x)) * self.c(self.cond)


@pytest.mark.parametrize(("depth", "every"), [(2, None), (6, 1)])
@pytest.mark.parametrize("on_drift", ["warn", "ignore"])
def test_a_condition_changed_between_forward_and_backward_is_an_error(
    depth: int, every: int | None, on_drift: Any
) -> None:
    """Where all inputs are kept no drift would tell of it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Conditioned() for _ in range(depth))).double()
    use_adjoint(model, evaluations=30, anchor_every=every, on_drift=on_drift)
    x, conditions = torch.randn(3, 4, 6).double(), torch.randn(2, 4, 6).double()

    def forward(n: int) -> Tensor:
        for block in model:
            block.cond = conditions[n]  # type: ignore[assignment]
        return model(x[n]).sum()

    for _ in range(2):
        forward(0).backward()
    first, second = forward(0), forward(1)
    with pytest.raises(AdjointError, match="another output than the forward pass"):
        (first + second).backward()
    forward(1).backward()


class TakesFromAList(nn.Module):
    """A U-Net's way of passing states on."""

    def __init__(self, store: list[Tensor]) -> None:
        super().__init__()
        self.f, self.store = nn.Linear(6, 6), store

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.f(x) + self.store.pop())


def test_a_block_that_takes_from_a_list_is_an_error_with_its_name() -> None:
    store: list[Tensor] = []
    model = nn.Sequential(*(TakesFromAList(store) for _ in range(3))).double()
    use_adjoint(model)
    store += [torch.ones(4, 6, dtype=torch.float64) for _ in range(3)]
    loss = model(torch.randn(4, 6, dtype=torch.float64)).sum()
    with pytest.raises(AdjointError, match=r"2: cannot be run again \(IndexError: pop from empty"):
        loss.backward()
