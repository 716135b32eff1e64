"""The built-in classifiers: what an architecture builds, where it starts, what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from model_families import shaken
from torch import Tensor, nn

from deeplimit import Heun, InputError
from deeplimit._anatomy import anatomy
from deeplimit.network import Architecture, LinearResidual, ResidualClassifier, TwoLayerResidual

VECTOR = Architecture("vector", (6,), 4, (3,), width=5, hidden=7)
LOGIT = Architecture("logit", (4,), 4, (3,), width=4, hidden=7)
IMAGES = Architecture("convolutional", (3, 16, 16), 4, (2, 1, 3), width=4, hidden=6)
ARCHITECTURES = {
    "vector": VECTOR,
    "vector, Heun": replace(VECTOR, scheme="heun"),
    "vector, linear": replace(VECTOR, hidden=0),
    "logit": LOGIT,
    "batch": IMAGES,
    "group": replace(IMAGES, norm="group"),
    "none, Heun": replace(IMAGES, norm="none", scheme="heun"),
}


def inputs(a: Architecture, count: int = 5) -> Tensor:
    return torch.rand(count, *a.shape, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_starts_as_the_identity(name: str, training: bool) -> None:
    a = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = a.build().double().train(training)
    stages = anatomy(model).state_stages
    states, _ = anatomy(model).states(inputs(a))
    assert len(states) == sum(a.depths) + 1
    for n in range(len(states) - 1):
        assert stages[n] != stages[n + 1] or torch.equal(states[n], states[n + 1])
    # It is the last layer alone that vanishes: the rest is drawn, so that gradients flow.
    model.train(False)(inputs(a)).square().sum().backward()
    anatomy(model).layers[0].controls[0].zero_grad()
    if a.hidden:
        assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "inner.weight" in n)
        assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "conv1.weight" in n)


@pytest.mark.parametrize("name", ["vector", "batch", "none, Heun"])
def test_training_leaves_the_start(name: str) -> None:
    a = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = a.build().double()
    x, y = inputs(a), torch.tensor([0, 1, 2, 3, 0])
    F.cross_entropy(model(x), y).backward()
    for n in range(sum(a.depths)):
        assert any(p.grad.abs().max() > 1e-6 for p in anatomy(model).control(n))


def test_a_vector_network_is_its_formula() -> None:
    a = replace(VECTOR, activation="gelu", step=0.25)
    model = shaken(a.build())
    x = inputs(a)
    standardise, embed = model.stem
    state = (x - standardise.mean) / standardise.std @ embed.weight.T + embed.bias
    for block in model.stages[0]:
        assert isinstance(block, TwoLayerResidual)
        inner = state @ block.inner.weight.T + block.inner.bias
        state = state + 0.25 * F.gelu(inner) @ block.outer.weight.T
    expected = state @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-13)


def test_a_sample_of_the_states_size_is_the_state() -> None:
    model = shaken(LOGIT.build())
    assert [type(m).__name__ for m in model.stem] == ["Standardise"]
    assert isinstance(model.head, nn.Identity)
    x = inputs(LOGIT)
    states, logits = anatomy(model).states(x)
    assert torch.equal(states[0], (x - model.stem[0].mean) / model.stem[0].std)
    assert torch.equal(states[-1], logits)
    square = Architecture("vector", (1, 2, 2), 3, (1,), width=4, hidden=2).build()
    assert torch.equal(square.stem(torch.ones(1, 1, 2, 2)), torch.ones(1, 4))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_the_stem_shrinks_the_image_and_stages_double_the_channels(reduction: int) -> None:
    a = replace(IMAGES, reduction=reduction)
    model = a.build().double()
    states, logits = anatomy(model).states(inputs(a))
    side = 16 // reduction
    expected = [(4, side)] * 2 + [(8, math.ceil(side / 2))] + [(16, math.ceil(side / 4))] * 4
    assert [tuple(s.shape[1:]) for s in states] == [(c, s, s) for c, s in expected]
    assert logits.shape == (5, 4)


def test_hidden_zero_is_a_linear_residual_or_as_wide_as_the_state() -> None:
    assert all(isinstance(b, LinearResidual) for b in replace(VECTOR, hidden=0).build().stages[0])
    convolutional = replace(IMAGES, hidden=0).build()
    assert [stage[0].conv1.out_channels for stage in convolutional.stages] == [4, 8, 16]
    assert [stage[0].conv1.out_channels for stage in IMAGES.build().stages] == [6, 12, 24]


def test_depths_are_steps_also_with_heun() -> None:
    model = replace(IMAGES, scheme="heun", step=0.5).build()
    assert [len(stage) for stage in model.stages] == [3, 2, 4]
    assert [stage.horizon for stage in model.stages] == [2, 1, 3]
    assert all(stage.scheme == Heun() and stage.step == 0.5 for stage in model.stages)


@pytest.mark.parametrize("a", [VECTOR, IMAGES, replace(VECTOR, shape=(2, 3, 4))])
def test_standardisation_is_part_of_the_model(a: Architecture) -> None:
    torch.manual_seed(0)
    model = a.build().double().eval()
    x = inputs(a)
    plain = model((x - 0.25) / 2)
    size = a.shape[0]
    assert model.standardise(torch.full((size,), 0.25), torch.full((size,), 2.0)) is model
    assert torch.allclose(model(x), plain, rtol=1e-13, atol=1e-14)
    keys = [key for key in model.state_dict() if key.startswith("stem.0.")]
    assert keys == ["stem.0.mean", "stem.0.std"]


def test_per_channel_means_meet_their_channel() -> None:
    model = IMAGES.build()
    model.standardise(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0]))
    x = torch.tensor([2.0, 6.0, 11.0])[:, None, None].expand(1, 3, 16, 16)
    seen = model.stem[0](x)[0, :, 0, 0]
    assert seen.tolist() == [1.0, 2.0, 2.0]


def test_an_architecture_round_trips_through_plain_values() -> None:
    values = IMAGES.to_dict()
    assert values["depths"] == (2, 1, 3)
    assert Architecture(**values) == IMAGES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "conv"}, r"kind of network is 'conv'; expected logit, vector, convolutional"),
        ({"classes": 1}, "1 classes given"),
        ({"depths": ()}, "depths is empty; expected at least 0"),
        ({"depths": (-1,)}, "depths is -1; expected at least 0"),
        ({"depths": (2, 2)}, "a vector network has one stage, 2 given"),
        ({"kind": "convolutional"}, r"needs images .* use the kind 'vector'"),
        ({"kind": "logit"}, "width 5 must be the number of classes, 4"),
        ({"width": 0}, "width is 0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"reduction": 3}, "power of 2"),
        ({"reduction": 0}, "at least 1"),
        ({"shape": (8, 8)}, r"\(features,\) or \(channels, height, width\)"),
        ({"shape": ()}, r"\(features,\) or \(channels, height, width\)"),
    ],
)
def test_impossible_architectures_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(VECTOR, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relo"}, "activation is 'relo'; expected one of relu"),
        ({"scheme": "rk4"}, "scheme is 'rk4'; expected one of euler, heun"),
        ({"step": 0.0}, "step is 0; expected a number above 0"),
    ],
)
def test_names_and_numbers_of_the_parts_are_checked_when_built(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(VECTOR, **change).build()
    with pytest.raises(InputError, match="norm is 'layer'; expected one of batch, group, none"):
        replace(IMAGES, norm="layer").build()


def test_building_is_seeded() -> None:
    def draw() -> ResidualClassifier:
        torch.manual_seed(3)
        return IMAGES.build()

    first, second = draw().state_dict(), draw().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
