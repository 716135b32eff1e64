"""Copies and pickles of a switched model: independent of it, and switched."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from adjoint_references import Block, exact_gradients, gradients, inputs, relative_error, tower
from torch import nn

from deeplimit import ResidualChain, crop, drift, use_adjoint, use_backprop
from deeplimit.gradient import layout
from deeplimit.network.blocks import TwoLayerResidual


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def chain() -> nn.Module:
    """One of ours, whose steps are switched and not its blocks' forward."""
    torch.manual_seed(0)
    return ResidualChain([TwoLayerResidual(8, 12, "tanh") for _ in range(5)], step=0.1).double()


Copies = Callable[[nn.Module], nn.Module]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("make", [tower, chain])
def test_a_copy_is_switched_and_independent(
    make: Callable[[], nn.Module], when: str, copied: Copies
) -> None:
    model, x = make(), inputs()
    _, exact = exact_gradients(model, x)
    use_adjoint(model, evaluations=6, on_drift="ignore")
    if when == "before":
        other = copied(model)
        _, own = gradients(model, x)
    elif when == "after":
        _, own = gradients(model, x)
        other = copied(model)
    else:
        copies = []
        _, own = gradients(model, (x, copies, copied), _copied_between)
        (other,) = copies
    assert 0 < relative_error(own, exact) < 1e-6
    _, found = gradients(other, x)
    assert relative_error(found, own) == 0.0
    assert drift(other) == drift(model) > 0
    assert layout(other) == layout(model)

    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    _, again = gradients(model, x)
    assert relative_error(again, own) == 0.0
    plain = use_backprop(copied(other))
    _, exact_of_other = gradients(plain, x)
    _, found = gradients(other, x)
    assert relative_error(exact_of_other, exact) > 0.01
    assert 0 < relative_error(found, exact_of_other) < 1e-5


def _copied_between(model: nn.Module, batch: tuple) -> torch.Tensor:
    x, copies, copied = batch
    y = model(x)
    copies.append(copied(model))
    return (y.sin() + y.square() / 2).mean()


def test_switching_a_copy_back_leaves_the_original_switched() -> None:
    model, x = tower(), inputs()
    _, exact = exact_gradients(model, x)
    use_adjoint(model, evaluations=3, on_drift="ignore")
    _, own = gradients(model, x)
    other = use_backprop(copy.deepcopy(model))
    assert all("forward" not in vars(module) for module in other.modules())
    _, found = gradients(other, x)
    assert relative_error(found, exact) == 0.0
    _, again = gradients(model, x)
    assert relative_error(again, own) == 0.0
    assert relative_error(own, exact) > 1e-7


def test_settings_of_a_copy_are_its_own() -> None:
    model, x = tower(), inputs()
    _, exact = exact_gradients(model, x)
    use_adjoint(model, evaluations=1, on_drift="ignore")
    _, coarse = gradients(model, x)
    other = use_adjoint(copy.deepcopy(model), evaluations=6, on_drift="ignore")
    _, fine = gradients(other, x)
    _, again = gradients(model, x)
    assert relative_error(fine, exact) < 1e-6
    assert relative_error(again, coarse) == 0.0
    assert relative_error(coarse, exact) > 1e-3


def test_a_block_taken_out_of_a_switched_model_still_works() -> None:
    model, x = tower(), inputs()
    block = copy.deepcopy(use_adjoint(model, on_drift="ignore").blocks[2])
    plain = use_backprop(copy.deepcopy(block))
    assert type(plain) is Block
    _, found = gradients(block, x)
    _, exact = gradients(plain, x)
    assert relative_error(found, exact) == 0.0


def test_state_dicts_go_both_ways() -> None:
    model = use_adjoint(tower(), evaluations=6, on_drift="ignore")
    plain = tower()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    plain.load_state_dict(model.state_dict(), strict=True)
    _, exact = gradients(plain, inputs())
    _, found = gradients(model, inputs())
    assert 0 < relative_error(found, exact) < 1e-5


@pytest.mark.slow
def test_a_crop_of_a_switched_model_in_stages_trains() -> None:
    """Steps of its stages hold modules that are not in the copy."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[3, 3], patch_size=2, num_labels=3
    )
    model = transformers.ConvNextForImageClassification(config).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def gradient(model: nn.Module) -> torch.Tensor:
        model.zero_grad()
        model(x).logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    use_adjoint(model, evaluations=8, on_drift="ignore")
    gradient(model)
    smaller = crop(model, remove=[1])
    for _ in range(2):
        found = gradient(smaller)
    exact = gradient(use_backprop(smaller))
    assert (found - exact).norm() < 1e-6 * exact.norm()
