"""Objectives beside and inside DistributedDataParallel, in two gloo processes."""

import pytest
from bare_process import BareProcess, free_port

pytestmark = pytest.mark.processes

SCRIPT = """
import os, sys, time, warnings
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from deeplimit import InputError, SoftCrossEntropy, StageCost
from deeplimit.control import Distillation
from deeplimit.network import Architecture

LOSS = SoftCrossEntropy(3)

def model():
    torch.manual_seed(0)
    return Architecture("vector", (6,), 3, (4,), width=5, hidden=5).build().double()

class Task(nn.Module):  # as somebody's own module around an objective
    def __init__(self, objective):
        super().__init__()
        self.objective = objective
    def forward(self, x, y):
        return self.objective(x, y)

def gradients(module):
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]

def say(*words):  # in one write: two processes speak
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def refused(objective, *batch):
    try:
        objective(*batch)
    except InputError as error:
        return str(error)
    return ""

def work(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.manual_seed(3))
    y = torch.arange(8) % 3
    mine = slice(4 * rank, 4 * rank + 4)
    one = StageCost(model(), LOSS, 0.3)
    one(x, y)[0].backward()  # nothing is wrapped: each by itself
    for kind in ("objective", "task", "sharded"):
        objective = StageCost(model(), LOSS, 0.3)
        wrapped = Task(objective) if kind == "task" else objective
        if kind == "sharded":
            fully_shard(wrapped)
        else:
            wrapped = DistributedDataParallel(wrapped)
        wrapped(x[mine], y[mine])[0].backward()
        pairs = zip(gradients(objective), gradients(one), strict=True)
        say("gap", kind, max(float((a - b).abs().max()) for a, b in pairs))
    for objective in (StageCost(model(), LOSS), Distillation(model(), LOSS, model())):
        wrapped = DistributedDataParallel(objective.model)
        with torch.no_grad():
            objective(x[mine], y[mine])
        for _ in range(2):
            say("says", refused(objective, x[mine], y[mine]))
        del wrapped
        say("alone", refused(objective, x[mine], y[mine]) or "taken")
    dist.destroy_process_group()
    time.sleep(0.25)

if __name__ == "__main__":
    mp.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_what_goes_around_a_wrapper_is_refused_and_nothing_else(
    bare_process: BareProcess,
) -> None:
    said: dict[str, list[str]] = {}
    for line in bare_process.run(SCRIPT, free_port()).stdout.splitlines():
        kind, _, rest = line.partition(" ")
        said.setdefault(kind, []).append(rest)
    gaps = [line.split() for line in said["gap"]]
    assert sorted(kind for kind, _ in gaps) == sorted(2 * ["objective", "sharded", "task"])
    assert max(float(gap) for _, gap in gaps) < 1e-12
    for name in ("StageCost", "Distillation"):
        says = (
            "ResidualClassifier is wrapped in DistributedDataParallel, and this "
            f"{name} goes around the wrapper: gradients of the 2 processes would not be averaged; "
            f"wrap the {name} instead"
        )
        assert sum(line.startswith(says) for line in said["says"]) == 4
    assert len(said["says"]) == 8
    assert said["alone"] == 4 * ["taken"]
