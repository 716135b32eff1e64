"""profile, crop and heal of models of text that somebody has: a language model, a classifier."""

import json
from pathlib import Path

import pytest
import torch
from cli_commands import command
from small_texts import bert, llama, table, text

from deeplimit.training import RunFolder, load_data

pytest.importorskip("transformers", reason="the extra `hub` is not installed")
pytest.importorskip("datasets", reason="the extra `hub` is not installed")

pytestmark = pytest.mark.slow
LEARN = ["--epochs", "2", "--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    text(folder), table(folder), llama(folder), bert(folder)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def done(*args: str) -> str:
    result = command(*args)
    assert result.code == 0, result.err
    return result.out


def test_a_language_model_from_its_folder_to_a_healed_cut(here: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done("profile", "transformers:llama", "--data", "text:dogs.txt", "--name", "lm")
    run = RunFolder.open("runs/lm")
    model = AutoModelForCausalLM.from_pretrained(here / "llama").eval()
    profile = run.profiles().test
    assert profile.samples == 15  # windows, whose tokens are not independent
    out = json.loads(done("crop", "runs/lm", "--blocks", "2", "--json"))
    assert out["report"]["horizon_after"] == 2
    assert out["report"]["verdict"]["samples"] == 15
    test = load_data(run.recipe, run.path.parent).test
    own = torch.nn.functional.cross_entropy(
        model(test.x).logits.detach().flatten(0, 1), test.y.flatten()
    )
    assert profile.loss[-1] == pytest.approx(out["report"]["loss_before"], abs=1e-6)
    assert profile.loss[-1] == pytest.approx(float(own), abs=1e-5)
    cropped = AutoModelForCausalLM.from_pretrained("runs/lm/cropped").eval()
    tokenizer = AutoTokenizer.from_pretrained("runs/lm/cropped")
    x = torch.tensor([tokenizer("the small dog saw").input_ids])
    (gone,) = out["removed"]
    kept = [layer for n, layer in enumerate(model.model.layers) if n != gone]
    model.model.layers = torch.nn.ModuleList(kept)
    assert torch.allclose(cropped(x).logits, model(x, use_cache=False).logits, atol=1e-5)
    healed = json.loads(done("heal", "runs/lm", *LEARN, "--teacher", "none", "--json"))
    assert healed["from_cropped"]["loss_after"] < healed["from_cropped"]["loss_before"] - 0.5
    assert AutoModelForCausalLM.from_pretrained("runs/lm/healed").config.num_hidden_layers == 2
    page = (here / "runs" / "lm" / "report.html").read_text()
    answer = page[: page.index("</section>")]
    assert "a window of 16 tokens" in answer
    assert "perplexity" in answer
    assert "15 windows" in answer
    assert "accuracy" not in answer
    assert "sample" not in answer.replace("A sample is a window", "")


def test_a_language_model_is_cut_by_its_loss(here: Path) -> None:
    """A rise that is larger than anything that an untrained one can lose."""
    model = ["transformers:llama", "--data", "text:dogs.txt", "--length", "8", "--name", "rise"]
    out = json.loads(done("crop", *model, "--rise", "9", "--json"))
    assert out["choice"]["budget"] == "rise"
    assert out["report"]["verdict"]["word"] == "kept"
    assert len(out["removed"]) == 2  # one block stays
    assert out["parts"] == {"train": 240, "validation": 30, "test": 30, "tokens": 8}
    found = json.loads(done("crop", "runs/rise", "--search", "--rise", "9", "--json"))
    assert len(found["removed"]) == 2
    assert [one["report"]["horizon_after"] for one in found["search"]] == [1]
    assert "validation perplexity" in (here / "runs" / "rise" / "report.html").read_text()
    done("train", "text:dogs.txt", "--model", model[0], "--epochs", "1", "--name", "trained")
    assert RunFolder.open("runs/trained").cut().choice.limit == 0.05
    refused = command("crop", "runs/rise", "--points", "1")
    assert refused.code == 2
    assert "is measured by its loss; give rise, in nats a token" in refused.err


def test_a_classifier_of_texts(here: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = "transformers:bertForSequenceClassification"
    args = ["--data", "table:news.csv", "--name", "news"]
    assert "calls its classes LABEL_0, LABEL_1" in command("profile", model, *args).err
    config = here / "bertForSequenceClassification" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"id2label": {"0": "good", "1": "bad"}}))
    done("crop", model, *args, "--to", "2")
    healed = json.loads(
        done("heal", "runs/news", *LEARN, "--epochs", "8", "--teacher", "none", "--json")
    )
    assert healed["from_full"]["accuracy_after"] > 0.9
    smaller = AutoModelForSequenceClassification.from_pretrained("runs/news/healed")
    assert smaller.config.num_hidden_layers == 2
    assert smaller.config.id2label == {0: "good", 1: "bad"}
    assert "test sample" in (here / "runs" / "news" / "report.html").read_text()


def test_what_is_refused_in_one_line(here: Path) -> None:
    bert(here, "ForMaskedLM")
    bert(here, "LMHeadModel")
    for model, data, said in (
        ("bertForMaskedLM", "text:dogs.txt", "does not predict the next token"),
        ("bertLMHeadModel", "text:dogs.txt", "looks at the tokens that follow"),
        ("llama", "digits", "classifies no images"),
        ("llama", "table:dogs.txt", "expected a table"),
    ):
        result = command("profile", f"transformers:{model}", "--data", data)
        assert result.code == 2
        assert said in result.err
        assert len(result.err.splitlines()) == 1
    assert not any(path.name.startswith("dogs") for path in (here / "runs").iterdir())
