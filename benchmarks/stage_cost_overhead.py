"""What a stage cost adds to a training step, of three networks; against loops by hand.

The limit on paper, of a step's forward and backward passes: the states are there anyway, kept for
backpropagation; the head reads them once more. Of 20 convolutional blocks that is a pool and a
small linear layer on each state, against two 3×3 convolutions; of a ViT of 12 blocks a layer norm
of 197 tokens and a linear layer of one. Of a decoder the head is most of a layer: 32,000 × 512
against 3.9 million parameters of a block, so that 12 heads more, each computed once more in the
backward pass, take 12 · 4/3 · 16.4 million products against 12 · 3.9 + 16.4 of a plain step: 5.2
times as long altogether. A few layers, whose logits fit into one chunk and are not made again,
take 1 + 0.26 k times as long.

Beside the stage cost: the same objective by hand, a call of the head per layer, and one step of
sentence-transformers' AdaptiveLayerLoss written out for a classifier: the loss of one random layer,
and its divergence from the last one's answers.

    python benchmarks/stage_cost_overhead.py --rounds 7

Steps are taken in turns; a figure is the minimum over the rounds, in CPU-seconds of one thread, so
that other work on the machine counts little. Every round is kept, and a second call goes on.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from deeplimit import SoftCrossEntropy, StageCost
from deeplimit.network import Architecture, anatomy
from deeplimit.studies.harness import machine

GAMMA, CONTROL = 0.1, 1e-4
OUT = Path(__file__).parent / "results" / "stage_cost_overhead.json"
# What a step by hand is made of: the states x_n, n < N, with the logits; and the head.
Pieces = tuple[Callable[[Tensor], tuple[list[Tensor], Tensor]], Callable[[Tensor], Tensor]]


def chain() -> tuple[nn.Module, Tensor, Tensor, int, Pieces]:
    """20 convolutional blocks at 7×7."""
    model = Architecture("convolutional", (1, 28, 28), 10, (20,), 16, 16).build()
    structure = anatomy(model)

    def states(x: Tensor) -> tuple[list[Tensor], Tensor]:
        found, logits = structure.states(x)
        return found[:-1], logits

    return model, torch.rand(128, 1, 28, 28), torch.randint(10, (128,)), 10, (states, model.head)


def vit() -> tuple[nn.Module, Tensor, Tensor, int, Pieces]:
    """The shape of ViT-S: 12 blocks of width 384, 197 tokens."""
    config = ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=100
    )
    model = ViTForImageClassification(config)

    def states(x: Tensor) -> tuple[list[Tensor], Tensor]:
        out = model(x, output_hidden_states=True)
        return list(out.hidden_states[:-1]), out.logits

    def head(x: Tensor) -> Tensor:
        return model.classifier(model.vit.layernorm(x)[:, 0])

    return model, torch.rand(2, 3, 224, 224), torch.randint(100, (2,)), 100, (states, head)


def decoder() -> tuple[nn.Module, Tensor, Tensor, int, Pieces]:
    """A Llama of 12 blocks of width 512 with a vocabulary of 32,000."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)

    def states(x: Tensor) -> tuple[list[Tensor], Tensor]:
        out = model(x, output_hidden_states=True, use_cache=False)
        return list(out.hidden_states[:-1]), out.logits

    def head(x: Tensor) -> Tensor:
        return model.lm_head(model.model.norm(x))

    x, y = torch.randint(32000, (1, 128)), torch.randint(32000, (1, 128))
    return model, x, y, 32000, (states, head)


NETWORKS = {"chain of 20": chain, "ViT-S of 12": vit, "decoder of 12, 32,000 words": decoder}


def ways(make: Callable) -> dict[str, Callable[[], None]]:
    """A training step (forward, cost, backward, update) of each way, on one and the same model."""
    torch.manual_seed(0)
    model, x, y, classes, (states, head) = make()
    model.train()
    loss = SoftCrossEntropy(classes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step_of(cost: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            optimiser.zero_grad()
            cost().backward()
            optimiser.step()

        return step

    def ours(weight: float, control_cost: float = 0.0, layers: int | None = None):
        objective = StageCost(model, loss, weight, control_cost=control_cost, layers=layers)
        return step_of(lambda: objective(x, y)[0])

    def by_hand() -> Tensor:
        below, logits = states(x)
        return loss.mean(logits, y) + GAMMA * sum(loss.mean(head(s), y) for s in below)

    def adaptive() -> Tensor:
        below, logits = states(x)
        z = head(random.choice(below))
        taught = F.log_softmax(logits.detach(), -1)
        apart = F.kl_div(F.log_softmax(z, -1), taught, reduction="batchmean", log_target=True)
        return loss.mean(logits, y) + loss.mean(z, y) + apart

    return {
        "plain": ours(0.0),
        "all layers": ours(GAMMA),
        "all layers, control cost": ours(GAMMA, CONTROL),
        "layers=4": ours(GAMMA, layers=4),
        "layers=2": ours(GAMMA, layers=2),
        "layers=1": ours(GAMMA, layers=1),
        "by hand, all layers": step_of(by_hand),
        "as AdaptiveLayerLoss, one layer": step_of(adaptive),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if result.get("machine") != machine():
        result = {"machine": machine(), "networks": {}}
    for name, make in NETWORKS.items():
        kept = result["networks"].setdefault(name, {"loads": [], "cpu_seconds": {}})
        if len(kept["loads"]) >= options.rounds:
            continue
        steps, seconds = ways(make), kept["cpu_seconds"]
        repeats = 5 if name.startswith("chain") else 1
        while len(kept["loads"]) < options.rounds:
            for way, step in steps.items():
                began = time.process_time()
                for _ in range(repeats):
                    step()
                seconds.setdefault(way, []).append((time.process_time() - began) / repeats)
            kept["loads"].append(round(os.getloadavg()[0], 1))
            least = {way: min(values) for way, values in seconds.items()}
            kept["ratio_to_plain"] = {w: round(v / least["plain"], 3) for w, v in least.items()}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}, load {kept['loads']}:", kept["ratio_to_plain"])


if __name__ == "__main__":
    main()
