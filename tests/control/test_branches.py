"""Branches of blocks left out: against blocks whose forward is written by hand."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deeplimit import (
    InputError,
    ResidualChain,
    SoftCrossEntropy,
    choose_cut,
    crop,
    turnpike_profile,
    verify_crop,
)
from deeplimit.network import TwoLayerResidual

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 20, "initializer_range": 0.3}
TEXTS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def made(cls: str, config: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings))
    with torch.no_grad():  # biases too
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.double().eval()


def llama() -> nn.Module:
    return made("LlamaForCausalLM", "LlamaConfig", vocab_size=40, num_key_value_heads=2, **SMALL)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 12, "n_layer": 4, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    return made("GPT2LMHeadModel", "GPT2Config", bos_token_id=0, eos_token_id=0, **sizes)


def bert() -> nn.Module:
    return made("BertForSequenceClassification", "BertConfig", vocab_size=40, **SMALL)


def vit() -> nn.Module:
    return made("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, **SMALL)


def pre_norm(second: str) -> Callable[[nn.Module, str, Tensor], Tensor]:
    """x + mlp(norm x), or x + attention(norm x): the other branch is not there."""

    def forward(block: nn.Module, kept: str, x: Tensor, *args: Any, **given: Any) -> Tensor:
        norm = block.get_submodule(second)
        if kept == "mlp":
            return x + block.mlp(norm(x))
        sums: list[Tensor] = []  # x + attention(norm x)
        handle = norm.register_forward_pre_hook(lambda _, entered: sums.append(entered[0]))
        type(block).forward(block, x, *args, **given)
        handle.remove()
        return sums[0]

    return forward


def post_norm(block: nn.Module, kept: str, x: Tensor, *args: Any, **given: Any) -> Tensor:
    first, second = block.attention.output.LayerNorm, block.output.LayerNorm
    if kept == "mlp":
        y = first(x)
        return second(y + block.output.dense(block.intermediate(y)))
    return second(block.attention(x, *args, **given)[0])


MODELS = {
    "Llama": (llama, TEXTS, pre_norm("post_attention_layernorm"), "self_attn"),
    "GPT-2": (gpt2, TEXTS, pre_norm("ln_2"), "attn"),
    "BERT": (bert, TEXTS, post_norm, "attention"),
    "ViT": (vit, IMAGES, pre_norm("layernorm_after"), "attention"),
}


def layers(model: nn.Module) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_block_written_without_the_branch(name: str, kind: str, tmp_path: Path) -> None:
    make, x, forward, _ = MODELS[name]
    model = make()
    cropped = crop(model, remove=[(1, kind), (2, kind)], granularity="branch")
    edited = copy.deepcopy(model)
    for n in (1, 2):
        block, kept = layers(edited)[n], "mlp" if kind == "attention" else "attention"
        block.forward = lambda h, *a, block=block, kept=kept, **k: forward(block, kept, h, *a, **k)
    z = answers(edited, x)
    assert torch.allclose(answers(cropped, x), z, rtol=0, atol=1e-12)
    assert (z - answers(model, x)).abs().max() > 1e-3
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, cropped)]
    assert sizes[1] < 0.93 * sizes[0]
    # A plain model of the class: saved as zeros, loaded without deeplimit.
    cropped.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(answers(loaded, x), z, rtol=0, atol=1e-12)
    assert {type(m) for m in loaded.modules()} == {type(m) for m in model.modules()}
    for other in (copy.deepcopy(cropped), pickle.loads(pickle.dumps(cropped))):
        assert torch.equal(answers(other, x), answers(cropped, x))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_texts_are_written_with_the_cache_as_without(name: str) -> None:
    make, x, _, attention = MODELS[name]
    cropped = crop(make(), remove=[(0, attention), (2, "mlp")], granularity="branch")
    said = [
        cropped.generate(x, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*said)


def test_all_branches_of_a_layer_are_the_layer() -> None:
    model = llama()
    cropped = crop(model, remove=[1, (2, "mlp")], granularity="branch")
    expected = crop(crop(model, remove=[1]), remove=[(1, "mlp")], granularity="branch")
    assert cropped.config.num_hidden_layers == 3
    assert torch.equal(answers(cropped, TEXTS), answers(expected, TEXTS))


def test_weights_of_the_whole_model_do_not_go_into_its_cut() -> None:
    model = llama()
    cropped = crop(model, remove=[(1, "mlp")], granularity="branch")
    cropped.load_state_dict(cropped.state_dict())
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp was left out, but there are weights"):
        cropped.load_state_dict(model.state_dict())


@pytest.mark.slow
def test_a_branch_that_does_nothing_is_chosen_first() -> None:
    model = llama()
    with torch.no_grad():
        layers(model)[1].mlp.down_proj.weight.zero_()
        layers(model)[2].self_attn.o_proj.weight.zero_()
    data = [(x, model(x).logits.argmax(-1).detach()) for x in (TEXTS, TEXTS.flip(0) // 2 + 3)]
    profile = turnpike_profile(model, data, SoftCrossEntropy(40, 0.05))
    choice = choose_cut(model, profile, data, blocks=6, protect=[-1], granularity="branch")
    assert set(choice.branches) == {(1, "mlp"), (2, "self_attn")}
    assert (choice.removed, choice.layers_after, choice.accuracy_after) == ((), (6,), 1.0)
    assert "branches kept per stage: 6 of 8" in str(choice)
    cropped = crop(model, choice)
    assert torch.allclose(answers(cropped, TEXTS), answers(model, TEXTS), rtol=0, atol=1e-12)
    report = verify_crop(model, cropped, data)
    assert report.multiply_adds_after < report.multiply_adds_before


def test_a_block_that_needs_its_modules_computes_with_zeros() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
    x = torch.randn(2, 5, 8).double()
    with pytest.warns(UserWarning, match="branch self_attn of layer 0 is zero, but still computed"):
        cropped = crop(model, remove=[(0, "self_attn")], granularity="branch")
    edited = copy.deepcopy(model)
    for p in edited.layers[0].self_attn.out_proj.parameters():
        nn.init.zeros_(p)
    assert torch.equal(cropped(x), edited(x))


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ([(1, "ffn")], r"branch \(1, 'ffn'\) to be removed; .* in this layer: \(1, 'self_attn'\)"),
        ([(9, "mlp")], r"of layers 0 … 3; in this layer: none"),
        ([0, 1, 2, 3], r"all layers 0 … 3 to be removed"),
    ],
)
def test_what_is_not_there_is_refused(remove: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        crop(llama(), remove=remove, granularity="branch")


def test_models_without_branches_are_refused() -> None:
    chain = ResidualChain([TwoLayerResidual(3, 4) for _ in range(3)])
    with pytest.raises(InputError, match="have no branches of their own; leave layers out"):
        crop(chain, remove=[(0, "mlp")], granularity="branch")
    with pytest.raises(InputError, match="bridge is fitted for layers"):
        crop(llama(), remove=[(0, "mlp")], bridge=[TEXTS], granularity="branch")


def test_the_mlp_of_a_block_that_flattens_its_tokens_is_called_so() -> None:
    sizes = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 20}
    model = made("OPTForCausalLM", "OPTConfig", vocab_size=40, word_embed_proj_dim=12, **sizes)
    named, told = (crop(model, remove=[(1, name)], granularity="branch") for name in ("fc1", "mlp"))
    assert torch.equal(answers(named, TEXTS), answers(told, TEXTS))
    assert not torch.equal(answers(named, TEXTS), answers(model, TEXTS))
