"""refine and coarsen of models of transformers: plain models of the same class, at any depth."""

import copy
from pathlib import Path

import pytest
import torch
import vision_families
from smooth_networks import on_a_curve, slope
from text_families import BERT, DECODERS, DEPTH, text_model, words
from torch import Tensor, nn
from vision_families import vision

from deeplimit import InputError
from deeplimit._anatomy import Anatomy
from deeplimit.network import anatomy
from deeplimit.ode import coarsen, refine

pytestmark = pytest.mark.slow

NORMED = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x).logits


def made_alike(model: nn.Module) -> list[nn.Parameter]:
    """Makes blocks alike; returns the parameters at the ends of their residual branches."""
    first, *others = anatomy(model).blocks
    for block in others:
        block.load_state_dict(first.state_dict())
    ends = set(map(id, anatomy(model).branch_ends(first)))
    names = [name for name, p in first.named_parameters() if id(p) in ends]
    return [block.get_parameter(name) for block in (first, *others) for name in names]


@torch.no_grad()
def scale(parameters: list[nn.Parameter], by: float) -> None:
    for p in parameters:
        p.mul_(by)


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in NORMED])
def test_a_decoder_is_refined(name: str) -> None:
    """Its configuration builds it; where layers are alike and do little, halves do what one did."""
    model, x = text_model(name), words(1, 4)
    ends = made_alike(model)
    scale(ends, 1e-3)
    fine = refine(model, 2)
    assert type(fine) is type(model)
    assert (fine.config.num_hidden_layers, model.config.num_hidden_layers) == (2 * DEPTH, DEPTH)
    for listed in ("layer_types", "no_rope_layers"):
        old = getattr(model.config, listed, None)
        if isinstance(old, list):
            assert getattr(fine.config, listed) == [kind for kind in old for _ in range(2)]
    assert {id(m.config) for m in fine.modules() if hasattr(m, "config")} == {id(fine.config)}
    rebuilt = type(fine)(fine.config).double()
    rebuilt.load_state_dict(fine.state_dict())
    z = logits(fine, x)
    assert torch.equal(logits(rebuilt, x), z)
    if name in COARSENED:
        back = coarsen(fine, 2)
        assert back.config.to_dict() == model.config.to_dict()
        assert torch.equal(logits(back, x), logits(model, x))
    gap = float((z - logits(model, x)).norm())
    scale(ends, 0)
    assert gap < 0.02 * float((z - logits(model, x)).norm())


COARSENED = ("GPT2LMHeadModel", "Olmo2ForCausalLM", "Qwen2ForCausalLM", "SmolLM3ForCausalLM")


# Layers in runs of two or more that are alike: [3, 1, 2] blocks, some of which change the shape.
CHANGED = {
    "ViT": 4,
    "DINOv2": 4,
    "ResNet, basic": 3,
    "ResNet, basic, strided from the start": 2,
    "ResNet, bottleneck": 2,
    "ConvNeXt": 5,
    "ConvNeXt V2": 5,
}


@pytest.mark.parametrize("name", CHANGED)
def test_an_image_classifier_is_refined(name: str) -> None:
    found = vision(name)
    model = found.model
    fine = refine(model, 2)
    structure = anatomy(fine)
    assert structure.horizon == found.depth + CHANGED[name]
    rebuilt = type(fine)(fine.config).double()
    rebuilt.load_state_dict(fine.state_dict())
    assert torch.equal(logits(rebuilt, found.x), logits(fine, found.x))
    back = coarsen(fine, 2)
    assert torch.equal(logits(back, found.x), logits(model, found.x))


ENDS = {
    "ViT": ("attention.o_proj", "mlp.fc2"),
    "DINOv2": ("layer_scale1", "layer_scale2"),
    "ResNet, basic": ("layer.1.normalization",),
    "ResNet, bottleneck": ("layer.2.normalization",),
    "ConvNeXt": ("layer_scale_parameter",),
    "ConvNeXt V2": ("pwconv2",),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_ends_of_branches_are_halved_and_the_rest_interpolated(name: str) -> None:
    model = vision(name).model
    read, fine = anatomy(model), anatomy(refine(model, 2))
    first = 1 if name == "ResNet, bottleneck" else 0  # layer 0 changes the shape
    old = [layer.controls[0] for layer in read.layers[first : first + 2]]
    new = [layer.controls[0] for layer in fine.layers[first : first + 2]]
    for key, p in new[1].named_parameters():
        mean = (old[0].get_parameter(key) + old[1].get_parameter(key)) / 2
        by = 2 if key.startswith(ENDS[name]) else 1
        assert torch.allclose(p, mean / by, rtol=1e-14, atol=1e-15), key
        assert torch.equal(new[0].get_parameter(key), old[0].get_parameter(key) / by), key


def vit(horizon: int) -> nn.Module:
    """Its layers on a smooth curve, with updates of O(1/N)."""
    t = vision_families.transformers
    config = t.ViTConfig(
        **vision_families.TOKENS | {"num_hidden_layers": horizon, "hidden_size": 8},
        intermediate_size=8,
    )
    torch.manual_seed(0)
    model = t.ViTForImageClassification(config).double()
    read = anatomy(model)
    on_a_curve(list(read.blocks), horizon)
    with torch.no_grad():
        for block in read.blocks:
            for p in read.branch_ends(block):
                p.div_(horizon)
    return model


def test_of_a_vit_the_state_and_the_next_step_change_by_the_first_order() -> None:
    depths, states, effects = (4, 16), [], []
    x = vision("ViT").x
    for n in depths:
        read = anatomy(vit(n))
        optimizer = torch.optim.AdamW(read.model.parameters(), lr=1e-5, betas=(0.6, 0.7))
        for _ in range(2):
            moved(read, optimizer, x)
        model, carried = copy.deepcopy((read.model, optimizer))
        new = anatomy(refine(model, 2, optimizer=carried))
        end = last_state(read, x)
        states.append(float((last_state(new, x) - end).norm() / end.norm()))
        before, after = moved(read, optimizer, x), moved(new, carried, x)
        effects.append(float((after - before).norm() / before.norm()))
    assert slope(depths, states) == pytest.approx(-1, abs=0.2)
    assert slope(depths, effects) < -0.7
    assert effects[-1] < 0.15


def last_state(read: Anatomy, x: Tensor) -> Tensor:
    with torch.no_grad():
        return read.states(x)[0][-1]


def moved(read: Anatomy, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """How far a step moves the last state."""
    before = last_state(read, x)
    optimizer.zero_grad()
    read.states(x)[0][-1].square().mean().backward()
    optimizer.step()
    return last_state(read, x) - before


def test_saved_it_is_loaded_by_plain_transformers(tmp_path: Path) -> None:
    t = vision_families.transformers
    for name, cls in (("ViT", t.ViTForImageClassification), ("ResNet, basic", None)):
        found = vision(name)
        fine = refine(found.model, 3)
        fine.save_pretrained(tmp_path / name)
        loaded = (cls or type(fine)).from_pretrained(tmp_path / name, dtype=torch.float64)
        assert torch.allclose(logits(loaded, found.x), logits(fine, found.x), rtol=1e-12)
        assert not torch.allclose(logits(loaded, found.x), logits(found.model, found.x), rtol=1e-3)


def test_what_a_backbone_puts_out_moves_along() -> None:
    model = vision("DINOv2").model  # puts out stages 2 and 4
    config = refine(model, 3).config
    assert (config.num_hidden_layers, config.out_features) == (12, ["stage6", "stage12"])
    assert config.stage_names == ["stem", *(f"stage{n}" for n in range(1, 13))]


@pytest.mark.parametrize("name", NORMED)
def test_norms_of_one_plus_weight_are_refused(name: str) -> None:
    says = r"post_attention_layernorm\.weight, .* at 0 .* last norm multiplies by 1 \+ weight"
    with pytest.raises(InputError, match=says):
        refine(text_model(name), 2)


def test_models_whose_blocks_are_no_steps_are_refused() -> None:
    with pytest.raises(InputError, match=r"BertLayer end .* a norm behind the addition"):
        refine(text_model(BERT), 2)
    model = text_model("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        InputError, match=r"depth cannot be changed: .*scale_attn_by_inverse_layer_idx=True"
    ):
        refine(model, 2)
    with torch.device("meta"):
        empty = vision_families.transformers.ViTForImageClassification(
            vision_families.transformers.ViTConfig(**vision_families.TOKENS, intermediate_size=8)
        )
    with pytest.raises(InputError, match="meta device"):
        refine(empty, 2)


def test_layers_unlike_the_others_are_said_to_stay() -> None:
    class Step(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(5, hidden), nn.Linear(hidden, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.outer(torch.tanh(self.inner(x)))

    model = nn.Sequential(nn.Linear(4, 5), Step(7), Step(7), Step(6), nn.Linear(5, 3)).double()
    with pytest.warns(UserWarning, match="left as they are in Sequential: layers 2, whose blocks"):
        assert anatomy(refine(model, 2)).horizon == 5
