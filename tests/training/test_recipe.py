"""Recipes: what is accepted, what is refused, and the way to disk and back."""

import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from deeplimit.errors import InputError
from deeplimit.records import from_plain, to_plain
from deeplimit.training import Recipe, recipe_for
from deeplimit.training.recipe import RECIPES

WRONG = {
    "depth 0": ({"depth": (0,)}, "depth is 0; expected at least 1"),
    "no depth": ({"depth": ()}, "depth is empty"),
    "negative depth": ({"depth": (3, -1), "kind": "convolutional"}, "depth is 3 -1"),
    "two stages of vectors": ({"depth": (2, 2)}, "a vector network has one stage"),
    "two stages of logits": ({"depth": (2, 2), "kind": "logit"}, "a logit network has one stage"),
    "depth of another type": ({"depth": ("a",)}, "depth[0] is 'a'; expected a whole number"),
    "depth not whole": ({"depth": (2.5,)}, "depth[0] is 2.5; expected a whole number"),
    "width": ({"width": 0}, "width is 0; expected at least 1"),
    "hidden": ({"hidden": -1}, "hidden is -1"),
    "reduction": ({"reduction": 3}, "reduction is 3; expected a power of 2"),
    "step 0": ({"step": 0.0}, "step is 0; expected a number above 0"),
    "length scale 0": (
        {"initialisation": "smooth", "length_scale": 0.0},
        "length_scale is 0; expected a number above 0",
    ),
    "initialisation": (
        {"initialisation": "smoth"},
        "initialisation is 'smoth'; expected one of independent, smooth, identical, did you mean",
    ),
    "a length scale of the independent start": (
        {"length_scale": 0.3},
        "length_scale is 0.3, but the initialisation independent has none; give the initialisation "
        "smooth, or leave length_scale at 0.5",
    ),
    "a length scale of identical layers": (
        {"initialisation": "identical", "length_scale": 0.3},
        "length_scale is 0.3, but the initialisation identical has none",
    ),
    "a start for a model": (
        {"model": "transformers:vit", "initialisation": "smooth"},
        "initialisation is smooth, but the model is transformers:vit, which is built already",
    ),
    "step nan": ({"step": math.nan}, "step is nan"),
    "kind": ({"kind": "convolutionl"}, "kind is 'convolutionl'; expected one of logit,"),
    "scheme": ({"scheme": "rk4"}, "scheme is 'rk4'; expected one of euler, heun"),
    "softness 0": ({"softness": 0.0}, "softness is 0"),
    "softness 1": ({"softness": 1.0}, "softness is 1"),
    "negative stage cost": ({"stage_cost": -0.1}, "stage_cost is -0.1; expected a number ≥ 0"),
    "infinite stage cost": ({"stage_cost": math.inf}, "stage_cost is inf"),
    "no layers with a cost": (
        {"stage_cost_layers": 0},
        "stage_cost_layers is 0; expected at least",
    ),
    "layers without a cost": (
        {"stage_cost_layers": 2, "stage_cost": 0.0},
        "stage_cost_layers is 2, but stage_cost is 0: no layer has a loss; leave it out",
    ),
    "more evaluations than epochs": (
        {"cut_while_training": 4, "epochs": 3},
        "cut_while_training is 4 evaluations, one after each epoch, but epochs is 3; give fewer",
    ),
    "negative control cost": ({"control_cost": -1.0}, "control_cost is -1"),
    "a kind of no control cost": (
        {"control_cost_kind": "group"},
        "control_cost_kind is group, but control_cost is 0; leave it out",
    ),
    "kind of control cost": (
        {"control_cost": 1.0, "control_cost_kind": "l1"},
        "control_cost_kind is 'l1'; expected one of squared, kinetic, group",
    ),
    "negative decay": ({"weight_decay": -1.0}, "weight_decay is -1"),
    "learning rate": ({"learning_rate": 0.0}, "learning_rate is 0"),
    "no epochs": ({"epochs": 0}, "epochs is 0; expected at least 1"),
    "batch 0": ({"batch_size": 0}, "batch_size is 0"),
    "batch below devices": ({"batch_size": 2, "devices": 4}, "4 devices cannot share"),
    "batch not shared": ({"batch_size": 50, "devices": 4}, "give a multiple of 4"),
    "devices": ({"devices": 0}, "devices is 0"),
    "crop": ({"crop": -1}, "crop is -1"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "huge seed": ({"seed": 2**31}, "seed is 2147483648"),
    "precision": ({"precision": "16"}, "precision is '16'; expected one of 32-true"),
    "device": ({"device": "gpu"}, "device is 'gpu'; expected one of auto, cpu, cuda"),
    "strategy": ({"strategy": "dp"}, "strategy is 'dp'; expected one of auto, ddp, fsdp"),
    "flip": ({"flip": "yes"}, "flip is 'yes'; expected true or false"),
    "seed a truth value": ({"seed": True}, "seed is True; expected a whole number"),
    "no data": ({"data": ""}, "data is empty"),
    "gradient": (
        {"gradient": "adjont"},
        "gradient is 'adjont'; expected one of backprop, adjoint, did you mean adjoint",
    ),
    "no evaluations": (
        {"gradient": "adjoint", "evaluations": 0},
        "evaluations is 0; expected at least 1",
    ),
    "evaluations not whole": ({"evaluations": 1.5}, "evaluations is 1.5; expected a whole number"),
    "evaluations by backprop": (
        {"evaluations": 3},
        "evaluations is 3, but the gradient backprop rebuilds no state; give the gradient adjoint",
    ),
    "bits without the adjoint": (
        {"bits": 4},
        "bits is 4, but the gradient backprop keeps all states; give the gradient adjoint",
    ),
    "bits and evaluations": (
        {"gradient": "adjoint", "bits": 4, "evaluations": 3},
        "evaluations is 3, but bits is 4: states come back by codes",
    ),
    "a plan under fsdp": (
        {"gradient": "adjoint", "bits": "auto", "strategy": "fsdp"},
        "bits is auto, but the strategy fsdp divides the parameters",
    ),
    "bits that there are not": (
        {"gradient": "adjoint", "bits": 3},
        "bits is 3; expected one of 0, 2, 4, 8, auto",
    ),
    "cifar by the adjoint": (
        {"kind": "cifar-resnet", "depth": (1, 1, 1), "gradient": "adjoint"},
        "gradient is adjoint: the states of a cifar-resnet cannot be rebuilt",
    ),
    "cifar stages": ({"kind": "cifar-resnet"}, "a cifar-resnet has three stages"),
    "no epochs of a network of ours": ({"epochs": 0}, "epochs is 0; expected at least 1"),
    "optimizer": ({"optimizer": "adam"}, "optimizer is 'adam'; expected one of adamw, sgd"),
    "a depth for a model": (
        {"model": "transformers:vit", "depth": (7,)},
        "depth is 7, but the model is transformers:vit, which is built already; leave depth out",
    ),
    "weights without a model": ({"weights": "a.safetensors"}, "is a model by itself"),
    "a new head without a model": ({"new_head": True}, "new_head given, but no model"),
    "a mean without a model": ({"mean": (0.5,), "std": (1.0,)}, "mean or std given, but no model"),
    "a mean without deviation": (
        {"model": "transformers:vit", "mean": (0.5,)},
        "mean and std go together",
    ),
    "cifar scheme": (
        {"kind": "cifar-resnet", "depth": (1, 1, 1), "scheme": "heun"},
        "a cifar-resnet has scheme euler",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_fields_are_refused_by_name(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(InputError) as caught:
        from_plain(Recipe, to_plain(Recipe()) | changes)
    assert message in str(caught.value)


def test_defaults_of_named_and_unnamed_data() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.data == name
        assert recipe_for(name) is recipe
    assert recipe_for("digits").kind == "vector"
    assert recipe_for("digits").horizon == 20
    assert recipe_for("npz:x.npz").kind == "vector"
    assert recipe_for("npz:x.npz").data == "npz:x.npz"
    assert recipe_for("hub:someone/images").kind == "convolutional"
    assert recipe_for("cifar10").horizon == sum(recipe_for("cifar10").depth)


def test_every_field_says_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(Recipe, args=["--help"])
    text = capsys.readouterr().out
    for field in fields(Recipe):
        option = "--" + field.name.replace("_", "-")
        assert option in text
    assert "Step size h" in text
    assert "Weight γ of the loss at every layer" in text


positive = st.floats(1e-12, 1e12)
settings = st.fixed_dictionaries(
    {
        "data": st.text(min_size=1),
        "data_dir": st.none() | st.just(Path("some") / "where"),
        "kind": st.just("convolutional"),
        "depth": st.lists(st.integers(1, 99), min_size=1, max_size=4).map(tuple),
        "step": positive,
        "scheme": st.sampled_from(["euler", "heun"]),
        "initialisation": st.just("smooth"),
        "length_scale": positive,
        "softness": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "stage_cost": positive | st.just(0.0),
        "control_cost": positive,
        "control_cost_kind": st.sampled_from([None, "squared", "kinetic", "group"]),
        "learning_rate": positive,
        "flip": st.booleans(),
        "gradient": st.just("adjoint"),
        "evaluations": st.integers(1, 99),
        "seed": st.integers(0, 2**31 - 1),
    }
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.toml"


@pytest.mark.slow
@hypothesis.settings(deadline=None)  # a file is written: the disk may be busy
@given(fields=settings)
def test_toml_gives_the_recipe_back(fields: dict[str, Any], file: Path) -> None:
    recipe = Recipe(**fields)
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(file) == recipe


DAMAGE = {
    "unknown field": ("depth =", "deph =", "unknown field deph, did you mean depth"),
    "missing field": ("epochs = 40\n", "", "the field epochs is missing"),
    "ill-typed": ('kind = "vector"', "kind = 3", "kind is 3"),
    "out of range": ("softness = 0.05", "softness = 2.0", "softness is 2"),
    "another format": ("format = 1", "format = 2", "format 2, this deeplimit reads 1"),
    "no format": ("format = 1\n", "", "format None"),
    "another table": ("[versions]", "[version]", "unknown field version"),
    "no recipe": ("[recipe]", "[data]\n[data.recipe]", "missing"),
    "not TOML": ("epochs = 40", "epochs = = 40", "damaged, not TOML"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_recipe_is_refused_with_file_and_field(case: str, tmp_path: Path) -> None:
    old, new, message = DAMAGE[case]
    text = Recipe(epochs=40, softness=0.05).to_toml()
    assert old in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new, 1).split("[data]\nclass_names")[0], encoding="utf-8")
    with pytest.raises(InputError) as caught:
        Recipe.from_toml(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_recipe_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("format = 1\nrecipe = 3\n", encoding="utf-8")
    with pytest.raises(InputError, match="Recipe is 3; expected the fields of one"):
        Recipe.from_toml(path)


def test_a_recipe_of_a_model_says_nothing_of_kind_and_depth(tmp_path: Path) -> None:
    recipe = replace(recipe_for("cifar10", "transformers:vit"), mean=(0.1, 1 / 3), std=(1.0, 0.2))
    settings = {**recipe.settings()}
    assert not settings.keys() & {"kind", "depth", "width", "hidden", "norm", "scheme", "step"}
    assert not settings.keys() & {"initialisation", "length_scale"}
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe


def test_defaults_of_a_model_and_of_sgd() -> None:
    given, own = recipe_for("cifar10", "net:build"), recipe_for("cifar10")
    assert (given.crop, given.flip, given.stage_cost) == (own.crop, own.flip, own.stage_cost)
    assert given.learning_rate < own.learning_rate
    sgd = recipe_for("cifar10", "net:build", "sgd")
    assert (sgd.optimizer, sgd.learning_rate, sgd.weight_decay) == ("sgd", 0.01, 5e-4)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Recipe.from_toml(tmp_path / "recipe.toml")


def test_toml_names_versions_and_classes() -> None:
    text = replace(Recipe(), depth=(7,)).to_toml(["ship", "frog"])
    assert '"ship",\n    "frog",' in text
    assert 'torch = "' in text
    assert 'deeplimit = "' in text
    assert 'python = "' in text


@pytest.mark.slow
def test_names_paths_and_recipes_are_checked_without_torch(tmp_path: Path):
    script = (
        "import sys\n"
        "from deeplimit.data.registry import find_source\n"
        "from deeplimit.training import Recipe, RunFolder, recipe_for\n"
        "from deeplimit.files import check_runs\n"
        "from deeplimit.training.specification import Named\n"
        "find_source('digits'); recipe_for('mnist')\n"
        f"RunFolder.open(RunFolder.create({str(tmp_path)!r}, None, Recipe()).path)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_recipe_written_before_a_field_was_there_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    newer = ("bits", "stage_cost_grows", "cut_while_training", "control_cost_kind", "confidence")
    lines = Recipe().to_toml().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(newer)]
    assert len(lines) - len(older) == 3
    path.write_text("".join(older))
    assert Recipe.from_toml(path) == Recipe()


def test_a_recipe_whose_cost_grows_is_that_of_an_ordinary_network_at_0() -> None:
    assert replace(recipe_for("mazes"), stage_cost=0.0).stage_cost_grows
