"""Between a model and its crop lies a path: s = 1 is the one, s = 0 the other."""

import copy

import pytest
import torch
from torch import nn

from deeplimit import Heun, InputError, ResidualChain, crop
from deeplimit.control import Fading
from deeplimit.control.cropping import FadedForward
from deeplimit.network import Architecture, CifarArchitecture, TwoLayerResidual

GONE = (1, 3)


def _chain() -> tuple[nn.Module, torch.Tensor]:
    return ResidualChain([TwoLayerResidual(3, 5, "tanh") for _ in range(5)]), torch.randn(4, 3)


def _classifier() -> tuple[nn.Module, torch.Tensor]:
    built = Architecture("convolutional", (1, 8, 8), 3, (3, 2), width=4, hidden=4).build()
    return built, torch.rand(4, 1, 8, 8)


def _cifar() -> tuple[nn.Module, torch.Tensor]:
    return CifarArchitecture((4, 2, 2)).build(), torch.rand(4, 3, 8, 8)


def _vit() -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=5, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), torch.rand(4, 3, 8, 8)


MODELS = {"chain": _chain, "two stages": _classifier, "cifar": _cifar, "vit": _vit}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    with torch.no_grad():  # away from initial values, at which updates may vanish
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.double().eval(), x.double()


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_its_ends_are_the_model_and_its_crop_to_the_last_bit(name: str) -> None:
    model, x = made(name)
    keys = list(model.state_dict())
    with Fading(model, GONE) as fade:
        assert torch.equal(outputs(model, x), outputs(copy.deepcopy(made(name)[0]), x))
        fade.set_step(0.0)
        assert torch.equal(outputs(model, x), outputs(crop(made(name)[0], remove=GONE), x))
        middle = []
        for step in (0.5, 0.5 + 1e-6):
            fade.set_step(step)
            middle.append(outputs(model, x))
        change = float((middle[1] - middle[0]).norm() / middle[0].norm())
        assert 0 < change < 1e-4
    assert list(model.state_dict()) == keys
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(outputs(model, x), outputs(made(name)[0], x))


def test_half_a_step_of_a_chain_is_half_its_update() -> None:
    chain, x = made("chain")
    with Fading(chain, [2]) as fade:
        fade.set_step(0.5)
        states = chain.trajectory(x)
    assert torch.allclose(states[3] - states[2], 0.5 * chain[2](states[2]), rtol=1e-13)


@pytest.mark.parametrize("name", ["cifar", "vit"])
def test_half_a_step_of_a_block_is_halfway_to_its_output(name: str) -> None:
    model, x = made(name)
    seen = []
    with Fading(model, [1]) as fade:
        (block,) = (m for m in model.modules() if isinstance(vars(m).get("forward"), FadedForward))
        block.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
        fade.set_step(0.5)
        outputs(model, x)
        (before, after) = seen[0]
        whole = type(block).forward(block, before)
    assert torch.allclose(after, (before + whole) / 2, rtol=1e-13)


def test_a_block_that_changes_the_shape_fades_into_its_shortcut() -> None:
    model, x = made("cifar")
    with Fading(model, [4]) as fade:
        fade.set_step(0.0)
        assert torch.equal(model(x), crop(made("cifar")[0], remove=[4])(x))
        fade.set_step(1 - 1e-6)
        near = model(x)
    assert 0 < float((near - model(x)).norm() / near.norm()) < 1e-4


def test_what_is_learnt_while_fading_stays() -> None:
    chain, x = made("chain")
    with Fading(chain.train(), [1]) as fade:
        fade.set_step(0.5)
        chain(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in chain.parameters())
        with torch.no_grad():
            for p in chain.parameters():
                p -= 0.1 * p.grad
        fade.set_step(0.0)
        ended = chain(x)
    assert torch.equal(crop(chain, remove=[1])(x), ended)


def test_wrong_requests_are_refused() -> None:
    cifar, _ = made("cifar")
    with pytest.raises(InputError, match="layer 8 to be removed: the model has layers 0 … 7"):
        Fading(cifar, [8])
    heun = ResidualChain([TwoLayerResidual(3, 5) for _ in range(4)], scheme=Heun())
    with pytest.raises(InputError, match="layer 1 shares its controls"):
        Fading(heun, [1])
    with Fading(cifar, [1]) as fade, pytest.raises(InputError, match=r"step is 1\.5"):
        fade.set_step(1.5)


@pytest.mark.slow
def test_a_cache_is_filled_by_faded_layers_too() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=12, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.randint(20, (2, 8))
    cut = crop(model, remove=[0, 1])
    with Fading(model, [0, 1]) as fade, torch.no_grad():
        fade.set_step(0.0)
        first = model(tokens[:, :5], use_cache=True)
        rest = model(tokens[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        assert torch.allclose(rest.logits, cut(tokens).logits[:, 5:], rtol=1e-12, atol=1e-12)


def test_a_block_called_by_keyword_fades() -> None:
    model, x = made("vit")
    block = model.vit.layers[1]
    whole = block(hidden_states=x.new_ones(2, 3, 8))
    with Fading(model, [1]) as fade:
        fade.set_step(0.5)
        half = block(hidden_states=x.new_ones(2, 3, 8))
    assert torch.allclose(half, (1 + whole) / 2, rtol=1e-13)


@pytest.mark.slow
def test_a_crop_of_a_fading_model_does_not_fade() -> None:
    model, x = made("vit")
    expected = outputs(crop(model, remove=[1]), x)
    with Fading(model, [1, 2]) as fade:
        fade.set_step(0.5)
        smaller = crop(model, remove=[1])
        with pytest.raises(InputError, match="layer 2 fades already"):
            Fading(model, [2, 3])
    assert torch.equal(outputs(smaller, x), expected)


def test_what_cannot_be_cut_does_not_fade() -> None:
    model, _ = made("vit")
    with pytest.raises(InputError, match="all layers 0 … 4 to be removed"):
        Fading(model, range(5))
