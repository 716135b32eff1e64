"""A small GPT-2 on a local text: perplexity against the layers kept, with and without stage cost.

    python benchmarks/text_depth.py --text README.md docs/*.md src/deeplimit/*/*.py

Letters are bytes. The last tenth of the text chooses nothing and is trained on by nobody; layers
are left out from the end (a tail), or in order of block influence (ShortGPT, arXiv 2403.03853),
which is measured on the text before it. One JSON file is written, after each seed.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GPT2Config, GPT2LMHeadModel

from deeplimit import SoftCrossEntropy, StageCost, crop, turnpike_profile
from deeplimit.studies.harness import machine

RESULTS = Path(__file__).parent / "results" / "text_depth.json"
LAYERS, WIDTH, HEADS, LENGTH, BATCH, RATE, SOFTNESS = 8, 96, 4, 128, 16, 2e-3, 0.05


def windows(text: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets [n, LENGTH]: the next byte."""
    count = (len(text) - 1) // LENGTH
    x = text[: count * LENGTH].view(count, LENGTH)
    return x, text[1 : count * LENGTH + 1].view(count, LENGTH)


def trained(text: Tensor, weight: float, steps: int, seed: int) -> nn.Module:
    """A network after so many steps on random windows of the text."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    objective = StageCost(GPT2LMHeadModel(config), SoftCrossEntropy(256, SOFTNESS), weight)
    optimizer = AdamW(objective.parameters(), RATE, weight_decay=0.1)
    schedule = OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    objective.train()
    for step in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1)) + torch.arange(LENGTH)
        cost, logits = objective(text[starts], text[starts + 1])
        optimizer.zero_grad()
        cost.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            now = float(F.cross_entropy(logits.flatten(0, 1), text[starts + 1].flatten()))
            print(f"seed {seed}, γ = {weight}: step {step + 1}, {now:.3f} nats", flush=True)
    return objective.model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor) -> float:
    """Exp of the mean cross-entropy of the next byte."""
    x, y = windows(text)
    losses = [
        F.cross_entropy(model(a, use_cache=False).logits.flatten(0, 1), b.flatten())
        for a, b in zip(x.split(64), y.split(64), strict=True)
        if len(a) == 64
    ]
    return math.exp(float(torch.stack(losses).mean()))


def figures(model: nn.Module, weight: float, select: Tensor, test: Tensor) -> dict[str, object]:
    """Perplexity for every number of layers kept."""
    x, y = windows(select)
    profile = turnpike_profile(model, [(x[:64], y[:64])], SoftCrossEntropy(256, SOFTNESS))
    order = sorted(range(LAYERS), key=lambda n: profile.influence[n])
    kept = range(1, LAYERS + 1)
    return {
        "stage_cost": weight,
        "layers_kept": list(kept),
        "tail": [perplexity(crop(model, k), test) for k in kept],
        "block_influence": [
            perplexity(crop(model, remove=order[: LAYERS - k]), test) for k in kept
        ],
        "influence": profile.influence,
        "relative_update": profile.relative_update,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--stage-costs", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    whole = b"\n".join(path.read_bytes() for path in sorted(options.text))
    text = torch.tensor(list(whole))
    a, b = int(0.8 * len(text)), int(0.9 * len(text))
    rows = []
    for seed in options.seeds:
        for weight in options.stage_costs:
            model = trained(text[:a], weight, options.steps, seed)
            rows.append({"seed": seed} | figures(model, weight, text[a:b], text[b:]))
            print(rows[-1], flush=True)
            result = {
                "machine": machine(),
                "network": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "length": LENGTH},
                "training": {"steps": options.steps, "batch": BATCH, "rate": RATE,
                             "bytes": a, "softness": SOFTNESS},
                "runs": rows,
            }  # fmt: skip
            options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
