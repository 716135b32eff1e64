"""Anatomies of torchvision's and timm's image classifiers, where these libraries are installed."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from model_families import shaken
from torch import Tensor, nn

from deeplimit import SoftCrossEntropy, StageCost, crop
from deeplimit.network import anatomy

CLASSES = 3


def library(name: str) -> object:
    """A library, or a skip; one that does not fit the installed torch fails in its own ways."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def _torchvision_resnet(block: str, **more: int) -> nn.Module:
    models = library("torchvision.models")
    kind = getattr(models.resnet, block)
    return models.ResNet(kind, [2, 1, 1, 2], num_classes=CLASSES, **more)


def _torchvision_convnext() -> nn.Module:
    convnext = library("torchvision.models.convnext")
    sizes = [(4, 6, 2), (6, 8, 1), (8, None, 2)]
    return convnext.ConvNeXt([convnext.CNBlockConfig(*s) for s in sizes], num_classes=CLASSES)


def _torchvision_vit() -> nn.Module:
    return library("torchvision.models").VisionTransformer(32, 8, 4, 2, 16, 24, num_classes=CLASSES)


def _timm(name: str, **more: object) -> nn.Module:
    return library("timm").create_model(name, num_classes=CLASSES, **more)


NARROW = {"layers": [2, 1, 1, 2], "channels": (8, 8, 12, 16)}
CONVNEXT = {"depths": [2, 1, 0, 2], "dims": [4, 6, 8, 10]}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
RESNET_STAGES = {"BasicBlock": (0, 0, 0, 1, 2, 3, 3), "Bottleneck": (0, 1, 1, 2, 3, 4, 4)}


@dataclass(frozen=True)
class Case:
    """How a model is made, and the stage of each of its states."""

    make: Callable[[], nn.Module]
    stages: tuple[int, ...]


BASIC, NECK, ONE = RESNET_STAGES["BasicBlock"], RESNET_STAGES["Bottleneck"], (0,) * 5
CASES = {
    "torchvision ResNet": Case(lambda: _torchvision_resnet("BasicBlock"), BASIC),
    "torchvision ResNeXt": Case(
        lambda: _torchvision_resnet("Bottleneck", groups=2, width_per_group=8), NECK
    ),
    "torchvision Wide ResNet": Case(
        lambda: _torchvision_resnet("Bottleneck", width_per_group=32), NECK
    ),
    "torchvision ConvNeXt": Case(_torchvision_convnext, (0, 0, 1, 2, 2, 2)),
    "torchvision ViT": Case(_torchvision_vit, ONE),
    "timm ResNet": Case(lambda: _timm("resnet18", **NARROW), NECK),
    "timm ResNet-D": Case(lambda: _timm("resnet50d", **NARROW), NECK),
    "timm SE-ResNet": Case(lambda: _timm("seresnet50", **NARROW), NECK),
    "timm SK-ResNet": Case(lambda: _timm("skresnet18", layers=[2, 1, 1, 2]), BASIC),
    "timm Res2Net": Case(lambda: _timm("res2net50_26w_4s", **NARROW), NECK),
    "timm ConvNeXt": Case(lambda: _timm("convnext_atto", **CONVNEXT), (0, 0, 1, 3, 3, 3)),
    "timm ConvNeXt V2": Case(lambda: _timm("convnextv2_atto", **CONVNEXT), (0, 0, 1, 3, 3, 3)),
    "timm ConvNeXt, norm first": Case(
        lambda: _timm("convnext_atto", head_norm_first=True, **CONVNEXT), (0, 0, 1, 3, 3, 3)
    ),
    "timm ViT": Case(lambda: _timm("vit_tiny_patch16_224", **VIT), ONE),
    "timm ViT, mean and registers": Case(
        lambda: _timm("vit_tiny_patch16_224", global_pool="avg", reg_tokens=2, **VIT), ONE
    ),
    "timm DeiT": Case(lambda: _timm("deit_tiny_distilled_patch16_224", **VIT), ONE),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    """Name, model in evaluation mode, inputs."""
    torch.manual_seed(0)
    model = shaken(CASES[request.param].make()).eval()
    return request.param, model, torch.randn(3, 3, 32, 32, dtype=torch.float64)


def naive_walk(model: nn.Module, x: Tensor, removed: tuple[int, ...] = ()) -> list[Tensor]:
    """The states x_0 … x_N, written out."""
    parts: list[list[nn.Module]]
    if hasattr(model, "layer1"):
        stem = [model.conv1, model.bn1, model.relu if hasattr(model, "relu") else model.act1]
        x = model.maxpool(nn.Sequential(*stem)(x))
        parts = [list(getattr(model, f"layer{m}")) for m in range(1, 5)]
        before: list[nn.Module] = []
    elif hasattr(model, "features"):
        x = model.features[0](x)
        parts = [list(stage) for stage in model.features[1::2]]
        before = [nn.Identity(), *model.features[2::2]]
    elif hasattr(model, "stages"):
        x = model.stem(x)
        parts = [list(stage.blocks) for stage in model.stages]
        before = [stage.downsample for stage in model.stages]
    elif hasattr(model, "conv_proj"):
        x = model.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1)
        x, parts, before = x + model.encoder.pos_embedding, [list(model.encoder.layers)], []
    else:
        x = model._pos_embed(model.patch_embed(x))
        parts, before = [list(model.blocks)], []
    states, n = [], 0
    for m, blocks in enumerate(parts):
        x = before[m](x) if before else x
        for block in blocks:
            if n not in removed:
                states.append(x)
                x = block(x)
            n += 1
    return [*states, x]


def naive_logits(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """The logits of a state, in evaluation mode."""
    if hasattr(model, "layer1"):
        blocks = [b for m in range(1, 5) for b in getattr(model, f"layer{m}")]
        for block in [b for b in blocks if b.downsample is not None][stage:]:
            x = block.downsample(x).clamp(min=0)
        return model.fc(x.mean((2, 3)))
    if hasattr(model, "features"):
        for downsampling in model.features[2::2][stage:]:
            x = downsampling(x)
        return model.classifier(x.mean((2, 3), keepdim=True))
    if hasattr(model, "stages"):
        for later in model.stages[stage + 1 :]:
            x = later.downsample(x)
        return model.head(model.norm_pre(x))
    if hasattr(model, "conv_proj"):
        return model.heads(model.encoder.ln(x[:, 0]))
    x = model.norm(x)
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    x = x[:, 0] if model.global_pool == "token" else model.fc_norm(x[:, 3:].mean(1))
    return model.head(x)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_states_logits_and_cuts_are_the_naive_ones(case: tuple[str, nn.Module, Tensor]) -> None:
    name, model, x = case
    stages, structure = CASES[name].stages, anatomy(model)
    walk = naive_walk(model, x)
    states, logits = structure.states(x)
    there = sorted(set(stages))  # a stage without blocks is none
    assert structure.state_stages == tuple(map(there.index, stages))
    assert all(map(close, states, walk))
    assert torch.equal(logits, model(x))
    z = structure.logits(states)
    for n, (stage, state) in enumerate(zip(stages, walk, strict=True)):
        assert close(z[n], naive_logits(model, stage, state))
    assert close(z[-1], logits)
    assert not any(close(z[n], z[n + 1]) for n in range(len(z) - 1))
    weights = copy.deepcopy(model.state_dict())
    assert close(crop(model, len(states) - 2)(x), z[-2])
    free = [n for n in range(len(stages) - 1) if n not in structure.fixed]
    assert len(structure.fixed) == (stages[-1] if hasattr(model, "layer1") else 0)
    for gone in (free[:1], free[1:], [free[0], free[-1]]):
        smaller = crop(model, remove=gone)
        assert type(smaller) is type(model)
        assert close(smaller(x), naive_logits(model, stages[-1], naive_walk(model, x, gone)[-1]))
        assert anatomy(smaller).horizon == len(stages) - 1 - len(gone)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@torch.no_grad()
def test_crops_can_be_built_again(case: tuple[str, nn.Module, Tensor]) -> None:
    """The same class, given shorter lists, takes the crop's weights; timm records them."""
    name, model, x = case
    free = [n for n in range(anatomy(model).horizon) if n not in anatomy(model).fixed]
    smaller = crop(model, remove=free[-1:])
    if name.startswith("timm"):
        recorded = {k: v for k, v in smaller._model_args.items() if k != "num_classes"}
        assert recorded != {k: v for k, v in model._model_args.items() if k != "num_classes"}
        twin = _timm(model.pretrained_cfg["architecture"], **recorded)
        if hasattr(model, "blocks"):
            names = [entry["module"] for entry in smaller.feature_info]
            assert names == [f"blocks.{i}" for i in range(3)]
            assert len(model.feature_info) == 4
    elif hasattr(model, "layer1"):
        models = library("torchvision.models")
        width = {"groups": model.groups, "width_per_group": model.base_width}
        layers = [2, 1, 1, 1]
        twin = models.ResNet(type(model.layer1[0]), layers, num_classes=CLASSES, **width)
    elif hasattr(model, "features"):
        convnext = library("torchvision.models.convnext")
        sizes = [(4, 6, 2), (6, 8, 1), (8, None, 1)]
        settings = [convnext.CNBlockConfig(*s) for s in sizes]
        twin = convnext.ConvNeXt(settings, num_classes=CLASSES)
    else:
        models = library("torchvision.models")
        twin = models.VisionTransformer(32, 8, 3, 2, 16, 24, num_classes=CLASSES)
    twin.double().eval().load_state_dict(smaller.state_dict())
    assert torch.equal(twin(x), smaller(x))


@torch.no_grad()
def test_a_stage_may_be_emptied_where_no_configuration_says_otherwise() -> None:
    model = shaken(_torchvision_resnet("BasicBlock")).eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    smaller = crop(model, remove=[0, 1, 5])
    assert close(smaller(x), naive_logits(model, 3, naive_walk(model, x, (0, 1, 5))[-1]))


def test_a_stage_cost_trains_them(case: tuple[str, nn.Module, Tensor]) -> None:
    """In training mode too, with batch norms and activations in place; figures as without it."""
    name, model, x = case
    y, loss = torch.tensor([0, 2, 1]), SoftCrossEntropy(CLASSES, 0.1)
    model.train()
    naive, before = copy.deepcopy(model), copy.deepcopy(model).eval()
    cost, logits = StageCost(model, loss, 0.2)(x, y)
    cost.backward()
    walk = naive_walk(naive, x)
    terms = []
    for stage, state in zip(CASES[name].stages, walk, strict=True):
        terms.append(loss(naive_logits(before, stage, state), y).mean())
    expected = sum(terms[:-1]) * 0.2 + terms[-1]
    assert cost.item() == pytest.approx(expected.item(), rel=1e-10)
    assert close(logits, naive_logits(before, CASES[name].stages[-1], walk[-1]))
    expected.backward()
    theirs = [dict(before.named_parameters()), dict(naive.named_parameters())]
    for key, parameter in model.named_parameters():
        parts = [p[key].grad for p in theirs if p[key].grad is not None]
        assert (parameter.grad is None) == (not parts), key
        if parts:
            assert torch.allclose(parameter.grad, sum(parts), rtol=1e-8, atol=1e-10), key
