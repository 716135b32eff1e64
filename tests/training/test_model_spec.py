"""A model by its name: what it stands for, its batch and its loss; and what is no model."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deeplimit import ResidualChain, StageCost
from deeplimit.errors import InputError
from deeplimit.training import (
    BatchRequest,
    LoadedModel,
    Recipe,
    RunFolder,
    build_model,
    example,
    load_data,
    load_model,
    loss_of,
)
from deeplimit.training.building import training_batches

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "image_size": 16, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
GPT = {
    "model_type": "gpt2", "vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2,
    "n_head": 2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

MODULE = """
import torch
from torch import nn

instance = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
number = 5

def plain():
    return nn.Linear(3, 4)

def with_batch():
    return nn.Linear(3, 4), torch.ones(2, 3)

def with_targets():
    return nn.Linear(3, 4), (torch.ones(2, 3), torch.tensor([1, 3]))

def with_loss():
    return nn.Linear(3, 4), torch.ones(2, 3), lambda model, batch: model(batch).sum() * 7

def embedded():
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4))

def raises():
    raise OSError("weights.pt is not there")

def no_model():
    return "resnet"

def loss_that_is_none():
    return nn.Linear(3, 4), torch.ones(2, 3), "cross-entropy"

def three_parts():
    return nn.Linear(3, 4), (torch.ones(2, 3), torch.ones(2), torch.ones(2))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with user modules of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_nets.py").write_text(MODULE)
    (tmp_path / "my_broken_nets.py").write_text("import no_such_library\n")
    (tmp_path / "my_typo_nets.py").write_text("def f(:\n")
    monkeypatch.delitem(__import__("sys").modules, "my_nets", raising=False)
    return tmp_path


def config_in(folder: Path, config: dict[str, object]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.usefixtures("here")
def test_what_a_function_returns() -> None:
    loaded = load_model("my_nets:plain")
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.batch is None
    again = load_model("my_nets:plain")
    assert torch.equal(loaded.model.weight, again.model.weight)  # the seed's
    assert not torch.equal(loaded.model.weight, load_model("my_nets:plain", seed=1).model.weight)
    assert isinstance(load_model("my_nets:instance").model[0], nn.Linear)

    made = example(load_model("my_nets:with_batch"), BatchRequest())
    inputs, classes = made.batch
    assert torch.equal(inputs, torch.ones(2, 3))
    model = load_model("my_nets:with_batch").model
    assert made.loss_of(model, made.batch) == F.cross_entropy(model(inputs), classes)

    made = example(load_model("my_nets:with_targets"), BatchRequest())
    assert made.loss_of(model, made.batch) == F.cross_entropy(
        model(torch.ones(2, 3)), torch.tensor([1, 3])
    )
    made = example(load_model("my_nets:with_loss"), BatchRequest())
    assert made.loss_of(model, made.batch) == model(torch.ones(2, 3)).sum() * 7


@pytest.mark.usefixtures("here")
def test_random_inputs_of_a_shape_or_a_length() -> None:
    loaded = load_model("my_nets:plain")
    inputs, classes = example(loaded, BatchRequest(samples=7, shape=(3,))).batch
    assert inputs.shape == (7, 3)
    assert torch.equal(inputs, example(loaded, BatchRequest(samples=7, shape=(3,))).batch[0])
    assert set(classes.tolist()) <= {0, 1, 2, 3}
    loaded = load_model("my_nets:embedded")
    made = example(loaded, BatchRequest(length=6))
    assert made.batch.shape == (4, 6)
    assert made.batch.max() < 11
    output = loaded.model(made.batch)  # [B, L, C]: neither classes nor labels
    assert made.loss_of(loaded.model, made.batch) == output.square().mean()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("transfomers:vit", ("no module 'transfomers'", "did you mean transformers?")),
        ("no_such_nets:build", ("no module 'no_such_nets'", "in this folder", "timm:NAME")),
        ("my_nets.py:plain", ("leave out .py: my_nets:plain",)),
        ("my_nets:plane", ("no function 'plane'", "did you mean plain")),
        ("my_nets:number", ("int", "expected a function")),
        ("my_broken_nets:f", ("cannot be imported", "no_such_library", "my_broken_nets.py")),
        ("my_typo_nets:f", ("cannot be imported", "SyntaxError", "my_typo_nets.py")),
        ("my_nets:raises", ("OSError: weights.pt is not there", "my_nets.py, line 24")),
        ("my_nets:no_model", ("returned str", "(model, batch)")),
        ("my_nets:loss_that_is_none", ("returned (Linear, Tensor, str)", "a scalar")),
        ("a b:f", ("names no module",)),
        (":", ("the model is ':'", "a run folder")),
        ("nothing", ("no such folder", "transformers:NAME")),
        (".", ("no recipe.toml",)),
    ],
)
def test_what_is_no_model(spec: str, says: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as raised:
        load_model(spec)
    message = str(raised.value)
    assert "\n" not in message
    for said in says:
        assert said in message


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spec", "wish", "says"),
    [
        ("my_nets:plain", BatchRequest(), "give a shape"),
        ("my_nets:plain", BatchRequest(length=3), "has no embedding"),
        ("my_nets:plain", BatchRequest(shape=(5,)), "does not run on its batch: RuntimeError"),
        ("my_nets:with_batch", BatchRequest(samples=3), "batch given, but .* its own batch"),
        ("my_nets:with_loss", BatchRequest(shape=(3,)), "shape given"),
        ("my_nets:three_parts", BatchRequest(), "a batch of 3 parts"),
    ],
)
def test_a_batch_that_does_not_go_with_the_model(spec: str, wish: BatchRequest, says: str) -> None:
    with pytest.raises(InputError, match=says):
        example(load_model(spec), wish)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"samples": 0}, "batch is 0"),
        ({"length": -1}, "length is -1"),
        ({"shape": (3, 0)}, "sizes of at least 1"),
        ({"shape": (3,), "length": 2}, "shape and length"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_wish_that_cannot_be(fields: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        BatchRequest(**fields)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_brings_its_data_and_its_objective(tmp_path: Path) -> None:
    recipe = Recipe(depth=(3,), hidden=8, width=16, batch_size=32, stage_cost=0.3)
    data = load_data(recipe, tmp_path)
    run = RunFolder.create(tmp_path, "run", recipe)
    run.write_model(build_model(recipe, data))
    loaded = load_model(str(run.path))
    made = example(loaded, BatchRequest(samples=8))
    x, y = next(iter(training_batches(recipe, data, 0)))
    assert torch.equal(made.batch[0], x[:8])
    objective = StageCost(loaded.model, loss_of(recipe, data), 0.3)
    assert made.loss_of(loaded.model, made.batch) == objective(x[:8], y[:8])[0]
    assert loaded.model.training
    with pytest.raises(InputError, match="the run's own is 32"):
        example(loaded, BatchRequest(samples=33))
    with pytest.raises(InputError, match="shape given, but the run"):
        example(loaded, BatchRequest(shape=(8, 8)))


class TestTransformers:
    def test_images_and_labels(self, here: Path) -> None:
        loaded = load_model(f"transformers:{config_in(here, VIT)}")
        assert type(loaded.model).__name__ == "ViTForImageClassification"
        assert loaded.weights == "random, untrained"
        made = example(loaded, BatchRequest(samples=3))
        assert made.batch["pixel_values"].shape == (3, 3, 16, 16)
        logits = loaded.model.eval()(made.batch["pixel_values"]).logits
        expected = F.cross_entropy(logits, made.batch["labels"])
        assert torch.equal(made.loss_of(loaded.model, made.batch), expected)

    def test_tokens_and_the_folder_of_a_config(self, here: Path) -> None:
        config_in(here, GPT)
        loaded = load_model(f"transformers:{here}")
        made = example(loaded, BatchRequest())
        assert made.batch["input_ids"].shape == (4, 16)  # as many as it takes
        assert made.batch["use_cache"] is False
        output = loaded.model.eval()(
            input_ids=made.batch["input_ids"], labels=made.batch["labels"], use_cache=False
        )
        assert torch.equal(made.loss_of(loaded.model, made.batch), output.loss)
        assert output.past_key_values is None
        assert example(loaded, BatchRequest(samples=1, length=5)).batch["input_ids"].shape == (1, 5)

    def test_a_folder_with_weights_is_loaded(self, here: Path) -> None:
        first = load_model(f"transformers:{config_in(here, VIT)}", seed=3).model
        first.save_pretrained(here / "trained")
        loaded = load_model(f"transformers:{here / 'trained'}")
        assert loaded.weights == "trained"
        assert loaded.model.training
        for name, value in first.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value)

    def test_a_bare_type_and_its_size(self) -> None:
        with pytest.raises(InputError, match=r"6\.7 billion parameters: 81 GB.*smaller config"):
            load_model("transformers:llama")  # unless this machine has that much

    @pytest.mark.parametrize(
        ("config", "says"),
        [("{", "no config of transformers"), ('{"hidden_size": 3}', "model_type")],
    )
    def test_what_is_no_config(self, config: str, says: str, here: Path) -> None:
        (here / "config.json").write_text(config)
        with pytest.raises(InputError, match=says):
            load_model("transformers:config.json")

    def test_what_is_neither_type_nor_cached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(InputError, match=r"did you mean vit.*hf download vitt"):
            load_model("transformers:vitt")

    @pytest.mark.parametrize(
        ("config", "wish", "says"),
        [
            (GPT, BatchRequest(shape=(3, 8, 8)), "takes tokens"),
            (VIT, BatchRequest(length=8), "takes images"),
            (VIT, BatchRequest(shape=(3, 7, 7)), "does not run on its batch"),
        ],
    )
    def test_inputs_that_do_not_go_with_it(
        self, config: dict[str, object], wish: BatchRequest, says: str, here: Path
    ) -> None:
        with pytest.raises(InputError, match=says):
            example(load_model(f"transformers:{config_in(here, config)}"), wish)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_installed(library: str) -> None:
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    with pytest.raises(InputError, match=f"{library} cannot be imported.*install"):
        load_model(f"{library}:resnet50")


@pytest.mark.parametrize(
    ("library", "name", "near"),
    [("torchvision", "resnet18", "resnet81"), ("timm", "resnet18", "resnet18x")],
)
def test_models_of_other_libraries(library: str, name: str, near: str) -> None:
    pytest.importorskip(library)
    loaded = load_model(f"{library}:{name}")
    made = example(loaded, BatchRequest(samples=2, shape=(3, 32, 32)))
    inputs, classes = made.batch
    assert inputs.shape == (2, 3, 32, 32)
    assert made.loss_of(loaded.model, made.batch).isfinite()
    assert classes.shape == (2,)
    with pytest.raises(InputError, match=f"did you mean.*{name}"):
        load_model(f"{library}:{near}")


def test_a_chain_of_ours_needs_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_chain.py").write_text(
        "from torch import nn\nfrom deeplimit import ResidualChain\n"
        "def build():\n    return ResidualChain([nn.Linear(4, 4)] * 3, step=0.1).double()\n"
    )
    loaded = load_model("my_chain:build")
    assert isinstance(loaded.model, ResidualChain)
    assert example(loaded, BatchRequest(shape=(4,))).batch[0].dtype == torch.float64


def test_a_model_that_returns_no_tensor_for_inputs_and_targets_is_refused() -> None:
    class Mute(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "nothing"

    batch = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    loaded = LoadedModel("net:mute", Mute(), "as given", None, batch)
    made = example(loaded, BatchRequest())
    with pytest.raises(InputError, match="the model returned str without a tensor"):
        made.loss_of(loaded.model, made.batch)
