"""What the README shows was run: its Python example runs, and does what the text around it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_trains_once_and_is_used_at_every_depth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    *table, last = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in table if re.match(r"[0-8] ", line)]
    accuracy = [float(re.search(r"([\d.]+) %", " ".join(row))[1]) for row in rows]
    assert len(accuracy) == 9
    assert accuracy[1] + 5 < accuracy[4] < accuracy[8] + 1
    assert accuracy[8] >= 94
    assert torch.equal(names["smaller"](names["x"]), names["logits"])
    assert 1 < float(last.split()[0]) < 6


def test_the_example_of_the_limit_of_infinite_depth_says_what_it_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = README.parent / "docs" / "infinite-depth.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile(example, str(page), "exec"), {"__name__": "example"})
    first, verdict, gap, refined, coarsened = capsys.readouterr().out.splitlines()
    accuracies = [
        float(a) for line in (first, refined, coarsened) for a in re.findall(r"0\.\d+", line)
    ]
    assert accuracies == pytest.approx([0.936, 0.930, 0.947, 0.955, 0.950], abs=0.02)
    assert verdict.startswith("ODE-like (roughness 0.1")
    distance, bound = map(float, gap.split(" ≤ "))
    assert distance == pytest.approx(10.1, rel=0.1)
    assert distance <= bound


def test_the_examples_of_networks_as_measures_say_what_they_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = README.parent / "docs" / "networks-as-measures.md"
    between, flow = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile(between, str(page), "exec"), {"__name__": "example"})
    ends, distances, *others = capsys.readouterr().out.splitlines()
    found = [float(a) for line in (ends, *others) for a in line.split(", ")]
    said = [0.152, 0.164, 0.164, 0.170, 0.174, 0.183, 0.152, 0.173]
    assert found == pytest.approx(said, abs=0.02)
    assert found[3] < (found[0] + found[1]) / 2 + 0.03  # averaged: 0.17 above it
    assert [float(d) for d in distances.split(", ")] == pytest.approx([59.2, 57.2], rel=0.03)
    exec(compile(flow, str(page), "exec"), {"__name__": "example"})
    kernel, verdict = capsys.readouterr().out.splitlines()
    assert kernel.startswith("the width suffices for 8 samples at this start: ")
    assert verdict.startswith("holds for 100 records up to t = 9.9: ")
    far = flow.replace("0.03 *", "3 *")
    exec(compile(far, str(page), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines()[1].startswith("broken since record 2 ")


def test_the_examples_for_models_of_ones_own_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    page = README.parent / "docs" / "your-own-model.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    printed = []
    for example in examples:
        exec(compile(example, str(page), "exec"), {"__name__": "example"})
        printed.append(capsys.readouterr().out.splitlines())
    assert printed.pop(3)[-1].startswith(
        "Kept: 200 samples exclude a rise of the loss by more than "
    )
    before, after = map(float, printed[0][-1].split(" → "))
    assert before > 0.5
    assert after >= before - 0.1
    smaller = transformers.ViTForImageClassification.from_pretrained(tmp_path / "smaller")
    assert len(smaller.vit.layers) == smaller.config.num_hidden_layers < 8
    assert printed[1:] == [["100 (3, 8, 8)"], ["5", "True"], ["True"], ["True True"]]


def test_the_example_of_early_exit_says_what_it_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = README.parent / "docs" / "early-exit.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile(example, str(page), "exec"), {"__name__": "example"})
    *depths, last = capsys.readouterr().out.splitlines()
    found = [float(line.split()[2]) for line in depths[:4]]
    assert found == pytest.approx([95.5, 95.7, 97.0, 96.0], abs=1.5)
    other, layers = (float(last.split()[i]) for i in (0, -2))
    assert other <= 0.03 * 397
    assert layers < 2
