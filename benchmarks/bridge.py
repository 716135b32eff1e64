"""Cuts and their bridges: cut, cut and bridged, each healed for a moment or not.

    python benchmarks/bridge.py --data-dir PATH     # with cifar10, weights, llama-stories260k, text

Layers are those of least block influence on the data that the bridge is fitted on; figures are of
data that chose and fitted nothing: accuracy in per cent of our classifier on digits and of the
pretrained CIFAR ResNet-56, perplexity of the pretrained Llama of 260,000 parameters. `heal`: so
many steps of AdamW on the same data. One JSON file is written, after each row; a row that is there
is not run again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from deeplimit import SoftCrossEntropy, anatomy, crop, turnpike_profile
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control import bridge_of
from deeplimit.data import Split, iter_batches, load_dataset
from deeplimit.network import Architecture, CifarResNet
from deeplimit.studies.harness import machine

RESULTS = Path(__file__).parent / "results" / "bridge.json"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, the data that it is fitted and healed on, and what is measured."""

    model: nn.Module
    fitting: list[Batch]
    figure: Callable[[nn.Module], float]
    unit: str
    removed: tuple[int, ...]
    rate: float
    classes: int


def steps(model: nn.Module, fitting: list[Batch], count: int, rate: float) -> nn.Module:
    """So many steps of AdamW, one cycle."""
    model = deepcopy(model).train()
    torch.manual_seed(0)
    optimizer = AdamW(model.parameters(), rate)
    schedule = OneCycleLR(optimizer, rate, total_steps=count, pct_start=0.2)
    for step in range(count):
        x, y = fitting[step % len(fitting)]
        z = logits_of(model, x)
        loss = F.cross_entropy(z.flatten(0, -2), y.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Of a classifier, or of a model of transformers."""
    z = model(x)
    return z if isinstance(z, Tensor) else z.logits


@torch.no_grad()
def accuracy(test: Iterable[Batch]) -> Callable[[nn.Module], float]:
    """In per cent."""

    def figure(model: nn.Module) -> float:
        with evaluating(model):
            right = [model(x).argmax(-1) == y for x, y in test]
        return 100 * float(torch.cat(right).double().mean())

    return figure


def digits(options: argparse.Namespace) -> Case:
    """Our classifier of constant width, six layers, trained here."""
    data = load_dataset("digits")
    torch.manual_seed(0)
    model = Architecture("vector", data.shape, 10, (6,), width=32, hidden=16).build()
    fitting = list(iter_batches(data.train, 64, seed=0, epoch=0))
    every = torch.cat([x for x, _ in fitting])
    model.standardise(every.mean(0), every.std(0) + 0.1 * every.std())
    model = steps(model, fitting, 600, 3e-3)
    test = list(iter_batches(data.test, 500))
    return Case(model, fitting, accuracy(test), "accuracy, %", (1, 2, 3, 4), 1e-3, 10)


def resnet(options: argparse.Namespace) -> Case:
    """ResNet-56: 27 blocks."""
    data = load_dataset("cifar10", data_dir=options.data_dir)
    model = CifarResNet.from_weights(options.data_dir / "weights/cifar10-resnet56.safetensors")
    fitting = list(iter_batches(data.train.take(options.images), 64))
    test = list(
        iter_batches(
            Split(data.test.x[-options.test_images :], data.test.y[-options.test_images :]), 250
        )
    )
    return Case(model.eval(), fitting, accuracy(test), "accuracy, %", (3, 7, 10), 1e-3, 10)


def llama(options: argparse.Namespace) -> Case:
    """Five layers; every text of 128 tokens begins with token 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = options.data_dir / "llama-stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = (options.data_dir / "text/wizard-of-oz.txt").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    x = torch.tensor(ids[: len(ids) // 127 * 127]).view(-1, 127)
    x = torch.cat([torch.ones(len(x), 1, dtype=torch.long), x], 1)
    y = torch.cat([x[:, 1:], torch.full((len(x), 1), -100)], 1)
    pairs = list(zip(x.split(16), y.split(16), strict=True))
    fitting, test = pairs[: len(pairs) // 2], pairs[3 * len(pairs) // 4 :]

    @torch.no_grad()
    def perplexity(model: nn.Module) -> float:
        rows = [
            F.cross_entropy(logits_of(model, a).flatten(0, 1), b.flatten(), ignore_index=-100)
            for a, b in test
        ]
        return math.exp(float(torch.stack(rows).mean()))

    return Case(model, fitting, perplexity, "perplexity", (1, 2, 3), 5e-4, 512)


def row(case: Case, name: str, count: int, healing: int) -> dict[str, object]:
    """The figures of one cut."""
    profile = turnpike_profile(case.model, case.fitting[:4], SoftCrossEntropy(case.classes, 0.05))
    order = sorted(range(profile.horizon), key=profile.influence.__getitem__)
    removed: list[int] = []
    for n in order:
        stages = anatomy(case.model).state_stages
        # Before the first nothing stands; what changes the shape is not bridged.
        if n > 0 and stages[n] == stages[n + 1] and len(removed) < count:
            removed.append(n)
    removed.sort()
    cut = crop(case.model, remove=removed)
    began = time.perf_counter()
    bridged = crop(case.model, remove=removed, bridge=case.fitting)
    seconds = time.perf_counter() - began
    record = bridge_of(bridged)
    assert record is not None
    return {
        "case": name, "unit": case.unit, "removed": removed, "of": profile.horizon,
        "before": case.figure(case.model), "crop": case.figure(cut),
        "bridge": case.figure(bridged),
        "crop_healed": case.figure(steps(cut, case.fitting, healing, case.rate)),
        "bridge_healed": case.figure(steps(bridged, case.fitting, healing, case.rate)),
        "healing_steps": healing, "seconds_of_bridge": round(seconds, 1),
        "samples": record.samples, "states": record.rows, "gaps": [asdict(g) for g in record.gaps],
    }  # fmt: skip


CASES = {"digits": digits, "llama": llama, "resnet": resnet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", type=int, default=256, help="of CIFAR-10, fitted on")
    parser.add_argument("--test-images", type=int, default=1000, help="the last so many")
    parser.add_argument("--healing", type=int, default=40, help="steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.cases:
        case = CASES[name](options)
        torch.manual_seed(0)
        for count in case.removed:
            rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
            if any((r["case"], len(r["removed"])) == (name, count) for r in rows):
                continue
            made = row(case, name, count, options.healing)
            print({k: v for k, v in made.items() if k != "gaps"}, flush=True)
            result = {"machine": machine(), "rows": [*rows, made]}
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
