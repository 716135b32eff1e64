"""The recipe's start: which parameters a network begins with, and that training keeps a curve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deeplimit.data import DataSet, Split, load_dataset
from deeplimit.network import Architecture, CifarArchitecture, smooth_start
from deeplimit.ode import smoothness
from deeplimit.training import Recipe, RunFolder, build_model, train

VECTORS = Recipe(depth=(12,), width=8, hidden=10, seed=3)
KINDS: dict[str, Recipe] = {
    "vector": VECTORS,
    "logit": replace(VECTORS, kind="logit", scheme="heun"),
    "convolutional": replace(VECTORS, kind="convolutional", depth=(4, 3), width=4, hidden=0),
    "cifar-resnet": replace(VECTORS, kind="cifar-resnet", depth=(3, 3, 3)),
}


def data() -> DataSet:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = Split(x, torch.arange(8) % 4)
    return DataSet("images", ("a", "b", "c", "d"), split, split, split)


def seeded(architecture: Architecture | CifarArchitecture, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return architecture.build()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_independent_start_is_bit_for_bit_the_architecture_s(kind: str) -> None:
    model: Any = build_model(KINDS[kind], data())
    assert same(model, seeded(model.architecture, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_smooth_start_mixes_the_same_draws(kind: str) -> None:
    recipe = replace(KINDS[kind], initialisation="smooth", length_scale=0.3)
    state = torch.random.get_rng_state()
    model: Any = build_model(recipe, data())
    assert torch.equal(torch.random.get_rng_state(), state)
    expected: Any = seeded(model.architecture, 3)
    assert not same(model, expected)
    for m, stage in enumerate(expected.stages):
        smooth_start(list(stage)[kind == "cifar-resnet" and m > 0 :], 0.3)
    assert same(model, expected)


@pytest.mark.slow
def test_identical_layers_have_no_roughness() -> None:
    for recipe in KINDS.values():
        found = smoothness(build_model(replace(recipe, initialisation="identical"), data()))
        assert [stage.roughness for stage in found.stages] == [0.0] * len(found.stages)


@pytest.mark.slow
def test_training_keeps_a_smooth_start_smooth_and_an_independent_one_rough(tmp_path: Path) -> None:
    """As on benchmarks/results/smoothness_calibration.json, in a few epochs of a small network."""
    recipe = replace(VECTORS, depth=(16,), step=0.25, stage_cost=0.0, epochs=3)
    found = {}
    for start in ("independent", "smooth"):
        own = replace(recipe, initialisation=start)  # type: ignore[arg-type]
        folder = train(own, runs=tmp_path, name=start, quiet=True)
        assert RunFolder.open(folder.path).recipe == own
        trained: Any = folder.model()
        built: Any = build_model(own, load_dataset("digits"))
        moved = (trained.stages[0][0].outer.weight - built.stages[0][0].outer.weight).norm()
        assert moved > 0.1  # from zero: it has trained
        found[start] = smoothness(trained)
    assert found["smooth"].kind == "smooth"
    assert found["independent"].kind == "rough"
