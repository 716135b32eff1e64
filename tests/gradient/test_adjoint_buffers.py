"""Blocks whose buffers move, and what is changed between forward and backward."""

from collections.abc import Callable

import pytest
import torch
from adjoint_references import (
    WIDTH,
    Block,
    gradients,
    inputs,
    loss_of,
    relative_error,
    tower,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from deeplimit import use_adjoint
from deeplimit.gradient import AdjointError, layout


def spectral() -> nn.Module:
    """Power iterations move two buffers in every forward pass of the training mode."""
    block = Block()
    spectral_norm(block.up, n_power_iterations=1)
    return block


def weight_normed() -> nn.Module:
    """A parametrisation without buffers."""
    block = Block()
    weight_norm(block.up)
    return block


class Averaging(Block):
    """A running mean, put in the place of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.7 * self.mean + 0.3 * x.detach().abs().mean(dim=0)
        return x + self.residual(x) * self.mean


class LateBuffer(Block):
    """A buffer that is made in the first forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", (torch.arange(WIDTH) % 3 > 0).to(x.dtype))
        return x + self.residual(x) * self.mask


class Masking(Block):
    """A buffer that a forward pass uses and does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) * self.mask


class Normed(Block):
    """A batch norm at the end of the residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05 * self.bn(self.residual(x))


class Dropped(Block):
    """Dropout at the end of the residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.residual(x))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


Make = Callable[[], nn.Module]
Before = Callable[[nn.Module], object]


def nothing(model: nn.Module) -> None:
    """Straight away."""


def evaluated(model: nn.Module) -> None:
    """A pass with gradients in evaluation mode first, in which no buffer moves."""
    gradients(model.eval(), inputs(3))
    model.train()


def trained(model: nn.Module) -> None:
    """Two steps first."""
    gradients(model, inputs(3))
    gradients(model, inputs(4))


@pytest.mark.parametrize("before", [nothing, evaluated, trained])
@pytest.mark.parametrize("block", [spectral, Averaging, LateBuffer, weight_normed])
@pytest.mark.parametrize("evaluations", [1, 8])
def test_buffers_move_once_and_the_replay_sees_them_as_they_were(
    block: Make, before: Before, evaluations: int
) -> None:
    reference, model = tower(block), tower(block)
    use_adjoint(model, evaluations=evaluations, on_drift="ignore")
    before(reference)
    before(model)
    at_start = buffers(model)
    _, exact = gradients(reference, inputs())
    _, found = gradients(model, inputs())
    assert len(layout(model).rebuilt) == 5
    assert 0 < relative_error(found, exact) < (0.1 if evaluations == 1 else 1e-6)
    now, wanted = buffers(model), buffers(reference)
    assert now.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(now[name], wanted[name])
    if block in (spectral, Averaging):
        assert all(not torch.equal(now[name], old) for name, old in at_start.items())


@pytest.mark.parametrize("block", [spectral, Averaging])
def test_two_forwards_before_the_backwards(block: Make) -> None:
    def both(model: nn.Module) -> dict[str, Tensor]:
        first, second = loss_of(model, inputs()), loss_of(model, inputs(1))
        first.backward()
        second.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    reference, model = tower(block), tower(block)
    exact = both(reference)
    found = both(use_adjoint(model, evaluations=9, on_drift="ignore"))
    assert 0 < relative_error(found, exact) < 1e-6
    wanted = buffers(reference)
    assert all(torch.equal(b, wanted[name]) for name, b in buffers(model).items())


def _edit_masks(model: nn.Module) -> None:
    for block in model.blocks:
        block.mask.mul_(2)


def _replace_masks(model: nn.Module) -> None:
    for block in model.blocks:
        block.mask = 2 * block.mask


def _replace_parts(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm = nn.Identity()


def _move_statistics(model: nn.Module) -> None:
    model.train()(inputs(1))
    model.eval()


def _freeze(model: nn.Module) -> None:
    model.blocks[1].requires_grad_(False)


@pytest.mark.parametrize(
    ("block", "training", "change", "message"),
    [
        (Block, True, _freeze, r"parameters were changed .* Run backward before .*requires_grad_"),
        (Masking, True, _edit_masks, "its buffer mask was changed"),
        (Masking, True, _replace_masks, "its buffer mask was changed"),
        (Block, True, _replace_parts, "was replaced|parameters were changed"),
        (Dropped, True, nn.Module.eval, r"train\(\) or eval\(\) was called"),
        (Normed, True, nn.Module.eval, r"train\(\) or eval\(\) was called"),
        (Normed, False, nn.Module.train, r"train\(\) or eval\(\) was called"),
        (Normed, False, _move_statistics, "its buffer .* was changed"),
    ],
)
def test_changes_between_forward_and_backward_are_errors(
    block: Make, training: bool, change: Before, message: str
) -> None:
    model, x = tower(block).train(training), inputs()
    use_adjoint(model, on_drift="ignore")
    for _ in range(2):
        loss = loss_of(model.train(training).requires_grad_(True), x)
        change(model)
        with pytest.raises(AdjointError, match=message):
            loss.backward()
        model.zero_grad()
    loss_of(model, x).backward()  # nothing is left behind


def _with_batch_norm(model: nn.Module) -> None:
    model.blocks[1] = tower(Normed).blocks[1]


def _with_batch_norm_inside(model: nn.Module) -> None:
    torch.manual_seed(5)
    for block in model.blocks:
        block.down = nn.Sequential(block.down, nn.BatchNorm1d(WIDTH).double())
        block.gain = 0.02  # it makes small residuals large


def _with_spectral_norm(model: nn.Module) -> None:
    torch.manual_seed(5)
    for block in model.blocks:
        spectral_norm(block.up)


@pytest.mark.parametrize("change", [_with_batch_norm, _with_batch_norm_inside, _with_spectral_norm])
def test_parts_replaced_after_a_step_are_seen(change: Before) -> None:
    reference, model = tower(), use_adjoint(tower(), evaluations=12, on_drift="ignore")
    gradients(model, inputs())
    change(reference)
    change(model)
    for step in range(2):
        _, exact = gradients(reference, inputs(step))
        _, found = gradients(model, inputs(step))
        assert 0 <= relative_error(found, exact) < 1e-4
        wanted = buffers(reference)
        assert all(torch.equal(b, wanted[name]) for name, b in buffers(model).items())
