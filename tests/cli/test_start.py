"""Help and refusals come at once: what is wrong is seen before anything large is imported."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from deeplimit.cli.verbs import STUDIES, VERBS

pytestmark = pytest.mark.slow

HELP = [
    [],
    *([name] for name in VERBS),
    *(["study", name] for name in STUDIES),
    ["train", "mnist"],
]
WRONG = {
    "crop no/such/folder": "no such folder",
    "crop RUN --bad": "--bad",
    "crop . --to 3 --points 1": "give one",
    "profile transformers:nowhere": "--data cifar10",
    "profile transformers:nowhere --data digits": "no model type",
    "profile nowhere.safetensors --data digits": "no such file",
    "heal no/such/folder": "no such folder",
    "report .": "no recipe.toml",
    "verify .": "no recipe.toml",
    "refine nowhere": "no such folder",
    "gradient nowhere:build": "no module 'nowhere'",
    "gradient net.py:build": "leave out .py",
    "gradient transformers:vitt": "did you mean",
    "gradient transformers:vit --figure no/such/page.html": "there is no folder",
    "ode nowhere": "no such folder",
    "compare runs/a runs/b": "runs/a: no such folder",
    "interpolate runs/a runs/b": "runs/a: no such folder",
    "merge runs/a runs/b": "runs/a: no such folder",
    "train digitz": "did you mean digits",
    "train npz:no/such.npz": "no/such.npz",
    "train mnist --data-dir no/such": "no/such",
    "train --depth 0": "depth is 0",
    "train --name a/b": "'a/b'",
    "train --model nowhere:build": "no module 'nowhere'",
    "train --runs file/runs": "another folder",
    "train --resume no/such": "no such folder",
    "train --recipe no.toml": "no.toml",
    "demo --runs file": "another folder",
    "trian": "did you mean train?",
    "study horzon": "did you mean horizon?",
    # Numbers are refused before it is looked whether the run is there.
    "crop runs/a --points 50": "--points is 50.0; expected a number from 0 to less than 50",
    "crop runs/a --confidence 95": "--confidence is 95.0; expected a number above 0.5 to less than",
    "train digits --confidence 95": "confidence is 95; expected a fraction above 0.5 and below 1",
    "crop runs/a --blocks 0": "--blocks is 0; expected at least 1",
    "crop runs/a --multiply-adds 0": "--multiply-adds is 0.0; expected a number above 0 to 1",
    "crop runs/a --latency 1.5": "--latency is 1.5",
    "heal runs/a --epochs 0": "--epochs is 0",
    "heal runs/a --fade 2": "--fade is 2.0",
    "heal runs/a --teacher-weight 3": "--teacher-weight is 3.0; expected a number from 0 to 1",
    "heal runs/a --temperature -1": "--temperature is -1.0; expected a number > 0",
    "refine runs/a --factor 0": "--factor is 0",
    "ode runs/a --tolerance -1": "--tolerance is -1.0",
    "gradient runs/a --steps 0": "--steps is 0",
    "compare runs/a": "two runs or more",
    "merge runs/a": "two runs or more",
    "merge runs/a runs/b --weights 1": "expected 2, one a run",
    "merge runs/a runs/b --width 0": "--width is 0",
    "interpolate runs/a runs/b --points 1": "--points is 1",
    "interpolate runs/a runs/b --save 2": "--save is 2.0",
    "interpolate runs/a runs/b --save 0.5": "--save and --name go together",
    "demo --seed -1": "--seed is -1",
}
PROBE = """
import json, sys
from deeplimit.cli import main
codes = []
for words in json.loads(sys.argv[1]):
    print(f"== {words}", file=sys.stderr)
    codes.append(main(words))
heavy = [m for m in ("torch", "numpy", "sklearn", "scipy", "plotly", "pyarrow") if m in sys.modules]
print(json.dumps([codes, heavy]))
"""


def probed(lines: list[list[str]], here: Path) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, heavy modules, what stderr says of each; all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(lines)],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    return codes, heavy, done.stderr.split("== ")[1:]


def test_help_imports_nothing_large(tmp_path: Path) -> None:
    codes, heavy, _ = probed([[*words, "--help"] for words in HELP], tmp_path)
    assert codes == [0] * len(HELP)
    assert heavy == []


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra `hub` is not installed"
)
def test_wrong_words_import_nothing_large(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "net.py").write_text("")
    codes, heavy, said = probed([line.split() for line in WRONG], tmp_path)
    assert codes == [2] * len(WRONG)
    assert heavy == []
    for line, told in zip(WRONG, said, strict=True):
        assert WRONG[line] in told, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "net.py"]
