"""A pretrained CIFAR ResNet-56, a short budget: which way to 13 of its 27 blocks is best?

All arms train with the same one-cycle SGD on all training images for the same number of epochs,
cut included; what is chosen is chosen on training images or on the first half of the test images,
figures are of the second half (the published weights have seen every training image).

    python benchmarks/pretrained_budget.py --data-dir PATH --weights FOLDER --arms faded

Arms:
    whole         all 27 blocks, fine-tuned
    smaller       the pretrained ResNet-32, fine-tuned
    greedy        2/3 of the epochs with all blocks, a greedy cut to 13, 1/3 of healing
    stage cost    the same with a stage cost of 0.1 at every block before the cut
    influence     the blocks of least influence are cut first, then fine-tuned
    tails         as many from the end of each stage, cut first, then fine-tuned
    faded         blocks of least influence fade out in the first 45 %, then go
    chosen        the same of blocks that `choose_cut` chooses on training images
    taught        as faded, with the whole pretrained network as teacher
    spread        equally spaced blocks of each stage stay, the others are cut; then fine-tuned
    beside        the same, taught by the whole network, which is fine-tuned beside it on the same
                  batches: 1.5 times the arithmetic of `whole`

Every arm's figures are those of its last weights, and of a running average of its weights over the
last half of its last stretch (`averaged`).
One JSON file is written, after each arm; an arm that is there is not run again.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deeplimit import SoftCrossEntropy, StageCost, anatomy, choose_cut, crop, turnpike_profile
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control import Fading
from deeplimit.data import Augmentation, Split, iter_batches, load_dataset
from deeplimit.network import CifarResNet
from deeplimit.studies.harness import machine

RESULTS = Path(__file__).parent / "results" / "pretrained_budget.json"
KEPT, BATCH, RATE, DECAY = 13, 128, 0.05, 5e-4
FADED = 0.45  # of the training, after which the steps of faded layers are zero
TAUGHT, SOFT = 0.5, 2.0  # the teacher's weight, the temperature of its logits
BESIDE, SOFTER = 0.6, 3.0  # the same, of a teacher that trains beside
AUGMENTATION = Augmentation(crop=4, flip=True)
STAYS = 0.995  # of the average, in a step
GREEDY_SAMPLES = 1000


class Training:
    """One-cycle SGD on all training images, through several stretches of one budget."""

    def __init__(self, options: argparse.Namespace, train: Split):
        self.options, self.train = options, train
        self.epochs: float = options.epochs
        self.per_epoch = int(options.part * len(train)) // BATCH
        self.total = int(self.epochs * self.per_epoch)
        self.done = 0
        self.averaged: nn.Module | None = None
        self._batches = self._endless()

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(int(self.epochs) + 2):
            loader = iter_batches(
                self.train, BATCH, seed=self.options.seed, epoch=epoch,
                augmentation=AUGMENTATION,
            )  # fmt: skip
            for n, batch in enumerate(loader):
                if n == self.per_epoch:
                    break
                yield batch

    def run(self, objective: nn.Module, fraction: float, before_step: object = None) -> None:
        """Trains for a fraction of the budget; a cycle of its own for each stretch."""
        steps = round(fraction * self.total)
        optimizer = SGD(objective.parameters(), lr=RATE, momentum=0.9, nesterov=True,
                        weight_decay=DECAY)  # fmt: skip
        schedule = OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15,
                              div_factor=10, final_div_factor=1000)  # fmt: skip
        average = get_ema_multi_avg_fn(STAYS)
        objective.train()
        for n in range(steps):
            if n == steps // 2:
                self.averaged = AveragedModel(objective.model, multi_avg_fn=average)
            x, y = next(self._batches)
            if callable(before_step):
                before_step(n / steps)
            optimizer.zero_grad()
            with autocast(self.options):
                cost, _ = objective(x.to(memory_format=torch.channels_last), y)
            cost.backward()
            optimizer.step()
            schedule.step()
            if n >= steps // 2:
                self.averaged.update_parameters(objective.model)
            self.done += 1
            if self.done % 50 == 0:
                print(f"\r{self.done} of {self.total} steps", end="", flush=True)
        print()


class Taught(nn.Module):
    """(1 − w)·cross-entropy + w·τ²·KL(teacher ‖ student), logits divided by τ.

    With `beside` the teacher is trained too: its own cross-entropy is added.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None, *, beside: bool = False):
        super().__init__()
        self.model, self.beside = model, beside
        self.w, self.tau = (BESIDE, SOFTER) if beside else (TAUGHT, SOFT)
        if beside:
            self.teacher = teacher
        else:
            self.__dict__["teacher"] = teacher  # not to be trained

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(cost, logits)."""
        z = self.model(x).float()
        cost = F.cross_entropy(z, y)
        if self.teacher is not None:
            with torch.set_grad_enabled(self.beside):
                said = self.teacher(x).float()
            known = F.log_softmax(said.detach() / self.tau, dim=1)
            mine = F.log_softmax(z / self.tau, dim=1)
            distance = F.kl_div(mine, known, log_target=True, reduction="batchmean")
            cost = (1 - self.w) * cost + self.w * self.tau**2 * distance
            if self.beside:
                cost = cost + F.cross_entropy(said, y)
        return cost, z


def autocast(options: argparse.Namespace) -> torch.autocast:
    """bfloat16 where asked for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, options: argparse.Namespace) -> float:
    """On a split, in per cent."""
    hits = 0
    with evaluating(model), autocast(options):
        for x, y in iter_batches(split, 500):
            hits += int((model(x.to(memory_format=torch.channels_last)).argmax(1) == y).sum())
    return 100 * hits / len(split)


@torch.no_grad()
def settle(model: nn.Module, train: Split, options: argparse.Namespace) -> nn.Module:
    """The norms' running statistics anew, of these images: the weights come from others.

    Augmented as in training: those of images as they are cost the weights 4 points.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with autocast(options):
        loader = iter_batches(train, 250, seed=1, augmentation=AUGMENTATION)
        for _, (x, _) in zip(range(20), loader, strict=False):
            model(x.to(memory_format=torch.channels_last))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def least_influence(
    model: nn.Module, train: Split, options: argparse.Namespace, chosen: bool = False
) -> list[int]:
    """All but KEPT layers: those that change the state least, relatively, or the chosen ones.

    A first block of a stage stays: its shortcut alone would lose half of the pixels' neighbours.
    """
    settled = settle(deepcopy(model), train, options)
    few = iter_batches(train.take(GREEDY_SAMPLES), 250)
    profile = turnpike_profile(settled, few, SoftCrossEntropy(10, 0.05))
    if chosen:
        return list(choose_cut(settled, profile, few, blocks=KEPT).removed)
    change = profile.relative_update
    free = sorted(set(range(len(change))) - first_blocks(settled), key=change.__getitem__)
    return sorted(free[: len(change) - KEPT])


def first_blocks(model: nn.Module) -> set[int]:
    """The layers that change the shape."""
    stages = anatomy(model).state_stages
    return {n for n in range(len(stages) - 1) if stages[n] != stages[n + 1]}


def spread(model: nn.Module) -> list[int]:
    """All but KEPT layers: of each stage as many stay as of the others, equally spaced."""
    removed: list[int] = []
    sizes = [len(stage) for stage in model.stages]
    for m, size in enumerate(sizes):
        stay = KEPT * (m + 1) // len(sizes) - KEPT * m // len(sizes)
        kept = {round(i * (size - 1) / (stay - 1)) for i in range(stay)}
        removed += [sum(sizes[:m]) + n for n in range(size) if n not in kept]
    return removed


def greedy(model: nn.Module, select: Split, options: argparse.Namespace) -> nn.Module:
    """Takes out, one after the other, the block whose loss costs least accuracy."""
    few = select.take(GREEDY_SAMPLES)
    while anatomy(model).horizon > KEPT:
        free = set(range(anatomy(model).horizon)) - first_blocks(model)
        tried = {n: accuracy(crop(model, remove=[n]), few, options) for n in free}
        model = crop(model, remove=[max(tried, key=tried.__getitem__)])
        print(f"{anatomy(model).horizon} blocks: {max(tried.values()):.1f} %", flush=True)
    return model


def run(arm: str, options: argparse.Namespace) -> dict[str, object]:
    """One arm: what it reached on the half of the test images that chose nothing."""
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    data = load_dataset("cifar10", data_dir=options.data_dir)
    everything = Split(
        torch.cat([data.train.x, data.validation.x]), torch.cat([data.train.y, data.validation.y])
    )
    half = len(data.test) // 2
    select = data.test.take(half)
    report = Split(data.test.x[half:], data.test.y[half:])
    name = "cifar10-resnet32" if arm == "smaller" else "cifar10-resnet56"
    model: nn.Module = CifarResNet.from_weights(options.weights / f"{name}.safetensors")
    model = model.to(memory_format=torch.channels_last)
    training, row, faded = Training(options, everything), {}, []
    if arm in ("whole", "smaller"):
        training.run(Taught(model), 1.0)
    elif arm in ("greedy", "stage cost"):
        weight = 0.1 if arm == "stage cost" else 0.0
        training.run(StageCost(model, SoftCrossEntropy(10, 0.05), weight), 2 / 3)
        model = greedy(model, select, options)
        row["after_the_cut"] = accuracy(model, report, options)
        training.run(Taught(model), 1 / 3)
    elif arm in ("influence", "tails", "spread", "beside"):
        gone = least_influence(model, everything, options) if arm == "influence" else spread(model)
        if arm == "tails":
            gone = [*range(4, 9), *range(14, 18), *range(22, 27)]
        whole, model = model, crop(model, remove=gone)
        row = {"removed": gone}
        row["after_the_cut"] = accuracy(settle(model, everything, options), report, options)
        beside = arm == "beside"
        training.run(Taught(model, whole if beside else None, beside=beside), 1.0)
        if beside:
            row["teacher_accuracy"] = accuracy(whole, report, options)
    else:
        gone = least_influence(model, everything, options, chosen=arm == "chosen")
        print("removed:", gone, flush=True)
        teacher = settle(deepcopy(model), everything, options) if arm == "taught" else None
        with ExitStack() as stack:
            fade = stack.enter_context(Fading(model, gone))
            training.run(
                Taught(model, teacher), 1.0, lambda t: fade.set_step(max(0.0, 1 - t / FADED))
            )
        model = crop(model, remove=gone)
        row["removed"], faded = gone, gone
    averaged = settle(crop(training.averaged.module, remove=faded), everything, options)
    row["averaged"] = {
        "select_accuracy": accuracy(averaged, select, options),
        "test_accuracy": accuracy(averaged, report, options),
    }
    return row | {
        "arm": arm, "epochs": options.epochs, "seed": options.seed,
        "blocks": anatomy(model).horizon,
        "parameters": sum(p.numel() for p in model.parameters()),
        "select_accuracy": accuracy(model, select, options),
        "test_accuracy": accuracy(model, report, options),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main() -> None:
    arms = ["whole", "smaller", "greedy", "stage cost", "influence", "tails", "faded",
            "chosen", "taught", "spread", "beside"]  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="with cifar10 in it")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the .safetensors")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=float, default=1.0, help="of the images in an epoch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for arm in options.arms:
        rows = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
        key = (arm, options.epochs, options.seed)
        if any((row["arm"], row["epochs"], row["seed"]) == key for row in rows):
            continue
        row = run(arm, options)
        print(row, flush=True)
        settings = {"precision": options.precision, "part": options.part, "rate": RATE,
                    "batch": BATCH, "weight_decay": DECAY, "faded": FADED}  # fmt: skip
        result = {"machine": machine(), "settings": settings, "runs": [*rows, row]}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
