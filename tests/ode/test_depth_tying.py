"""tie and untie: who shares what, the function before and after, and all else on tied networks."""

import copy
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES, sample
from smooth_networks import MAKERS, WIDTH, batch, slope, smooth_chain
from torch import Tensor, nn
from vision_families import vision

from deeplimit import InputError, crop, use_adjoint
from deeplimit.network import (
    Architecture,
    CifarResNet,
    LinearResidual,
    ResidualChain,
    anatomy,
    load,
    save,
)
from deeplimit.ode import refine, tie, untie
from deeplimit.training.models import load_network, save_network

LONG = [name for name in FAMILIES if name not in ("CIFAR ResNet, cut",)]


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(getattr(model, "blocks", model))


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", MAKERS)
def test_groups_share_the_mean_of_their_controls(kind: str, every: int) -> None:
    """Five layers; the last group is smaller; of Heun six controls."""
    model = MAKERS[kind](5)
    before, x = copy.deepcopy(model), batch()
    tied = tie(model, every)
    blocks, shared = blocks_of(model), blocks_of(tied)
    for name, _ in blocks[0].named_parameters():
        for n, block in enumerate(shared):
            group = range(n - n % every, min(n - n % every + every, len(blocks)))
            mean = sum(blocks[i].get_parameter(name) for i in group) / len(group)
            mine = block.get_parameter(name)
            assert torch.allclose(mine, mean, rtol=1e-14, atol=1e-15)
            assert [i for i, b in enumerate(shared) if b.get_parameter(name) is mine] == list(group)
            before.get_parameter(f"blocks.{n}.{name}" if kind == "folded" else f"{n}.{name}")
    assert list(tied.state_dict()) == list(model.state_dict())
    assert len(set(shared)) == len(blocks)  # parameters are shared, not modules
    before.load_state_dict(tied.state_dict())
    assert torch.equal(output(before, x), output(tied, x))
    own = untie(tied)
    assert torch.equal(output(own, x), output(tied, x))
    assert len(list(own.parameters())) == len(list(model.parameters()))
    assert list(own.state_dict()) == list(model.state_dict())
    with torch.no_grad():  # independent
        for p in (*tied.parameters(), *own.parameters()):
            p.zero_()
    assert float(output(model, x).abs().max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_of_smooth_controls_the_function_changes_by_the_second_order(kind: str) -> None:
    depths, x, errors = (8, 16, 32, 64), batch(), []
    for n in depths:
        model = MAKERS[kind](n)
        errors.append(float((output(tie(model, 2), x) - output(model, x)).norm()))
    assert slope(depths, errors) == pytest.approx(-2, abs=0.3)


@pytest.mark.parametrize("name", LONG)
def test_layers_that_are_alike_lose_nothing(name: str, tmp_path: Path) -> None:
    """Tied, to the last bit the same; saved, loaded, copied, cut: the right function."""
    found = sample(name)
    model = tie(found.model, 7).eval()  # whole stages
    again = tie(untie(model), 7)
    assert torch.equal(output(again, found.x), output(model, found.x))
    twin = copy.deepcopy(model)
    assert len(list(twin.parameters())) == len(list(model.parameters()))
    assert len(list(model.parameters())) < len(list(found.model.parameters()))
    depth = found.depth - 1
    expected = anatomy(untie(model)).without([depth])
    assert torch.equal(output(crop(model, remove=[depth]), found.x), output(expected, found.x))
    if not isinstance(model, ResidualChain):
        if isinstance(model, CifarResNet):  # whose figures are in the architecture
            model.standardise(torch.full((3,), 0.5), torch.full((3,), 0.25))
        loaded = load(save(model, tmp_path / "tied.safetensors"))
        z = output(loaded.double(), found.x)
        assert torch.allclose(z, output(model, found.x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Euler", "folded"])
def test_the_adjoint_adds_up_the_gradients_of_what_is_shared(kind: str) -> None:
    """Switched before or after it was tied."""
    model, x = tie(MAKERS[kind](32), 4), batch()
    model(x).square().sum().backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    for switched in (
        use_adjoint(copy.deepcopy(model), evaluations=4),
        tie(use_adjoint(MAKERS[kind](32), evaluations=4), 4),
    ):
        switched.zero_grad()
        switched(x).square().sum().backward()
        for name, p in switched.named_parameters():
            assert float((p.grad - exact[name]).norm() / exact[name].norm()) < 1e-5
        own = untie(switched)
        own(x).square().sum().backward()
        for name in exact:
            same = [p.grad for n, p in own.named_parameters() if _tied_to(model, n, name)]
            total = torch.stack(same).sum(0)
            assert float((total - exact[name]).norm() / exact[name].norm()) < 1e-5
    assert len(same) in (1, 4)


def _tied_to(model: nn.Module, name: str, first: str) -> bool:
    return model.get_parameter(name) is model.get_parameter(first)


@pytest.mark.slow
def test_a_tied_model_of_transformers_is_saved_untied(tmp_path: Path) -> None:
    found = vision("ViT")
    tied = tie(found.model.eval(), 2)
    with pytest.raises(RuntimeError, match="shared tensors"):
        tied.save_pretrained(tmp_path / "plain")
    save_network(tied, tmp_path / "model")
    loaded = load_network(tmp_path / "model", lambda: tied)
    with torch.no_grad():
        expected = tied(found.x).logits
        assert torch.allclose(loaded.double()(found.x).logits, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not torch.allclose(found.model(found.x).logits, expected, rtol=1e-2)


def test_buffers_stay_each_layers_own() -> None:
    model = sample("convolutional, batch").model
    tied = tie(model, 3)
    for block, old in zip(tied.stages[0], model.stages[0], strict=True):
        assert torch.equal(block.norm1.running_mean, old.norm1.running_mean)
    means = {block.norm1.running_mean.data_ptr() for block in tied.stages[0]}
    assert len(means) == 3


def test_a_module_that_is_several_steps_is_untied_too() -> None:
    block = smooth_chain(1)[0]
    chain = ResidualChain([block, block, block], step=0.5)
    own = untie(chain)
    assert len(set(own)) == 3
    assert torch.equal(output(own, batch()), output(chain, batch()))
    refine(own, 2)


def test_what_is_refused() -> None:
    model = smooth_chain(4)
    for every in (0, -1, True):
        with pytest.raises(InputError, match=r"every is .*; expected a whole number ≥ 1"):
            tie(model, every)
    with pytest.raises(InputError, match=r"share parameters; give untie\(model\)"):
        tie(tie(model, 2), 4)
    with pytest.raises(InputError, match="no stage of two layers or more"):
        tie(ResidualChain([LinearResidual(WIDTH)]), 2)
    with pytest.raises(InputError, match="no stack of blocks in Linear"):
        untie(nn.Linear(2, 2))
    for change in (lambda m: tie(m, 2), untie):
        with pytest.raises(InputError, match="on the meta device"):
            change(smooth_chain(4).to("meta"))
    unlike = Architecture("convolutional", (3, 8, 8), 3, (2, 2), 2, 2).build()
    unlike.stages[1][0] = nn.Identity()
    tied = tie(unlike, 2)  # the other stage can be tied
    assert tied.stages[0][0].conv1.weight is tied.stages[0][1].conv1.weight
