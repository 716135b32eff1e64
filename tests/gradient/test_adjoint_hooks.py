"""Hooks on and in blocks are called as often as under torch's own checkpoint.

The comparison: `torch.utils.checkpoint.checkpoint(…, use_reentrant=False)` applied to each block's
forward, so that the block is called as before and its forward pass is what is replayed.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from adjoint_references import (
    DEPTH,
    Block,
    exact_gradients,
    gradients,
    inputs,
    relative_error,
    tower,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit import use_adjoint
from deeplimit.gradient import layout


def checkpointed() -> nn.Module:
    """Every block's forward under torch's checkpoint."""
    model = tower()
    for block in model.blocks:
        own = block.forward

        def forward(x: Tensor, own: Any = own) -> Any:
            return checkpoint(own, x, use_reentrant=False, early_stop=False)

        block.forward = forward
    return model


def calls_of(model: nn.Module, steps: int = 1) -> Counter[str]:
    """How often each kind of hook is called in that many steps, after a first one."""
    gradients(model, inputs())
    calls: Counter[str] = Counter()

    def count(kind: str) -> Any:
        return lambda *_: calls.update([kind])

    def watch_output(kind: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            if output.requires_grad:  # evaluations without gradients call hooks inside a block too
                output.register_hook(count(kind))

        return hook

    for block in model.blocks:
        for where, module in (("block", block), ("inside", block.up)):
            module.register_forward_pre_hook(count(f"{where}: forward pre"))
            module.register_forward_hook(count(f"{where}: forward"))
            module.register_full_backward_pre_hook(count(f"{where}: full backward pre"))
            module.register_full_backward_hook(count(f"{where}: full backward"))
            module.register_forward_hook(watch_output(f"{where}: output's gradient"))
        block.up.weight.register_hook(count("parameter's gradient"))
        block.up.weight.register_post_accumulate_grad_hook(count("accumulated"))
    for _ in range(steps):
        gradients(model, inputs())
    return calls


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_calls_are_those_of_a_checkpoint(evaluations: int) -> None:
    model = use_adjoint(tower(), evaluations=evaluations, on_drift="ignore")
    found, reference = calls_of(model, steps=2), calls_of(checkpointed(), steps=2)
    assert len(layout(model).rebuilt) == DEPTH
    # Once more for each extra evaluation and each state that is rebuilt: all but the first, and
    # the last, which is run from its own input.
    extra = 2 * (evaluations - 1) * (DEPTH - 2)
    for kind in ("inside: forward", "inside: forward pre"):
        assert reference[kind] == 2 * 2 * DEPTH
        assert found.pop(kind) == reference.pop(kind) + extra
    assert found == reference
    assert set(found.values()) == {2 * DEPTH}


def test_hooks_see_the_right_gradients() -> None:
    def seen(model: nn.Module) -> list[Tensor]:
        gradients_seen = []
        for block in model.blocks:
            block.register_full_backward_hook(
                lambda _, before, after: gradients_seen.extend((before[0], after[0]))
            )
        gradients(model, inputs())
        return gradients_seen

    exact = seen(tower())
    found = seen(use_adjoint(tower(), evaluations=8, on_drift="ignore"))
    assert len(found) == len(exact) == 2 * DEPTH
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-12)


def double_output(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return 2 * output


def edit_output(module: nn.Module, given: Any, output: Tensor) -> None:
    output.mul_(1.5)


def shift_input(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0] + 1,)


@pytest.mark.parametrize("hook", [double_output, edit_output, shift_input])
@pytest.mark.parametrize("where", ["block", "inside"])
def test_hooks_that_change_what_they_see(hook: Any, where: str) -> None:
    def hooked() -> nn.Module:
        model = tower()
        for block in model.blocks:
            module = block if where == "block" else block.down
            if hook is shift_input:
                module.register_forward_pre_hook(hook)
            else:
                module.register_forward_hook(hook)
        return model

    _, exact = gradients(hooked(), inputs())
    model = use_adjoint(hooked(), evaluations=9, on_drift="ignore")
    for _ in range(2):
        _, found = gradients(model, inputs())
        error = relative_error(found, exact)
        # On a block: its output is not the next one's input, so that every input is kept.
        assert error == 0.0 if where == "block" else 0 < error < 1e-6


def test_gradients_that_hooks_change() -> None:
    def hooked() -> nn.Module:
        model = tower()
        for block in model.blocks:
            block.register_full_backward_hook(lambda _, before, after: (before[0] * 1.5,))
            block.down.weight.register_hook(lambda gradient: 3 * gradient)
        return model

    _, exact = gradients(hooked(), inputs())
    _, plain = exact_gradients(tower(), inputs())
    assert relative_error(exact, plain) > 1
    model = use_adjoint(hooked(), evaluations=9, on_drift="ignore")
    _, found = gradients(model, inputs())
    assert 0 < relative_error(found, exact) < 1e-6


def test_a_tensor_hook_inside_a_block_fails_aloud_without_gradients() -> None:
    model = tower(Block)
    for block in model.blocks:
        block.up.register_forward_hook(
            lambda _, given, output: output.register_hook(lambda g: g) and None
        )
    use_adjoint(model, evaluations=2, on_drift="ignore")
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        gradients(model, inputs())
