"""A cut model is what its configuration builds, or is refused."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from deeplimit import crop
from deeplimit.errors import InputError
from deeplimit.network import anatomy

pytestmark = pytest.mark.slow

hf = pytest.importorskip("transformers", reason="the extra `hub` is not installed")

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip
NEO = {
    "vocab_size": 50, "hidden_size": 16, "num_layers": 6, "num_heads": 2, "intermediate_size": 16,
    "attention_types": [[["global", "local"], 3]], "window_size": 4, "max_position_embeddings": 32,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
FULL, SLIDING = "full_attention", "sliding_attention"


CASES = {
    "Mixtral": ({**SMALL, "num_local_experts": 2}, {}),
    "Qwen2": (
        {**SMALL, **WINDOWS},
        {"max_window_layers": 1, "layer_types": [FULL] + [SLIDING] * 3},
    ),
    "Qwen3Moe": (
        {**SMALL, **MOE, "mlp_only_layers": [4], "decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1},
    ),
    "DeepseekV3": ({**SMALL, **DEEPSEEK, "first_k_dense_replace": 3}, {"first_k_dense_replace": 1}),
    "GPTNeo": (NEO, {"attention_layers": ["global", "local", "global", "local"]}),
}


def made(name: str) -> nn.Module:
    config = getattr(hf, f"{name}Config")(**CASES[name][0])
    torch.manual_seed(0)
    return getattr(hf, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", CASES)
def test_a_cut_from_the_middle_is_loaded_as_it_is(name: str, tmp_path: Path) -> None:
    """By plain transformers, with the weights strictly; more tokens than a window."""
    model = made(name)
    state = torch.get_rng_state()
    cropped = crop(model, remove=[1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert cropped.config.num_hidden_layers == 4
    for key, value in CASES[name][1].items():
        assert getattr(cropped.config, key) == value
    assert model.config.num_hidden_layers == 6
    cropped.save_pretrained(tmp_path)
    again, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    x = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(anatomy(model).run(x), model(x).logits)
        assert torch.equal(again.eval()(x).logits, cropped(x).logits)
    assert all(p.requires_grad for p in cropped.parameters())


def test_a_cut_that_breaks_the_rule_of_the_layers_is_refused(tmp_path: Path) -> None:
    """Jamba: every fourth layer attends, every second has experts; nothing else can be said."""
    rule = {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 2}
    mamba = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 4}
    experts = {"expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
    config = hf.JambaConfig(**SMALL | {"num_hidden_layers": 8}, **rule, **mamba, **experts)
    torch.manual_seed(0)
    model = hf.JambaForCausalLM(config).eval()
    for removed in ([2], [3, 5]):
        says = r"Jamba.* built again .* attn_layer_offset=1\. .* places that follow a rule"
        with pytest.raises(InputError, match=says):
            crop(model, remove=removed)
    cropped = crop(model, remove=[2, 3, 4, 5])
    assert [type(block) for block in cropped.model.layers] == [
        type(model.model.layers[n]) for n in (0, 1, 6, 7)
    ]
    cropped.save_pretrained(tmp_path)
    again = hf.JambaForCausalLM.from_pretrained(tmp_path).eval()
    x = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(again(x).logits, cropped(x).logits)


def test_a_class_that_does_not_ask_its_configuration_is_refused() -> None:
    class Six(hf.LlamaForCausalLM):
        def __init__(self, config) -> None:
            super().__init__(config)
            block = hf.models.llama.modeling_llama.LlamaDecoderLayer
            self.model.layers = nn.ModuleList(block(config, n) for n in range(6))

    model = Six(hf.LlamaConfig(**SMALL)).eval()
    says = r"Six cannot be built again .*model\.layers\.\*\.input_layernorm\.weight \(not there"
    for keep in (3, 5):
        with pytest.raises(InputError, match=says):
            crop(model, keep)


PLACE = importlib.import_module("deeplimit._anatomy.other_depths")
Updating = Callable[[nn.Module, dict[str, int], dict[str, list[int]]], None]


@pytest.fixture
def updating(monkeypatch: pytest.MonkeyPatch) -> Callable[[Updating], None]:
    """Puts another function in place of what brings the configuration up to date."""
    return lambda function: monkeypatch.setattr(PLACE, "set_depths", function)


def test_a_configuration_that_is_not_brought_up_to_date_is_refused(updating) -> None:
    model = made("Mixtral")
    updating(lambda model, before, kept: None)
    says = r"Mixtral.* cannot be built again .*model\.layers.*num_hidden_layers=6"
    for removed in ([2, 3], [4, 5]):
        with pytest.raises(InputError, match=says):
            crop(model, remove=removed)


def test_what_the_logits_do_not_show_is_seen_in_the_modules(updating) -> None:
    """A window longer than the example: the layers' own words differ."""
    model = made("Qwen2")

    def count(model: nn.Module, before: dict[str, int], kept: dict[str, list[int]]) -> None:
        (layers,) = kept.values()
        model.config.num_hidden_layers = len(layers)
        model.config.layer_types = model.config.layer_types[: len(layers)]

    updating(count)
    with pytest.raises(InputError, match=r"sliding_window \(8, built None\)"):
        crop(model, remove=[1, 2])


def test_what_the_configuration_never_said_is_not_held_against_a_cut() -> None:
    model = made("Mixtral")
    model.lm_head = nn.Linear(16, 7)
    assert crop(model, 3).config.num_hidden_layers == 3
