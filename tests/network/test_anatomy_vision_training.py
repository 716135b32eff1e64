"""Image classifiers of transformers, loaded without us and under the adjoint; one of one's own."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vision_families import FAMILIES, FIXED, vision

from deeplimit import SoftCrossEntropy, StageCost, crop, gradient_error, use_adjoint
from deeplimit.gradient import layout
from deeplimit.network import anatomy

pytestmark = pytest.mark.slow

LOAD = """
import sys
sys.modules["deeplimit"] = None  # from now on importing it is an error
import torch
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
try:
    import deeplimit
except ImportError:
    pass
else:
    raise SystemExit("deeplimit is there")
for folder in sys.argv[1:]:
    saved = torch.load(folder + "/example.pt")
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        gap = (model(saved["x"]).logits - saved["logits"]).abs().max()
    print(float(gap), sum(p.numel() for p in model.parameters()))
"""


def run(program: str, *arguments: str) -> list[str]:
    """The lines that a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_crops_are_loaded_by_plain_transformers(tmp_path: Path) -> None:
    """In a process in which deeplimit cannot be imported; its modules are not in the checkpoint."""
    folders, sizes = [], []
    for name in FAMILIES:
        case = vision(name)
        fixed = FIXED.get(name, ())
        gone = [n for n in (1, 2, 3, 5) if n < case.depth and n not in fixed]
        smaller = crop(case.model.eval(), remove=gone)
        folder = tmp_path / str(len(folders))
        smaller.save_pretrained(folder)
        with torch.no_grad():
            torch.save({"x": case.x, "logits": smaller(case.x).logits}, folder / "example.pt")
        assert "deeplimit" not in (folder / "config.json").read_text()
        assert len(gone) == (3 if case.depth == 4 or fixed else 4)
        folders.append(str(folder))
        sizes.append(sum(p.numel() for p in smaller.parameters()))
    dino = json.loads(Path(folders[1], "config.json").read_text())
    assert (dino["num_hidden_layers"], dino["out_indices"]) == (1, [1])
    loaded = [line.split() for line in run(LOAD, *folders)]
    assert [int(size) for _, size in loaded] == sizes
    assert [float(gap) for gap, _ in loaded] == pytest.approx([0.0] * len(FAMILIES), abs=1e-12)


def contracting(model: nn.Module, factor: float = 0.3) -> nn.Module:
    """Residual branches scaled down, so that states can be rebuilt."""
    ends = ("o_proj", "fc2", "pwconv2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].endswith(ends) or ".layer.1.normalization" in name:
                parameter.mul_(factor)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adjoint_gives_the_plain_gradients_of_the_stage_cost(name: str) -> None:
    case = vision(name)
    objective = StageCost(contracting(case.model), SoftCrossEntropy(3, 0.1), 0.3, control_cost=0.2)
    plain, _ = objective(case.x, case.y)
    plain.backward()
    exact = {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad(set_to_none=True)
    # The statistics have moved, but in training mode they do not enter the blocks; the carried
    # states' do, so that a fresh model is the one to compare with.
    fresh = contracting(vision(name).model)
    objective = StageCost(fresh, SoftCrossEntropy(3, 0.1), 0.3, control_cost=0.2)
    use_adjoint(objective, evaluations=12, on_drift="ignore")
    accuracy = gradient_error(objective, lambda model, batch: model(*batch)[0], (case.x, case.y))
    assert anatomy(fresh).replayed
    cost, _ = objective(case.x, case.y)
    cost.backward()
    assert float(cost.detach() - plain.detach()) == pytest.approx(0, abs=1e-12)
    found = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    assert found.keys() == exact.keys()
    off = torch.stack([(found[n] - exact[n]).square().sum() for n in exact]).sum().sqrt()
    scale = torch.stack([exact[n].square().sum() for n in exact]).sum().sqrt()
    error = float(off / scale)
    assert error == pytest.approx(accuracy.error, rel=1e-6, abs=1e-13)
    assert len(layout(objective).rebuilt) >= 2
    if "ResNet" not in name:  # a ReLU after the addition: that cannot be inverted, and is reported
        assert error < 1e-5


MEMORY = """
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTForImageClassification
from deeplimit import SoftCrossEntropy, StageCost, use_adjoint

torch.set_num_threads(1)

def peak(depth, adjoint):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=depth,
                       intermediate_size=16, image_size=32, patch_size=4, num_labels=3)
    model = ViTForImageClassification(config).train()
    objective = StageCost(model, SoftCrossEntropy(3, 0.1), 0.3)
    if adjoint:
        use_adjoint(model, evaluations=1, on_drift="ignore")
    x, y = torch.randn(16, 3, 32, 32), torch.randint(3, (16,))  # a state of 67 kB
    gradients = sum(4 * p.numel() for p in model.parameters())  # made during the step

    def step():
        model.zero_grad(set_to_none=True)
        objective(x, y)[0].backward()

    step()
    model.zero_grad(set_to_none=True)
    now = most = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most - gradients

print(*(peak(*case) for case in ((3, True), (12, True), (12, False))))
"""


def test_memory_of_the_stage_cost_under_the_adjoint_is_flat_in_depth() -> None:
    """N = 3 and 12 within 5 %; plain backpropagation through the same objective keeps them all."""
    shallow, deep, plain = map(float, run(MEMORY)[-1].split())
    assert deep == pytest.approx(shallow, rel=0.05)
    assert plain > 5 * deep


class Mine(nn.Module):
    """Somebody's own classifier: a stem, blocks in a list, a head."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.stem, self.readout = nn.Linear(6, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x.tanh())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


def test_a_model_of_ones_own_is_read_without_a_word() -> None:
    torch.manual_seed(0)
    model, x, y = Mine().double(), torch.randn(7, 6).double(), torch.arange(7) % 3
    states, logits = anatomy(model).states(x)
    state = model.stem(x)
    for n, block in enumerate(model.blocks):
        assert torch.equal(states[n], state)
        state = block(state)
    assert torch.equal(logits, model.readout(state.tanh()))
    smaller = crop(model, remove=[1, 3])
    assert (len(smaller.blocks), smaller.depth, model.depth) == (3, 3, 5)
    assert torch.equal(crop(model, 2)(x), model.readout(states[2].tanh()))
    loss = SoftCrossEntropy(3, 0.1)
    cost, _ = StageCost(model, loss, 0.5)(x, y)
    z = [loss(model.readout(s.tanh()), y).mean() for s in states]
    assert float(cost.detach()) == pytest.approx((z[-1] + 0.5 * sum(z[:-1])).item(), rel=1e-12)
