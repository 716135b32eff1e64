"""DDP and FSDP2 on two gloo processes: gradients equal those of one process, float64."""

import pytest
from bare_process import BareProcess, free_port

pytestmark = pytest.mark.processes

SCRIPT = """
import os, sys, time, warnings
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification
from deeplimit import Heun, ResidualChain, drift, use_adjoint, use_backprop
from deeplimit import SoftCrossEntropy, StageCost
from deeplimit.gradient import AdjointError
from deeplimit.network.blocks import TwoLayerResidual

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 6)
    def forward(self, x):
        return x + 0.2 * self.outer(self.inner(x).tanh())

def network(kind):
    torch.manual_seed(0)
    if kind == "foreign":
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(*(Block() for _ in range(6)))).double()
    blocks = [TwoLayerResidual(6, 12, "tanh") for _ in range(6 + (kind == "heun"))]
    return ResidualChain(blocks, step=0.2, scheme=Heun() if kind == "heun" else None).double()

def blocks_of(model):
    return model if isinstance(model, ResidualChain) else model[1]

def gradients(model):
    found = []
    for p in model.parameters():
        g = p.grad
        found.append(g.full_tensor() if hasattr(g, "full_tensor") else g)
    return found

def stage_cost():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4,
                       num_labels=3, num_hidden_layers=4, intermediate_size=24)
    model = ViTForImageClassification(config).double()
    use_adjoint(model, evaluations=9, on_drift="ignore")
    return StageCost(model, SoftCrossEntropy(3, 0.1), weight=0.3, control_cost=0.01)

def work(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.manual_seed(3))
    for kind in ("chain", "heun", "foreign"):
        for e, bits in ((1, 0), (3, 0), (30, 8)):
            one = use_adjoint(network(kind), evaluations=e, bits=bits, on_drift="ignore")
            plain = network(kind)
            plain(x).square().mean().backward()
            for wrapping in ("ddp", "ddp unused", "fsdp"):
                one.zero_grad()
                for _ in range(2):
                    one.zero_grad()
                    one(x).square().mean().backward()
                expected = gradients(one)
                model = use_adjoint(network(kind), evaluations=e, bits=bits, on_drift="ignore")
                if wrapping == "fsdp":
                    for block in blocks_of(model):
                        fully_shard(block)
                    fully_shard(model)
                    wrapped = model
                else:
                    wrapped = DistributedDataParallel(
                        model, find_unused_parameters=wrapping == "ddp unused"
                    )
                for _ in range(2):
                    wrapped.zero_grad()
                    wrapped(x[4 * rank : 4 * rank + 4]).square().mean().backward()
                got = gradients(model)
                gap = max(float((a - b).abs().max()) for a, b in zip(got, expected))
                off = max(float((a - b.grad).abs().max()) for a, b in zip(got, plain.parameters()))
                rebuilt = drift(model)
                if rank == 0:
                    print(kind, e, bits, wrapping.replace(" ", "_"), gap, off, rebuilt, flush=True)
    for kind in ("chain", "foreign"):  # the last one of each is sharded
        model = use_adjoint(network(kind), on_drift="ignore")
        for block in blocks_of(model):
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        loss = model(x).square().mean()
        optimizer.step()
        try:
            loss.backward()
        except AdjointError as error:
            if rank == 0:
                print("refused", str(error), flush=True)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(5))
    classes, mine = torch.tensor([0, 2, 1, 2]), slice(2 * rank, 2 * rank + 2)
    one, divided = stage_cost(), stage_cost()
    for block in divided.anatomy.blocks:
        fully_shard(block)
    fully_shard(divided)
    for _ in range(2):
        one.zero_grad()
        one(images, classes)[0].backward()
        divided.zero_grad()
        divided(images[mine], classes[mine])[0].backward()
    gap = max(float((a - b).abs().max()) for a, b in zip(gradients(divided), gradients(one)))
    if rank == 0:
        print("stage_cost", gap, flush=True)
    dist.destroy_process_group()
    time.sleep(0.25)  # as deeplimit's own processes do: gloo's threads let go of tensors

if __name__ == "__main__":
    mp.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_gradients_equal_the_single_process(bare_process: BareProcess) -> None:
    lines = bare_process.run(SCRIPT, free_port()).stdout.splitlines()
    refused = [line for line in lines if line.startswith("refused")]
    assert len(refused) == 2  # an optimiser's step between forward and backward
    assert all("parameters were changed between forward and backward" in line for line in refused)
    (charged,) = (line.split() for line in lines if line.startswith("stage_cost"))
    assert float(charged[1]) < 1e-12  # of a ViT, computed in the replays of sharded blocks
    rows = [line.split() for line in lines if line not in refused][:-1]
    assert len(rows) == 27
    for kind, evaluations, bits, wrapping, gap, off, rebuilt in rows:
        assert float(gap) < 1e-12, (kind, evaluations, bits, wrapping)
        if bits == "0":
            assert float(off) > 1e-9  # the adjoint was at work: plain gradients are others
            assert 0 < float(rebuilt) < 0.5
        else:  # of half a batch the codes are others: 30 evaluations take them to the true states
            assert float(rebuilt) < 1e-12
