"""Anatomies of transformers' image classifiers against naive walks, and what a cut leaves."""

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vision_families import (
    CONTROLS,
    FAMILIES,
    FIXED,
    STAGES,
    Vision,
    naive_carry,
    naive_head,
    naive_logits,
    naive_walk,
    vision,
)

from deeplimit import InputError, SoftCrossEntropy, StageCost, crop, turnpike_profile, verify_crop
from deeplimit.network import anatomy

pytestmark = pytest.mark.slow


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Vision:
    return vision(request.param)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("training", [True, False])
def test_states_and_logits_are_the_naive_ones(family: Vision, training: bool) -> None:
    model = family.model.train(training)
    walk = naive_walk(copy.deepcopy(model), family.x)
    before = copy.deepcopy(model)
    structure = anatomy(model)
    assert all(torch.equal(b, dict(before.named_buffers())[n]) for n, b in model.named_buffers())
    assert structure.state_stages == STAGES[family.name]
    assert structure.fixed == FIXED.get(family.name, ())
    states, logits = structure.states(family.x)
    assert len(states) == len(walk) == family.depth + 1
    assert all(map(close, states, walk))
    assert close(logits, naive_head(model, walk[-1]))
    moved = buffers(model)
    stacked = structure.logits(states)
    for n, (stage, state) in enumerate(zip(STAGES[family.name], states, strict=True)):
        assert close(stacked[n], naive_logits(family.name, model, stage, state))
    for n in range(family.depth):
        stage, after = STAGES[family.name][n : n + 2]
        expected = naive_carry(model, stage, states[n]) if after > stage else states[n]
        assert close(structure.carried(n, states[n]), expected)
        assert not close(states[n + 1], expected, 1e-3)  # every layer does something
    assert all(torch.equal(moved[n], b) for n, b in model.named_buffers())
    has_norms = "ResNet" in family.name
    same = all(torch.equal(moved[n], b) for n, b in before.named_buffers())
    assert same != (training and has_norms)  # the model's own forward moved them, nothing else


def test_crop_to_a_depth_is_the_intermediate_output(family: Vision) -> None:
    model = family.model.eval()
    weights, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    walk = naive_walk(model, family.x)
    fixed = FIXED.get(family.name, ())
    possible = 0
    for depth in range(family.depth):
        if any(n >= depth for n in fixed):
            with pytest.raises(InputError, match=r"layer \d cannot be removed: ResNet.* needs it"):
                crop(model, depth)
        elif depth == 0:
            with pytest.raises(InputError, match=r"layers 0 … \d to be removed; .* at least one"):
                crop(model, depth)
        else:
            smaller = crop(model, depth)
            stage = STAGES[family.name][depth]
            expected = naive_logits(family.name, model, stage, walk[depth])
            assert close(smaller(family.x).logits, expected)
            assert type(smaller) is type(model)
            possible += 1
    assert possible == (1 if fixed else family.depth - 1)
    with torch.no_grad():
        for tensor in smaller.parameters():
            tensor.zero_()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


MODELS = {name: vision(name) for name in FAMILIES}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(FAMILIES), st.sets(st.integers(0, 5)))
def test_any_removable_layers_can_go(name: str, wanted: set[int]) -> None:
    model, x, depth = MODELS[name].model.eval(), MODELS[name].x, MODELS[name].depth
    removed = {n for n in wanted if n < depth and n not in FIXED.get(name, ())}
    needed = {0, 1, 2} if name == "ResNet, basic" else set(range(depth))
    if needed <= removed:
        with pytest.raises(InputError, match="keeps at least one of them"):
            crop(model, remove=removed)
        return
    smaller = crop(model, remove=removed)
    with torch.no_grad():
        expected = naive_head(model, naive_walk(model, x, removed)[-1])
        assert close(smaller(x).logits, expected)
        states, logits = anatomy(smaller).states(x)
        assert len(states) == depth - len(removed) + 1
        assert close(logits, expected)


def test_configurations_are_brought_up_to_date() -> None:
    vit = crop(vision("ViT").model, remove=[1, 2])
    assert vit.config.num_hidden_layers == 2
    dino = vision("DINOv2").model  # puts out stages 2 and 4, the outputs of layers 1 and 3
    assert [dino.config.out_features, dino.config.out_indices] == [["stage2", "stage4"], [2, 4]]
    for removed, names, indices in (
        ([0], ["stage1", "stage3"], [1, 3]),
        ([3], ["stage2"], [2]),
        ([1, 2], ["stage2"], [2]),
        ([1, 3], ["stage2"], [2]),  # neither is left: the last stage, which is the default
        ([0, 1, 2], ["stage1"], [1]),
    ):
        config = crop(dino, remove=removed).config
        assert config.num_hidden_layers == 4 - len(removed)
        assert config.stage_names == ["stem", *(f"stage{n}" for n in range(1, 5 - len(removed)))]
        assert (config.out_features, config.out_indices) == (names, indices)
    resnet = crop(vision("ResNet, basic").model, remove=[1, 5])
    assert resnet.config.depths == [2, 1, 1]
    assert resnet.config.out_features == ["stage1", "stage3"]
    assert resnet.config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    convnext = crop(vision("ConvNeXt").model, remove=[0, 1, 3, 5])
    assert (convnext.config.depths, convnext.config.num_stages) == ([1, 0, 1], 3)
    for model in (vit, resnet, convnext):  # one configuration, wherever it hangs
        assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}


def test_lists_with_an_entry_per_layer_lose_those_of_the_layers_removed() -> None:
    model = vision("ViT").model
    model.config.layer_drops = [0.0, 0.1, 0.2, 0.3]
    model.config.layer_sizes = (1, 2, 3)  # not one per layer
    config = crop(model, remove=[1]).config
    assert config.layer_drops == [0.0, 0.2, 0.3]
    assert config.layer_sizes == (1, 2, 3)
    assert model.config.layer_drops == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize("tied", list(combinations(range(4), 2)))
def test_parameters_tied_between_layers_stay_with_the_one_that_is_kept(tied: tuple) -> None:
    case = vision("ViT")
    model = case.model.eval()
    first, second = (model.vit.layers[n].mlp for n in tied)
    second.fc1.weight = first.fc1.weight
    for gone in tied:
        smaller = crop(model, remove=[gone])
        expected = naive_head(model, naive_walk(model, case.x, [gone])[-1])
        assert close(smaller(case.x).logits, expected)
    if tied == (0, 1):
        smaller = crop(model, remove=[2])
        mine, other = (smaller.vit.layers[n].mlp.fc1.weight for n in tied)
        assert mine is other  # both are kept, and still one parameter
        assert mine is not first.fc1.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_are_read_and_cut(family: Vision, dtype: torch.dtype) -> None:
    model = family.model.eval()
    with torch.no_grad():
        exact = anatomy(model).logits(anatomy(model).states(family.x)[0])
        low = copy.deepcopy(model).to(dtype)
        structure = anatomy(low)
        states, logits = structure.states(family.x)
        assert {state.dtype for state in states} == {logits.dtype} == {dtype}
        z = structure.logits(states)
        eps = torch.finfo(dtype).eps
        assert (z.double() - exact).abs().max() < 20 * eps * (1 + exact.abs().max())
        assert torch.equal(structure.head(states[-1]), logits)
        smaller = crop(low, family.depth - 1)
        assert next(smaller.parameters()).dtype == dtype
        here = smaller(family.x.to(dtype)).logits
        assert torch.equal(here, structure.head(structure.carried(family.depth - 1, states[-2])))


def test_profiles_are_naive_and_crops_are_verified(family: Vision) -> None:
    model, x, y = family.model, family.x, family.y
    loss = SoftCrossEntropy(3, 0.1)
    profile = turnpike_profile(model, [(x, y)], loss)
    assert model.training
    with torch.no_grad():
        walk = naive_walk(model.eval(), x)
        z = [
            naive_logits(family.name, model, *at)
            for at in zip(STAGES[family.name], walk, strict=True)
        ]
    assert profile.loss == pytest.approx([float(loss(zn, y).mean()) for zn in z], rel=1e-10)
    hits = [float((zn.argmax(-1) == y).double().mean()) for zn in z]
    assert profile.accuracy == pytest.approx(hits)
    if family.name not in ("ViT", "ResNet, bottleneck", "ConvNeXt V2"):
        return  # what follows measures times, and the rest is the same for all
    smaller = crop(model, family.depth - 1)
    report = verify_crop(model, smaller, [(x, y)], loss)
    assert (report.horizon_before, report.horizon_after) == (family.depth, family.depth - 1)
    assert report.loss_before == pytest.approx(profile.loss[-1], rel=1e-10)
    assert report.loss_after == pytest.approx(profile.loss[-2], rel=1e-10)
    assert report.accuracy_after == pytest.approx(hits[-2])
    assert report.parameters_after < report.parameters_before
    assert report.multiply_adds_after < report.multiply_adds_before


def test_plain_gradients_are_those_of_the_sum_over_layers(family: Vision) -> None:
    loss, gamma, r = SoftCrossEntropy(3, 0.1), 0.3, 0.2
    model, naive = family.model, copy.deepcopy(family.model)
    cost, _ = StageCost(model, loss, gamma, control_cost=r)(family.x, family.y)
    cost.backward()

    statistics = copy.deepcopy(naive)  # those from before this batch
    walk = naive_walk(naive, family.x)
    for module, before in zip(naive.modules(), statistics.modules(), strict=True):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = before.running_mean, before.running_var
    total = torch.zeros(())
    for n, (stage, state) in enumerate(zip(STAGES[family.name], walk, strict=True)):
        value = loss(naive_logits(family.name, naive, stage, state), family.y).mean()
        total = total + (value if n == family.depth else gamma * value)
    ends = tuple(f".{n}.{part}" for n in range(4) for part in CONTROLS[family.name])
    for name, parameter in naive.named_parameters():
        if any(end in name for end in ends):
            total = total + r / 2 * parameter.square().sum()
    total.backward()
    assert close(cost, total)
    found = 0
    for (name, mine), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert close(mine.grad, theirs.grad, 1e-9), name
            found += mine.grad.abs().max() > 0
    assert found > len(list(model.parameters())) / 2
