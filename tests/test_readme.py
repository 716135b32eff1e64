"""What the README shows was run: its Python example runs, and does what the text around it says."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_cuts_the_network_and_loses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    printed = capsys.readouterr().out
    report = dict(re.findall(r"(\w+)=([\d.]+)", printed))
    assert int(report["horizon_before"]) == 20
    assert int(report["horizon_after"]) <= 8
    assert float(report["accuracy_after"]) >= 0.97
    assert float(report["accuracy_before"]) - float(report["accuracy_after"]) <= 0.005
