"""The coverage benchmark: it sees what is right and what is wrong, and goes on where it was."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from deeplimit._anatomy import ReadModel

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
THREE = r"^(by hand head reads|gpt2 GPT2LMHeadModel$|bert BertForSequence)"


@pytest.fixture
def coverage(monkeypatch):
    """The script; under a name of its own, since a package for tests is called so too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARKS / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("coverage_columns", "machine", "zoo", "zoo_by_hand", "zoo_inputs"):
        sys.modules.pop(name, None)


def _rows(path):
    with path.open(newline="") as file:
        assert file.readline().startswith("# transformers ")
        return {row["model"]: row for row in csv.DictReader(file)}


def test_rows_of_three_models_are_exact_and_kept(coverage, tmp_path, monkeypatch):
    out = tmp_path / "coverage.csv"
    coverage.walk(out, THREE, limit=60, fresh=False)
    rows = _rows(out)
    assert set(rows) == {
        "head reads the input",
        "GPT2LMHeadModel",
        "BertForSequenceClassification",
    }
    for row in rows.values():
        assert (row["reason"], row["status"], row["layers"]) == ("", "exact", "4")
        assert float(row["z"]) <= 1e-5
        assert row["z depths"] == "3 cut"
        assert float(row["saved"]) <= 1e-5
        assert float(row["stage cost"]) <= 1e-12
    assert rows["GPT2LMHeadModel"]["generate"] == "agrees"
    table = coverage.table(*coverage.kept(out))
    assert "| **all** | 3 | 3 | 0 | 0 | 0 | 0 |" in table

    monkeypatch.setattr(coverage, "row_of", lambda *_: pytest.fail("a row was made again"))
    coverage.walk(out, THREE, limit=60, fresh=False)
    assert _rows(out) == rows


def test_a_wrong_state_is_seen(coverage, monkeypatch):
    right = ReadModel.logits

    def off_by_one(self, states, *args, **more):
        return right(self, [states[0], *states[:-2], states[-1]], *args, **more)

    monkeypatch.setattr(ReadModel, "logits", off_by_one)
    member = next(m for m in coverage.zoo() if m.head == "ModuleList")
    row = coverage.row_of(member, 60)
    assert row["status"] == "wrong"
    assert row["reason"].startswith("z: ")
    assert float(row["z"]) > 0.01


def test_a_model_without_layers_is_refused_in_one_line(coverage):
    def make():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), torch.ones(2, 3)

    row = coverage.row_of(coverage.Member("torch", "by hand", "two maps", make), 60)
    assert row["status"] == "refused"
    assert row["reason"].startswith("reads: no stack of blocks in Sequential")
