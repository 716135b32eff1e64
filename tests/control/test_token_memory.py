"""Memory of losses over tokens by the allocator's own accounting, in a process of its own."""

import json

import pytest
from bare_process import BareProcess

pytestmark = pytest.mark.slow

PEAKS = """
import json
import torch, transformers
from torch.profiler import ProfilerActivity, profile
from deeplimit import SoftCrossEntropy, StageCost, anatomy, turnpike_profile, use_adjoint
from deeplimit.control import soft_cross_entropy

torch.set_num_threads(1)
VOCABULARY, BATCH, LENGTH = 8192, 4, 8
soft_cross_entropy.CHUNK = 4 * VOCABULARY  # of the 32 tokens four at a time
loss = SoftCrossEntropy(VOCABULARY, 0.1)
x = torch.randint(VOCABULARY, (BATCH, LENGTH))
y = x.roll(-1, 1)

def model(depth):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=depth,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).train()

def step(model, weight=0.3):
    stage_cost = StageCost(model, loss, weight)
    return lambda: stage_cost(x, y)[0].backward()

def all_at_once(model):
    structure = StageCost(model, loss).anatomy
    def run():
        z = structure.logits(structure.states(x)[0])
        loss(z, y.expand(len(z), *y.shape)).mean((1, 2)).sum().backward()
    return run

def peak(work):
    work()  # gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    at = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            at += event.nbytes()
            most = max(most, at)
    return most / (4 * BATCH * LENGTH * VOCABULARY)

def peaks(depth):
    profiled = anatomy(model(depth))  # what reading it takes does not depend on the batch
    return {
        "no stage cost": peak(step(model(depth), 0.0)),
        "plain": peak(step(model(depth))),
        "adjoint": peak(step(use_adjoint(model(depth), on_drift="ignore"))),
        "all at once": peak(all_at_once(model(depth))),
        "profile": peak(lambda: turnpike_profile(profiled, [(x, y)], loss)),
    }

print(json.dumps([peaks(2), peaks(6)]))
"""


@pytest.mark.processes
def test_logits_of_all_layers_are_never_in_memory_at_once(bare_process: BareProcess) -> None:
    """Peaks of a step, of two layers and of six, in units of the model's own logits."""
    pytest.importorskip("transformers")
    few, many = json.loads(bare_process.run(PEAKS).stdout)
    # The model's logits, their log-softmax, their gradient. What comes with layers is states.
    assert few["no stage cost"] == pytest.approx(3, abs=0.2)
    for way in ("plain", "adjoint"):
        assert few[way] < few["no stage cost"] + 0.25
        assert many[way] < many["no stage cost"] + 0.5
    assert many["profile"] < 1.5
    assert many["all at once"] > 2 * few["all at once"] > 16
