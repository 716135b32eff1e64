"""Runs of models that are not deeplimit's own: trained, saved, loaded again, gone on with."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from greys import MODULE, dino, greys, vit
from safetensors.torch import save_file
from training_runs import checkpoint_of, equal_weights, largest_difference, one_thread

from deeplimit.data import iter_batches
from deeplimit.errors import InputError
from deeplimit.network import CifarArchitecture, CifarResNet, save
from deeplimit.training import (
    Recipe,
    RunFolder,
    crop_run,
    load_data,
    load_model,
    profile_run,
    recipe_for,
    resume,
    run_data,
    train,
)
from deeplimit.training.verifying import verify_run

pytest.importorskip("transformers", reason="the extra `hub` is not installed")

pytestmark = pytest.mark.slow


def recipe_of(model: str, data: str, **more: object) -> Recipe:
    settings = {"epochs": 4, "batch_size": 20, "learning_rate": 1e-2, "stage_cost": 0.1} | more
    return replace(recipe_for(data, model), device="cpu", **settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    greys(folder)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> RunFolder:
    """A vision transformer from a config, trained by momentum SGD."""
    sgd = {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 1e-4}
    recipe = recipe_of(vit(place), f"npz:{place / 'greys.npz'}", **sgd)
    return train(recipe, runs=place / "runs", quiet=True)


def test_it_learns(run: RunFolder) -> None:
    """Four classes: chance is a quarter."""
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < 0.7 * losses[0]
    assert profile_run(run).test.accuracy[-1] > 0.6
    assert run.metrics()[-1]["validation_accuracy"] == run.profiles().validation.accuracy[-1]


def test_the_recipe_says_how_to_repeat_it(run: RunFolder) -> None:
    text = (run.path / "recipe.toml").read_text()
    assert "vit.json" in text
    assert not any(f"\n{name} = " in text for name in ("kind", "depth", "width", "scheme"))
    stored = RunFolder.open(run.path)
    assert stored.recipe == run.recipe
    mean, std = load_data(run.recipe, run.path.parent).standardisation()
    assert stored.recipe.mean == pytest.approx(mean.tolist(), rel=1e-6)
    assert stored.recipe.std == pytest.approx(std.tolist(), rel=1e-6)


def test_the_same_recipe_gives_the_same_run(run: RunFolder, tmp_path: Path) -> None:
    again = train(Recipe.from_toml(run.path / "recipe.toml"), runs=tmp_path, quiet=True)
    assert equal_weights(again.model(), run.model())
    assert largest_difference(checkpoint_of(again.path), checkpoint_of(run.path)) == 0


def test_resumed_it_is_the_same_to_the_bit(run: RunFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.path, tmp_path / "stopped"))
    (copy / "checkpoint" / "epoch-00004.pt").unlink()
    (copy / "checkpoint" / "latest").write_text("epoch-00003.pt\n")
    shutil.rmtree(copy / "model")
    (copy / "metrics.csv").unlink()
    resumed = resume(copy, quiet=True)
    assert equal_weights(resumed.model(), run.model())
    assert largest_difference(checkpoint_of(copy), checkpoint_of(run.path)) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_parameter_that_never_has_a_gradient_hinders_no_resume(
    optimizer: str, place: Path, tmp_path: Path
) -> None:
    data = f"npz:{place / 'greys.npz'}"
    recipe = recipe_of(dino(place), data, epochs=2, optimizer=optimizer)
    whole = train(recipe, runs=tmp_path, quiet=True)
    model = whole.model()
    assert torch.count_nonzero(model.dinov2.embeddings.mask_token) == 0
    copy = Path(shutil.copytree(whole.path, tmp_path / "stopped"))
    (copy / "checkpoint" / "epoch-00002.pt").unlink()
    (copy / "checkpoint" / "latest").write_text("epoch-00001.pt\n")
    shutil.rmtree(copy / "model")
    assert equal_weights(resume(copy, quiet=True).model(), model)
    mine, theirs = checkpoint_of(copy), checkpoint_of(whole.path)
    kept = theirs.optimizer["state"]
    assert len(kept) == len(list(model.parameters())) - 1
    for name, state in kept.items():
        for which, value in state.items():
            assert torch.equal(mine.optimizer["state"][name][which], value)


def test_a_checkpoint_of_a_training_of_another_length_is_refused(
    run: RunFolder, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run.path, tmp_path / "longer"))
    recipe = copy / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("epochs = 4", "epochs = 5"))
    (copy / "run.json").unlink()  # which would not vouch for it
    steps = checkpoint_of(copy).scheduler["total_steps"]
    says = rf"of a training of {steps} steps, .* make {steps * 5 // 4}; put epochs, .* --model RUN"
    with pytest.raises(InputError, match=says):
        resume(copy, quiet=True)


def test_paths_in_a_recipe_are_found_from_anywhere(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = run.path.parents[1]
    monkeypatch.chdir(place)
    save_file(run.model().state_dict(), tmp_path / "vit.safetensors")
    shutil.copy(tmp_path / "vit.safetensors", "weights.safetensors")
    recipe = recipe_of(
        "transformers:vit.json", "npz:greys.npz", epochs=0, weights=Path("weights.safetensors")
    )
    made = train(recipe, runs=tmp_path, quiet=True)
    assert made.recipe.data == "npz:greys.npz"
    monkeypatch.chdir(tmp_path)
    kept = RunFolder.open(made.path).recipe
    assert kept.data == f"npz:{place / 'greys.npz'}"
    assert kept.model == f"transformers:{place / 'vit.json'}"
    assert kept.weights == place / "weights.safetensors"
    again = train(kept, runs=tmp_path, quiet=True)
    assert equal_weights(again.model(), run.model())
    assert crop_run(RunFolder.open(made.path), 2).report.horizon_after == 2
    library = recipe_of("torchvision:resnet18", "cifar10")
    assert library.with_absolute_paths() == library
    mine = recipe_of("own_vits:build", "digits", data_dir=Path("there"))
    assert mine.with_absolute_paths() == replace(mine, data_dir=tmp_path / "there")


PLAIN = """
import sys
import torch
from transformers import AutoModelForImageClassification

x, full, cropped = torch.load(sys.argv[1], weights_only=True)
for folder, expected in zip(sys.argv[2:], (full, cropped)):
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(model(x).logits, expected), folder
    assert model.config.id2label[3] == "3"
assert model.config.num_hidden_layers == 2 == len(model.vit.layers)
assert not any(name.startswith("deeplimit") for name in sys.modules)
print("equal")
"""


def test_plain_transformers_gives_the_same_answers(run: RunFolder, tmp_path: Path) -> None:
    """In a process without deeplimit, to the bit; images standardised as recipe.toml says."""
    crop_run(run, 2)
    raw = load_data(run.recipe, run.path.parent).test.batch(range(20))[0]
    x = (raw - torch.tensor(run.recipe.mean)) / torch.tensor(run.recipe.std)
    with torch.no_grad():
        answers = [model(x).logits for model in (run.model(), run.cropped())]
    assert not torch.equal(*answers)
    torch.save([x, *answers], tmp_path / "answers.pt")
    command = [sys.executable, "-c", PLAIN, tmp_path / "answers.pt"]
    command += [run.path / "model", run.path / "cropped"]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


def test_the_preprocessor_beside_the_weights_standardises_alike(run: RunFolder) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(run.path / "model")
    data = run_data(run)
    image = data.test.x[0].movedim(0, -1).numpy()
    expected = data.test.standardisation.apply(data.test.batch([0])[0])
    found = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_the_automatic_cut_of_blocks_keeps_one(run: RunFolder) -> None:
    cut = crop_run(run, "auto", accuracy=0.49)
    profiles = run.profiles()
    assert profiles is not None
    expected = profiles.validation.depth_within(0.49)
    assert cut.report.horizon_after == max(expected, 1)


def test_a_trained_model_is_taken_as_it_is(run: RunFolder, tmp_path: Path) -> None:
    """0 epochs; the folder's own standardisation is taken over."""
    spec = f"transformers:{run.path / 'model'}"
    taken = train(recipe_of(spec, run.recipe.data, epochs=0), runs=tmp_path, quiet=True)
    assert equal_weights(taken.model(), run.model())
    assert taken.recipe.mean == run.recipe.mean
    assert taken.metrics() == ()
    report = crop_run(taken, 2).report
    assert report.accuracy_before == crop_run(run, 2).report.accuracy_before


def test_a_run_is_a_model_too(run: RunFolder, tmp_path: Path) -> None:
    taken = train(recipe_of(str(run.path), run.recipe.data, epochs=0), runs=tmp_path, quiet=True)
    assert equal_weights(taken.model(), run.model())
    assert taken.recipe.std == run.recipe.std


def test_a_head_for_other_classes(run: RunFolder, tmp_path: Path) -> None:
    """Refused, or a new one on the trained body."""
    spec = f"transformers:{run.path / 'model'}"
    with pytest.raises(InputError, match="tells 4 classes apart, the data has 10; give other data"):
        train(recipe_of(spec, "digits", epochs=0), runs=tmp_path)
    assert not (tmp_path / "digits").exists()
    recipe = recipe_of(spec, "digits", epochs=0, new_head=True)
    model = train(recipe, runs=tmp_path, quiet=True).model()
    assert model.classifier.weight.shape == (10, 16)
    trained = run.model()
    assert equal_weights(model.vit, trained.vit)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_vits.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "own_vits", raising=False)
    return tmp_path


def test_a_class_of_the_users_with_weights_from_a_file(run: RunFolder, here: Path) -> None:
    """Its weights are kept, and loaded into the recipe's model less the layers cut."""
    weights = {f"module.{name}": tensor for name, tensor in run.model().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, here / "vit.pt")
    recipe = recipe_of("own_vits:build", run.recipe.data, epochs=0, weights=here / "vit.pt")
    own = train(recipe, runs=here / "runs", quiet=True)
    assert {p.name for p in own.path.iterdir()} >= {"model.safetensors"}
    model = own.model()
    assert type(model).__name__ == "MyViT"
    assert equal_weights(model, run.model())
    crop_run(own, 2)
    cropped = RunFolder.open(own.path, trust=True).cropped()
    x, _ = next(iter(iter_batches(run_data(own).test, 9)))
    with torch.no_grad():
        states = model.vit(x, output_hidden_states=True).hidden_states
        by_hand = model.classifier(model.vit.layernorm(states[2])[:, 0])
        assert torch.equal(cropped(x).logits, by_hand)
    recipe_file = own.path / "recipe.toml"
    recipe_file.write_text(recipe_file.read_text().replace("own_vits:build", "own_vits:five"))
    verify_run(own.path, accepting=True)
    with pytest.raises(InputError, match=r"model\.safetensors: not the weights of the model"):
        RunFolder.open(own.path, trust=True).model()


def test_a_network_of_ours_from_a_file(place: Path, tmp_path: Path) -> None:
    """Published weights or a network that deeplimit saved; each brings its standardisation."""
    data = greys(tmp_path, 100, channels=3)
    network = CifarResNet(CifarArchitecture((1, 1, 1), classes=4)).eval()
    save_file(network.state_dict(), tmp_path / "published.safetensors")
    network.standardise(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7]))
    save(network, tmp_path / "saved.safetensors")
    for name, mean in (("published", (0.485, 0.456, 0.406)), ("saved", (0.1, 0.2, 0.3))):
        recipe = recipe_of(str(tmp_path / f"{name}.safetensors"), data, epochs=0)
        model = train(recipe, runs=tmp_path, name=name, quiet=True).model()
        assert equal_weights(model, network)
        assert model.architecture.mean == pytest.approx(mean)
        assert RunFolder.open(tmp_path / name).recipe.mean is None
    recipe = replace(recipe, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="standardises its own inputs"):
        train(recipe, runs=tmp_path)


def test_the_adjoint_trains_it(run: RunFolder, tmp_path: Path) -> None:
    recipe = replace(run.recipe, gradient="adjoint", evaluations=3, epochs=1)
    adjoint = train(recipe, runs=tmp_path, quiet=True)
    plain = train(replace(run.recipe, epochs=1), runs=tmp_path, quiet=True)
    drift = adjoint.metrics()[0]["drift"]
    assert drift is not None
    assert drift > 0
    assert plain.metrics()[0]["drift"] is None
    assert adjoint.metrics()[0]["loss"] == pytest.approx(plain.metrics()[0]["loss"], rel=0.05)


def test_what_a_file_of_weights_can_lack(run: RunFolder, tmp_path: Path) -> None:
    spec, data = f"transformers:{run.path.parent.parent / 'vit.json'}", run.recipe.data
    wrong = {
        "missing.pt": "cannot be read",
        "text.pt": "no readable weights .Unsupported operand",
        "model.pt": "GLOBAL torch.nn.modules.linear.Linear was not an allowed global by default.: ",
        "list.pt": "holds list; expected a state_dict",
        "other.safetensors": "not the weights of transformers:",
    }
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    for name, says in wrong.items():
        with pytest.raises(InputError, match=says):
            train(recipe_of(spec, data, weights=tmp_path / name), runs=tmp_path / "runs")
    assert not (tmp_path / "runs" / "greys").exists()


def test_loading_for_images_leaves_other_uses_alone(run: RunFolder) -> None:
    loaded = load_model(f"transformers:{run.path / 'model'}")
    assert loaded.standardisation == run.standardisation
    assert load_model(str(run.path)).run == run.path
