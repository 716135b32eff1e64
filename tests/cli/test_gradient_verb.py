"""`deeplimit gradient`: the table, the JSON, the files, and wrong input in one line."""

import json
import re
from pathlib import Path

import pytest
import torch
from cli_commands import command, contents, process

from deeplimit import gradient_error, use_adjoint
from deeplimit.records import from_plain
from deeplimit.studies import GradientCost
from deeplimit.training import BatchRequest, example, load_model

NET = """
import torch
from torch import nn
from deeplimit import ResidualChain
from deeplimit.network.blocks import TwoLayerResidual

def build():
    torch.manual_seed(0)
    blocks = [TwoLayerResidual(8, 16, "tanh") for _ in range(12)]
    return ResidualChain(blocks, step=1 / 12).double()

def plain():
    return nn.Sequential(*[nn.Sequential(nn.Linear(8 + n, 9 + n)) for n in range(3)])

def nothing():
    return None

def linear():
    return nn.Linear(8, 8)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the user's gradient_nets.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gradient_nets.py").write_text(NET)
    return tmp_path


BUILD = ("gradient", "gradient_nets:build", "--shape", "8", "--batch", "16", "--steps", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_json_holds_what_gradient_error_says_and_nothing_is_written() -> None:
    before = contents(Path())
    done = command(*BUILD, "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.err == ""
    cost = from_plain(GradientCost, json.loads(done.out))
    loaded = load_model("gradient_nets:build")
    made = example(loaded, BatchRequest(samples=16, shape=(8,)))
    for row in cost.methods[2:5]:
        use_adjoint(loaded.model, evaluations=row.evaluations or 0, on_drift="ignore")
        error = gradient_error(loaded.model, made.loss_of, made.batch).error
        assert row.error == pytest.approx(error, rel=1e-6)
    assert cost.batch == "16×8, 16"
    assert cost.model == "gradient_nets:build"
    after = {path: digest for path, digest in contents(Path()).items() if "pycache" not in path}
    assert after == before


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_answer_comes_first_then_the_table() -> None:
    done = command(*BUILD, "--device", "cpu", "--figure", "cost.html")
    assert done.code == 0, done.err
    lines = done.out.replace("\u00a0", " ").splitlines()
    said = re.fullmatch(
        r"(Adjoint with e = \d|Auto: .*): ([\d.]+) times less memory than plain backpropagation "
        r"at a gradient error of [\d.·⁻⁰-⁹]+ %, for [\d.]+ times the time\.",
        lines[0],
    )
    assert said is not None, lines[0]  # which of the two depends on the times measured
    assert float(said[2]) > 1
    for name in ("plain", "checkpointed", "adjoint e=1", "adjoint e=3", "coded 4 bits", "auto"):
        assert any(line.strip().startswith(name) for line in lines)
    assert "measuring: checkpointed" in done.err
    html = Path("cost.html").read_text()
    assert "Plotly.newPlot" in html
    assert not re.search(r"<script[^>]+src=", html)  # opens offline
    assert str(Path("cost.html").resolve()) in done.out


@pytest.mark.slow
def test_a_run_keeps_its_result(run: Path) -> None:
    done = command("gradient", run, "--steps", "1", "--batch", "16", "--json")
    assert done.code == 0, done.err
    assert json.loads((run / "gradient.json").read_text()) == json.loads(done.out)
    assert "Plotly.newPlot" in (run / "gradient.html").read_text()
    cost = from_plain(GradientCost, json.loads(done.out))
    assert [len(chain) for chain in cost.chains] == [3]
    assert cost.weights == "trained"
    assert cost.batch == "16×1×8×8, 16"


@pytest.mark.usefixtures("here")
def test_a_model_without_residual_blocks_is_told_why() -> None:
    done = command("gradient", "gradient_nets:plain", "--shape", "8", "--steps", "1")
    assert done.code == 0, done.err
    assert done.out.startswith("Nothing to save")
    assert "0: turns a state (4, 8)" in done.out


@pytest.mark.slow
def test_in_a_process_of_its_own_the_current_folder_is_importable(here: Path) -> None:
    done = process(*BUILD, "--json", cwd=here)
    assert done.code == 0, done.err
    assert json.loads(done.out)["methods"][0]["error"] == 0
    assert done.err == ""  # the profiler says nothing either


WRONG = {
    "unknown library": (("transformer:vit",), ("'transformer'", "did you mean transformers")),
    "no module": (("no_such_nets:build",), ("no module 'no_such_nets'", "transformers:NAME")),
    "no function": (("gradient_nets:bild",), ("'bild'", "did you mean build")),
    "no model": (("gradient_nets:nothing",), ("returned NoneType", "expected a model")),
    "no run": ((".",), ("no recipe.toml",)),
    "no folder": (("runs/no",), ("runs/no", "no such folder")),
    "no shape": (("gradient_nets:build",), ("give a shape",)),
    "batch 0": ((*BUILD[1:4], "--batch", "0"), ("batch is 0", "at least 1")),
    "length 0": (("gradient_nets:build", "--length", "0"), ("length is 0",)),
    "tolerance 0": ((*BUILD[1:4], "--tolerance", "0"), ("tolerance is 0", "> 0")),
    "tolerance NaN": ((*BUILD[1:4], "--tolerance", "nan"), ("tolerance is nan",)),
    "steps 0": ((*BUILD[1:4], "--steps", "0"), ("steps is 0", "at least 1")),
    "shape in words": (("gradient_nets:build", "--shape", "3x8"), ("'3x8'", "3,224,224")),
    "shape that does not fit": (("gradient_nets:build", "--shape", "9"), ("does not run",)),
    "seed below 0": ((*BUILD[1:4], "--seed", "-1"), ("seed is -1",)),
    "figure nowhere": ((*BUILD[1:4], "--figure", "no/f.html"), ("no/f.html", "no folder")),
    "figure that is a folder": ((*BUILD[1:4], "--figure", "."), ("is a folder",)),
    "no candidates": (("gradient_nets:linear", "--shape", "8"), ("no residual blocks", "blocks=")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str, here: Path) -> None:
    args, says = WRONG[name]
    done = command("gradient", *args)
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("deeplimit: ")
    for said in says:
        assert said in line
    assert not list(here.glob("*.html"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.usefixtures("here")
def test_cuda_where_there_is_none() -> None:
    done = command(*BUILD, "--device", "cuda")
    assert done.code == 2
    assert "cpu or auto" in done.err
