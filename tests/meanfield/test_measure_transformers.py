"""LayerwiseMeasure of models of transformers: their MLPs, and the configuration's width."""

from collections.abc import Callable

import pytest
import torch
from measured_networks import relative
from text_families import text_model, words
from torch import Tensor, nn
from vision_families import vision

from deeplimit import InputError
from deeplimit.meanfield import LayerwiseMeasure, cot_distance, cot_geodesic, widen

pytestmark = pytest.mark.slow

TEXT = ("GPT2LMHeadModel", "LlamaForCausalLM", "PhiForCausalLM", "ArceeForCausalLM")
IMAGES = ("ViT", "DINOv2")


def loaded(name: str) -> tuple[nn.Module, Tensor]:
    if name in IMAGES:
        made = vision(name)
        return made.model.eval(), made.x
    return text_model(name), words()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("name", [*TEXT, *IMAGES])
def test_the_network_comes_back_and_can_be_widened(name: str, tmp_path) -> None:
    model, x = loaded(name)
    expected = logits(model, x)
    measure = LayerwiseMeasure.of(model)
    generator = torch.Generator().manual_seed(0)
    mixed = [layer[torch.randperm(len(layer), generator=generator)] for layer in measure.layers]
    assert relative(logits(measure.network(), x), expected) < 1e-12
    other = LayerwiseMeasure(mixed, frame=measure.frame)
    assert relative(logits(other.network(), x), expected) < 1e-12
    wide = widen(model, 2)
    assert relative(logits(wide, x), expected) < 1e-12
    wide.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert relative(logits(again.eval(), x), expected) < 1e-12


def naive_gpt2(particles: Tensor, x: Tensor) -> Tensor:
    u, w, b = particles.split([16, 16, 1], dim=1)
    return nn.functional.gelu(x @ w.T + b.T, approximate="tanh") @ u


def naive_llama(particles: Tensor, x: Tensor) -> Tensor:
    u, w, v = particles.split(16, dim=1)
    return (nn.functional.silu(x @ w.T) * (x @ v.T)) @ u


@pytest.mark.parametrize(
    ("name", "naive"), [("GPT2LMHeadModel", naive_gpt2), ("LlamaForCausalLM", naive_llama)]
)
def test_an_mlp_is_the_mean_of_its_particles(name: str, naive: Callable) -> None:
    model, _ = loaded(name)
    measure = LayerwiseMeasure.of(model)
    blocks = model.transformer.h if "GPT2" in name else model.model.layers
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for block, layer in zip(blocks, measure.layers, strict=True):
        mean = naive(layer, x) / len(layer) / len(blocks)
        bias = block.mlp.c_proj.bias if "GPT2" in name else 0
        assert relative(mean + bias, block.mlp(x[None])[0]) < 1e-12


def test_layers_with_attention_cannot_be_divided() -> None:
    model, x = loaded("ViT")
    shorter = LayerwiseMeasure.of(model.__class__(model.config.__class__(**SHORT)).double())
    longer = LayerwiseMeasure.of(model)
    assert cot_distance(longer, shorter).distance > 0
    with pytest.raises(InputError, match="cannot be divided in depth"):
        cot_geodesic(longer, shorter, 0.5)
    other = vision("ViT", seed=1).model.eval()
    with pytest.raises(InputError, match='the frame "interpolate"'):
        cot_geodesic(model, other, 0.5)
    ends = [cot_geodesic(model, other, t, frame="interpolate").network() for t in (0.0, 1.0)]
    assert relative(logits(ends[0], x), logits(model, x)) < 1e-12
    assert relative(logits(ends[1], x), logits(other, x)) < 1e-12


SHORT = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
    "intermediate_size": 24,
}


def test_fused_gates_and_coupled_layers_are_refused() -> None:
    with pytest.raises(InputError, match="Phi3DecoderLayer is not a mean of particles"):
        LayerwiseMeasure.of(text_model("Phi3ForCausalLM"))
    with pytest.raises(InputError, match="ConvNextV2Layer is not a mean of particles"):
        LayerwiseMeasure.of(vision("ConvNeXt V2").model)
    with pytest.raises(InputError, match="activation XIELUActivation has parameters"):
        LayerwiseMeasure.of(text_model("ApertusForCausalLM"))
