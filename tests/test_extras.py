"""The core without the extras: it works, and what needs a library says which extra in a line."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deeplimit.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = f"""
import sys

NAMES = set({" ".join(EXTRAS.values()).split()!r})

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in NAMES:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""
CORE = """
import torch
from torch import nn
import deeplimit
from deeplimit import StageCost, SoftCrossEntropy, anatomy, crop, turnpike_profile, use_adjoint
from deeplimit import verify_crop
from torch.utils.data import DataLoader, TensorDataset

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + 0.1 * torch.tanh(self.inner(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

torch.manual_seed(0)
x, y = torch.randn(90, 6), torch.arange(90) % 3
loader = DataLoader(TensorDataset(x, y), batch_size=30)
model = Net()
loss = SoftCrossEntropy(3)
structure = anatomy(model, x[:2])
assert structure.horizon == 4
cost, _ = StageCost(use_adjoint(model), loss, weight=0.1)(x, y)
cost.backward()
assert all(p.grad is not None for p in model.parameters())
profile = turnpike_profile(model, loader, loss)
assert len(profile.loss) == 5
small = crop(model, 3)
report = verify_crop(model, small, loader, loss)
assert (report.horizon_before, report.horizon_after) == (4, 3)
assert not NAMES & set(sys.modules)
print("done")
"""


def python(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + script, *args],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_the_core_works_without_extras() -> None:
    done = python(CORE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "digits"], ["crop", "runs/x"]])
def test_the_command_says_which_extra_it_needs(words: list[str]) -> None:
    done = python("from deeplimit.cli import main\nsys.exit(main(sys.argv[1:]))", *words)
    assert done.returncode == 2
    assert done.stderr == 'deeplimit: tyro is not installed; pip install "deeplimit[cli]"\n'


@pytest.mark.slow
def test_public_names_say_which_extra_they_need() -> None:
    script = """
import deeplimit
for name in deeplimit.__all__:
    try:
        getattr(deeplimit, name)
    except ImportError as error:
        assert isinstance(error, deeplimit.InputError), error
        print(name, str(error).split("pip install")[1].strip())
"""
    done = python(script)
    assert done.returncode == 0, done.stderr
    told = dict(line.split() for line in done.stdout.splitlines())
    assert told["heal"] == '"deeplimit[cli]"'
    needed = set(told)
    assert not needed & {"StageCost", "anatomy", "crop", "use_adjoint", "turnpike_profile"}


def test_extras_bring_what_they_say() -> None:
    """Of each extra in pyproject.toml the table names the modules; the core needs five at most."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) <= 5
    modules = {
        "POT": "ot",
        "scikit-learn": "sklearn",
        "lightning-fabric": "lightning_fabric",
        "pillow": "PIL",
        "tomli-w": "tomli_w",
    }
    for extra, names in EXTRAS.items():
        wanted = project["optional-dependencies"][extra]
        libraries = [line.partition(">")[0] for line in wanted if not line.startswith("deeplimit[")]
        assert {modules.get(name, name) for name in libraries} <= set(names.split())
