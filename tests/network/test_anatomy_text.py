"""Text models of transformers, unmodified: states, logits of every state, crops that are models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from text_families import (
    BERT,
    CLASSES,
    DECODERS,
    DEPTH,
    VOCABULARY,
    naive_text_logits,
    naive_text_walk,
    padded,
    text_model,
    words,
)
from torch import Tensor, nn

from deeplimit import InputError, crop
from deeplimit.network import anatomy

pytestmark = pytest.mark.slow

WALKED = ["GPT2LMHeadModel", "LlamaForCausalLM", BERT]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def rebuilt(model: nn.Module) -> nn.Module:
    """A new model of the configuration and the weights."""
    fresh = type(model)(model.config).double().eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("name", WALKED)
def test_states_and_their_logits_are_those_of_the_naive_walk(name: str) -> None:
    """Padding included: the model's own forward makes the masks, whoever looks on."""
    model, inputs = text_model(name), padded()
    structure = anatomy(model)
    walk = naive_text_walk(model, inputs)
    states, logits = structure.states(inputs)
    assert structure.horizon == DEPTH == len(walk) - 1
    assert (structure.stages, structure.fixed) == (1, ())
    assert structure.tokens == (name != BERT)
    for block, layer in zip(structure.blocks, range(DEPTH), strict=True):
        assert structure.control(layer) == list(block.parameters())
    for n, (mine, theirs) in enumerate(zip(states, walk, strict=True)):
        assert close(mine, theirs)
        assert n == 0 or not close(mine, walk[n - 1], 1e-3)
    assert torch.equal(logits, model(**inputs).logits)
    stacked = structure.logits(states)
    assert stacked.shape == (DEPTH + 1, *logits.shape)
    for mine, state in zip(stacked, walk, strict=True):
        assert close(mine, naive_text_logits(model, state))
    assert close(stacked[-1], logits)
    if structure.tokens:  # the head reads each token by itself
        assert close(structure.head(states[2].flatten(0, 1)), stacked[2].flatten(0, 1))


def test_a_model_that_views_its_last_state_by_the_size_of_its_inputs() -> None:
    """Each token of each state is read beside inputs of as many rows."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(
        n_layer=3, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=20
    )
    model = transformers.OpenAIGPTLMHeadModel(config).double().eval()
    x = torch.randint(VOCABULARY, (4, 10))
    structure = anatomy(model)
    states, _ = structure.states(x)
    z = structure.logits(states, x=x)
    blocks = model.transformer.h
    for depth in range(4):
        model.transformer.h = blocks[:depth]
        assert close(z[depth], model(x).logits)
    none = torch.empty(0, 16, dtype=torch.double, requires_grad=True)  # no token of a batch counts
    logits = structure.head(none)
    assert logits.shape == (0, VOCABULARY)
    logits.sum().backward()
    assert none.grad is not None


@pytest.mark.parametrize("name", WALKED)
def test_padding_does_not_matter(name: str) -> None:
    model, inputs = text_model(name), padded()
    mask = inputs["attention_mask"].bool()
    other = inputs | {"input_ids": inputs["input_ids"].where(mask, 7)}
    mine, theirs = (anatomy(model).states(x)[0][-1][mask] for x in (inputs, other))
    assert close(mine, theirs)
    unmasked = {"input_ids": inputs["input_ids"]}
    without = anatomy(model).states(unmasked)[0][-1][mask]
    assert close(mine, without, 1e-6) == (name != BERT)  # a decoder looks back only


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_states_are_its_own_hidden_states(name: str) -> None:
    """All but the last as transformers puts them out; that one it normalises."""
    model, x = text_model(name), words()
    structure = anatomy(model)
    with torch.no_grad():
        states, logits = structure.states(x)
        own = model(x, use_cache=False, output_hidden_states=True)
        assert len(own.hidden_states) == structure.horizon + 1 == DEPTH + 1
        assert all(map(torch.equal, states[:-1], own.hidden_states[:-1]))
        assert torch.equal(logits, own.logits)
        assert close(structure.head(states[-1].flatten(0, 1)), logits.flatten(0, 1))
    assert logits.shape == (3, 7, VOCABULARY)
    # Large enough for a forgotten scale or cap to show.
    assert float(logits.abs().max()) > (0.05 if name.startswith("Cohere") else 0.5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_crop_is_the_model_that_its_configuration_builds(name: str) -> None:
    """From the middle and the end; with and without a cache of keys and values."""
    model, x = text_model(name), words(2)
    cropped = crop(model, remove=[1, 4])
    config, before = cropped.config, model.config
    assert (config.num_hidden_layers, before.num_hidden_layers) == (3, DEPTH)
    for listed in ("layer_types", "no_rope_layers"):
        if isinstance(getattr(before, listed, None), list):
            old = getattr(before, listed)
            assert len(set(old)) == 2
            assert getattr(config, listed) == [old[0], old[2], old[3]]
    with torch.no_grad():
        state = anatomy(model).states(x)[0][1]
        assert torch.equal(anatomy(cropped).states(x)[0][1], state)
        z = cropped(x).logits
        assert torch.equal(rebuilt(cropped)(x).logits, z)
        assert not close(z, model(x).logits, 1e-3)
        cache, tokenwise = None, []
        for t in range(x.shape[1]):
            out = cropped(x[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokenwise.append(out.logits)
        assert close(torch.cat(tokenwise, 1), z)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(x)
    made = [
        cropped.generate(x, attention_mask=mask, use_cache=cached, **settings)
        for cached in (True, False)
    ]
    assert made[0].shape == (2, 10)
    assert torch.equal(*made)


@pytest.mark.parametrize("name", WALKED)
@pytest.mark.parametrize("depth", [1, 3, DEPTH])
def test_a_tail_crop_is_the_intermediate_output_to_the_last_bit(name: str, depth: int) -> None:
    model, inputs = text_model(name), padded()
    structure = anatomy(model)
    cropped = crop(model, depth)
    assert type(cropped) is type(model)
    with torch.no_grad():
        expected = structure.head(structure.states(inputs)[0][depth])
        assert torch.equal(cropped(**inputs).logits, expected)
        assert torch.equal(rebuilt(cropped)(**inputs).logits, expected)
        for p in cropped.parameters():
            p.zero_()
        assert float(model(**inputs).logits.abs().max()) > 0.5


def test_all_layers_cannot_be_removed() -> None:
    with pytest.raises(InputError, match=r"all layers 0 … 4 to be removed; BertForSeq.*keeps"):
        crop(text_model(BERT), 0)


def test_shared_embeddings_stay_shared() -> None:
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        model = text_model(name, tie_word_embeddings=True)
        cropped = crop(model, remove=[0, 2])
        assert cropped.lm_head.weight is cropped.get_input_embeddings().weight
        assert cropped.lm_head.weight is not model.lm_head.weight
        assert torch.equal(cropped.lm_head.weight, model.lm_head.weight)


def test_a_block_that_depends_on_its_place_keeps_it() -> None:
    model, x = text_model("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True), words()
    with pytest.raises(
        InputError,
        match=r"GPT2LMHeadModel .*scale_attn_by_inverse_layer_idx=True.* only layers at the end",
    ):
        crop(model, remove=[1])
    with pytest.raises(InputError, match="only layers at the end"):
        crop(model, remove=[1, 4])
    cropped = crop(model, remove=[4, 3])
    with torch.no_grad():
        assert torch.equal(rebuilt(cropped)(x).logits, cropped(x).logits)
        # What it refuses would have been wrong: the same blocks at other places differ.
        moved = crop(model, 3)
        moved.transformer.h = nn.ModuleList(reversed(moved.transformer.h))
        assert not close(rebuilt(moved)(x).logits, moved(x).logits, 1e-6)


@pytest.mark.parametrize("name", WALKED)
def test_half_precision(name: str) -> None:
    model, inputs = text_model(name), padded()
    z = model(**inputs).logits.detach()
    half = model.bfloat16()
    structure = anatomy(half)
    states, logits = structure.states(inputs)
    assert {s.dtype for s in states} == {logits.dtype} == {torch.bfloat16}
    assert torch.equal(structure.logits(states[-1:], first=DEPTH)[0], logits)
    assert float((logits.detach() - z).abs().max()) < 0.05 * float(z.abs().max())
    assert torch.equal(crop(half, 2)(**inputs).logits, structure.head(states[2]))


LOAD = """
import json, sys
sys.modules["deeplimit"] = None  # importing it is an error from here on
import torch, transformers
folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt")
outputs = {}
for name in json.loads(sys.argv[2]):
    model = getattr(transformers, name).from_pretrained(folder + "/" + name)
    with torch.no_grad():
        outputs[name] = model.eval()(**inputs).logits
try:
    import deeplimit
except ImportError:
    torch.save(outputs, folder + "/outputs.pt")
"""
SAVED = [*WALKED, "Qwen2ForCausalLM", "SmolLM3ForCausalLM", "Gemma3ForCausalLM"]


@pytest.mark.processes
def test_saved_crops_are_loaded_where_there_is_no_deeplimit(tmp_path: Path) -> None:
    inputs, expected = padded(), {}
    torch.save(inputs, tmp_path / "inputs.pt")
    for name in SAVED:
        cropped = crop(text_model(name), remove=[1, 2])
        cropped.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected[name] = cropped(**inputs).logits
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), json.dumps(SAVED)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    for name, z in expected.items():
        assert z.shape[-1] == (CLASSES if name == BERT else VOCABULARY)
        # Weights read from a file lie at other addresses, for which there may be other kernels.
        assert close(outputs[name], z, 1e-14), name
