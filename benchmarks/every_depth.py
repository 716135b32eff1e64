"""Every depth from one training: stage costs of many kinds, against plain networks of each depth.

    python benchmarks/every_depth.py digits spirals
    python benchmarks/every_depth.py mnist --epochs 3 --seeds 0 --arms plain … uniform-0.3
    python benchmarks/every_depth.py text:FILE --model FOLDER
    python benchmarks/every_depth.py mazes --arms square plain plain-1/8 plain-1/4 plain-1/2 --out …

All arms of a seed have the same initial parameters, batches, steps and learning rates, by the data
set's own recipe. `plain` is the full network without a stage cost, whose states are read by its own
head (cut); `plain-1/4` … are plain networks of a quarter, a half and three quarters of its layers,
`plain-1/8` … of fewer, if asked for.
Every other arm trains the full network once, with

    mean ℓ(z_N) + Σ_{n<N} γ_n · mean ℓ(z_n):

    uniform-γ       γ_n = γ
    linear, rising  γ_n in proportion to n + 1; to n(n − 1)/2, as LayerSkip has it (arXiv
                    2404.16710); the sum is that of uniform-0.3
    quarters-γ      γ_n = γ at a quarter, a half and three quarters of N, and 0 elsewhere
    drawn-k         uniform-0.3 by k layers a step, drawn anew for each, the sum weighted by N/k
    sandwich        uniform-0.3 by layer 1 and one drawn of the others (arXiv 1903.05134)
    falling, growing  γ from 1 to 0.1 during the training, and from 0.1 to 1
    square          γ from 0 to 1, with the square of the part of the training that is done
    square-0.5, square-drawn-2  γ from 0 to 0.5 so; square by 2 layers a step, drawn for each
    late            uniform-0.3 from a third of the training on
    taught-τ        uniform-0.3; half of each ℓ(z_n) is τ² KL(softmax(z_N/τ) ‖ softmax(z_n/τ)), z_N
                    detached
    copying         all of it, τ = 1
    dropped         uniform-0.3; layer n is left out of a step with a probability from 0 to 0.2, in
                    proportion to 2^{n/(N−1)} − 1, as in LayerSkip
    balanced        uniform-0.3; at each state the gradient of its own loss has 0.3 times the norm
                    of that of all later ones. (As one to the number of later ones, as in arXiv
                    1908.06294, they are in the mean of uniform-1: each layer's gradient by another
                    factor, to which Adam is indifferent.)
    affine, own     uniform-0.3; every n < N has a scale and a shift of its state before the head,
                    or a copy of the head, of its own

Accuracy and loss of each depth are on test data, "validation" is the accuracy (of text the loss) on
validation data, by which arms may be chosen. A row is kept as its training ends; a run that was
stopped goes on. `--times` measures a step of each arm, in turn, since the seconds of a training
depend on what else the machine does.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from by_hand import Results, Row, clocks, since
from deeplimit import SoftCrossEntropy, StageCost
from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import RunningStatistics
from deeplimit.data import DataSet, Split
from deeplimit.errors import several
from deeplimit.training import Recipe, recipe_for
from deeplimit.training.building import (
    build_model,
    evaluation_batches,
    load_data,
    loss_of,
    training_batches,
)
from deeplimit.training.loop import build_optimizer

OUT = Path(__file__).parent / "results" / "every_depth.json"
GAMMA = 0.3
ROUNDS = 20
TIMES = "times"
CHECKED = 100  # steps of text, after which the validation loss is looked at
LLAMA = {"layers": 12, "width": 64, "heads": 4, "inner": 176}
OVERRIDES: dict[str, dict[str, Any]] = {
    "mnist": {"epochs": 1},
    "cifar10": {"width": 8, "hidden": 8, "reduction": 2, "epochs": 3},
    "text": {"epochs": 6, "batch_size": 16, "length": 128, "learning_rate": 3e-3},
}
Weights = Callable[[int, float, random.Random], Sequence[float]]


def constant(gamma: float) -> Weights:
    """The same of all layers, all the time."""
    return lambda horizon, _, __: [gamma] * horizon


UNIFORM = constant(GAMMA)


def moving(gamma: Callable[[float], float]) -> Weights:
    """The same of all layers, after each part of the training another."""
    return lambda horizon, done, _: [gamma(done)] * horizon


SQUARE = moving(lambda done: done**2)


def shaped(shape: Callable[[int], float]) -> Weights:
    """Weights in proportion to shape(n) whose sum is that of uniform ones."""

    def weights(horizon: int, _: float, __: random.Random) -> list[float]:
        values = [shape(n) for n in range(horizon)]
        return [GAMMA * horizon * value / sum(values) for value in values]

    return weights


def at_quarters(gamma: float) -> Weights:
    """The weight at a quarter, a half and three quarters of the layers."""
    return lambda horizon, _, __: [gamma * (n in quarters(horizon)[:-1]) for n in range(horizon)]


def drawn(count: int, always: Sequence[int] = (), of: Weights = UNIFORM) -> Weights:
    """Weights by these layers and so many of the others, which stand for all of them."""

    def weights(horizon: int, done: float, draws: random.Random) -> list[float]:
        others = [n for n in range(horizon) if n not in always]
        some = draws.sample(others, count)
        share = len(others) / count
        every = of(horizon, done, draws)
        return [every[n] * ((n in always) + share * (n in some)) for n in range(horizon)]

    return weights


def quarters(horizon: int) -> list[int]:
    """A quarter, a half, three quarters of the layers, and all."""
    return [round(horizon * k / 4) for k in (1, 2, 3, 4)]


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        weights: γ_n of a step, given N, the part of the training that is done, and what draws.
        part: of the layers that the network has.
        taught: the share of the teacher in ℓ(z_n), and τ.
        dropped: the largest probability that a layer is left out.
        balanced: whether gradients are.
        heads: shared, affine or own.
    """

    weights: Weights = UNIFORM
    part: float = 1.0
    taught: tuple[float, float] | None = None
    dropped: float = 0.0
    balanced: bool = False
    heads: str = "shared"


PLAIN = {
    "plain": Arm(constant(0.0)),
    "plain-1/4": Arm(constant(0.0), 1 / 4),
    "plain-1/2": Arm(constant(0.0), 1 / 2),
    "plain-3/4": Arm(constant(0.0), 3 / 4),
}
ARMS = PLAIN | {
    "uniform-0.1": Arm(constant(0.1)),
    "uniform-0.3": Arm(),
    "uniform-1": Arm(constant(1.0)),
    "linear": Arm(shaped(lambda n: n + 1)),
    "rising": Arm(shaped(lambda n: n * (n - 1) / 2)),
    "quarters-0.3": Arm(at_quarters(0.3)),
    "quarters-1": Arm(at_quarters(1.0)),
    "drawn-1": Arm(drawn(1)),
    "drawn-2": Arm(drawn(2)),
    "sandwich": Arm(drawn(1, always=(1,))),
    "falling": Arm(moving(lambda done: 1 - 0.9 * done)),
    "growing": Arm(moving(lambda done: 0.1 + 0.9 * done)),
    "square": Arm(SQUARE),
    "square-0.5": Arm(moving(lambda done: 0.5 * done**2)),
    "square-drawn-2": Arm(drawn(2, of=SQUARE)),
    "late": Arm(moving(lambda done: GAMMA * (done >= 1 / 3))),
    "taught-1": Arm(taught=(0.5, 1.0)),
    "taught-2": Arm(taught=(0.5, 2.0)),
    "copying": Arm(taught=(1.0, 1.0)),
    "dropped": Arm(dropped=0.2),
    "balanced": Arm(balanced=True),
    "affine": Arm(heads="affine"),
    "own": Arm(heads="own"),
}
EVERY = ARMS | {  # with what is run if asked for
    f"plain-{k}/{n}": Arm(constant(0.0), k / n) for k, n in ((1, 8), (1, 20), (2, 20), (3, 20))
}


class Objective(StageCost):
    """An arm's objective around a model; what the library has not is written as plainly as can be.

    Attributes:
        done: the part of the training that is done.
    """

    def __init__(self, model: nn.Module, loss: SoftCrossEntropy, arm: Arm, seed: int):
        super().__init__(model, loss)
        self.arm, self.random, self.done = arm, random.Random(seed), 0.0
        self.own_heads, self.affine = nn.ModuleList(), nn.ParameterList()
        if arm.heads == "own":
            self.own_heads.extend(copy.deepcopy(head_of(model)) for _ in self.anatomy.layers)
        if arm.heads == "affine":
            with torch.no_grad():
                states, _ = self.anatomy.states(self.anatomy.fitting_example())
            for x in states[:-1]:
                channels = (x.shape[-1],) if x.dim() != 4 else (x.shape[1], 1, 1)
                start = torch.stack([torch.ones(channels), torch.zeros(channels)])
                self.affine.append(nn.Parameter(start))

    def _run(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor | None]:
        arm = self.arm
        self.weight = arm.weights(self.anatomy.horizon, self.done, self.random)
        if arm.taught is None and not arm.balanced and arm.heads == "shared":
            with self.some_dropped():
                return super()._run(x, y)
        weights, count = self.weight, (y != IGNORED).sum()
        now = RunningStatistics(self.model.modules())
        states, logits = self.anatomy.states(x)
        if arm.balanced:
            states = [BalancedExit(s).seen if s.requires_grad else s for s in states]
        z = self.exits(states[:-1], now, x)
        losses = self.loss(z, y.expand(len(z), *y.shape)).flatten(1).sum(1) / count
        if arm.taught is not None:
            share, tau = arm.taught
            teacher = (logits.detach() / tau).log_softmax(-1).expand_as(z)
            apart = F.kl_div((z / tau).log_softmax(-1), teacher, reduction="none", log_target=True)
            apart = apart.sum(-1).flatten(1).sum(1) / count
            losses = (1 - share) * losses + share * tau**2 * apart
        return logits, (losses.new_tensor(weights) * losses).sum()

    def exits(self, states: Sequence[Tensor], now: RunningStatistics | None, x: Any) -> Tensor:
        """z_n of the states 0, 1, …; of a last one too."""
        if self.own_heads:
            heads = [*self.own_heads, head_of(self.model)]
            return torch.stack([h(s) for h, s in zip(heads, states, strict=False)])
        some = [s * own[0] + own[1] for s, own in zip(states, self.affine, strict=False)]
        return self.anatomy.logits([*some, *states[len(some) :]], 0, now, x)

    @contextmanager
    def some_dropped(self) -> Iterator[None]:
        """Leaves some layers out, for a while."""
        gone, last = [], max(self.anatomy.horizon - 1, 1)
        for stack in self.anatomy.stacks if self.arm.dropped else ():
            for n, block in zip(stack.layers, stack.blocks, strict=True):
                if self.random.random() < self.arm.dropped * (2 ** (n / last) - 1):
                    block.forward = (lambda x, **_: x) if stack.adds else torch.zeros_like
                    gone.append(block)
        try:
            yield
        finally:
            for block in gone:
                del block.forward


DEDICATED = [name for name in PLAIN if name != "plain"]


class BalancedExit:
    """Gives the gradient of a state's own loss γ times the norm of that of the later ones.

    That of its own loss is there first, as the heads stand behind all layers.
    """

    def __init__(self, x: Tensor):
        self.seen, self.own = x.view_as(x), torch.zeros(())
        self.seen.register_hook(self.keep)
        x.register_hook(self.weigh)

    def keep(self, gradient: Tensor) -> None:
        """Of its own loss."""
        self.own = gradient

    def weigh(self, both: Tensor) -> Tensor:
        """Of both, with weights."""
        later = both - self.own
        return later + GAMMA * later.norm() / self.own.norm().clamp(min=1e-12) * self.own


def head_of(model: Any) -> Any:
    """The module that reads the last state."""
    return model.head if hasattr(model, "head") else nn.Sequential(model.model.norm, model.lm_head)


def llama(recipe: Recipe, data: DataSet, depth: int) -> nn.Module:
    """A new Llama for the data's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=data.classes,
        hidden_size=LLAMA["width"],
        intermediate_size=LLAMA["inner"],
        num_hidden_layers=depth,
        num_attention_heads=LLAMA["heads"],
        max_position_embeddings=recipe.length,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def network(recipe: Recipe, data: DataSet, part: float) -> nn.Module:
    """The recipe's network with this part of its layers."""
    if data.is_text:
        return llama(recipe, data, round(LLAMA["layers"] * part))
    depth = tuple(round(layers * part) for layers in recipe.depth)
    return build_model(replace(recipe, depth=depth), data)


def begun(recipe: Recipe, data: DataSet, arm: Arm) -> Objective:
    """An arm before its training."""
    model = network(recipe, data, arm.part)
    return Objective(model, loss_of(recipe, data), arm, recipe.seed).train()


def stepped(objective: Objective, optimizer: Optimizer, x: Any, y: Tensor) -> None:
    """One step of the optimiser."""
    cost, _ = objective(x, y)
    optimizer.zero_grad()
    cost.backward()
    if not cost.isfinite():
        raise SystemExit(f"the cost is {cost.item()}")
    optimizer.step()


def trained(recipe: Recipe, data: DataSet, arm: Arm) -> Row:
    """One arm of one seed."""
    objective = begun(recipe, data, arm)
    optimizer = build_optimizer(recipe, objective)
    steps = recipe.epochs * len(training_batches(recipe, data, 0))
    schedule, start = OneCycleLR(optimizer, recipe.learning_rate, steps), clocks()
    losses: list[float] = []  # of validation data at the full depth, each hundredth step
    every = (batch for e in range(recipe.epochs) for batch in training_batches(recipe, data, e))
    for step, (x, y) in enumerate(every):
        objective.done = step / steps
        stepped(objective, optimizer, x, y)
        schedule.step()
        if data.is_text and (step + 1) % CHECKED == 0:
            losses.append(at_full_depth(objective, data.validation))
    row = {"layers": objective.anatomy.horizon, "steps": steps, **since(start)}
    test, validation = (measured(objective, s) for s in (data.test, data.validation))
    if data.is_text:
        return row | {"loss": test[1], "validation": validation[1], "on_the_way": losses}
    return row | {"accuracy": test[0], "loss": test[1], "validation": validation[0]}


def timed(recipe: Recipe, data: DataSet, names: Sequence[str]) -> Row:
    """The milliseconds of processor time of a step of each arm, the median of some in turn."""
    batch = next(iter(training_batches(recipe, data, 0)))
    arms = {name: begun(recipe, data, EVERY[name]) for name in names}
    optimizers = {name: build_optimizer(recipe, arm) for name, arm in arms.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            start, arm.done = time.process_time(), 0.5
            stepped(arm, optimizers[name], *batch)
            found[name].append(1000 * (time.process_time() - start))
    return {"milliseconds": {name: round(statistics.median(v), 2) for name, v in found.items()}}


@torch.no_grad()
def measured(objective: Objective, split: Split) -> tuple[list[float], list[float]]:
    """Accuracy and loss for every depth."""
    objective.eval()
    hits = losses = torch.zeros(objective.anatomy.horizon + 1, dtype=torch.float64)
    samples = 0
    for x, y in evaluation_batches(split):
        states, _ = objective.anatomy.states(x)
        z, counts = objective.exits(states, None, x), y != IGNORED
        samples += int(counts.sum())
        own = objective.loss(z, y.expand(len(z), *y.shape)).double()
        hits = hits + ((z.argmax(-1) == y) & counts).flatten(1).sum(1)
        losses = losses + own.flatten(1).sum(1)
    accuracy, loss = ([round(v, 5) for v in (s / samples).tolist()] for s in (hits, losses))
    return accuracy, loss


@torch.no_grad()
def at_full_depth(objective: Objective, split: Split) -> float:
    """The loss of the model's own output."""
    objective.eval()
    some = [
        objective.loss(objective.anatomy.run(x), y)[y != IGNORED]
        for x, y in evaluation_batches(split)
    ]
    objective.train()
    return round(float(torch.cat(some).mean()), 5)


def between(known: dict[int, float], depth: int) -> float:
    """What lies at a depth on the straight lines between known ones."""
    low = max(n for n in known if n <= depth)
    high = min(n for n in known if n >= depth)
    share = (depth - low) / (high - low) if high > low else 0.0
    return known[low] + share * (known[high] - known[low])


def summary(rows: Sequence[Row]) -> Row:
    """Of each data set and number of epochs, and of each arm, by the seeds that it has.

    "short" is how far an arm is below the plain networks of each depth, in points of accuracy, of
    text in hundredths of the logarithm of the perplexity: the most from a quarter of the layers on
    (on a straight line between the plain ones that there are), and at the full depth; means over
    the seeds, and each seed's. "cost" is the time of a step relative to the plain full network, and
    to all plain ones together.
    """
    told: Row = {}
    for data, epochs in sorted({(row["data"], row["epochs"]) for row in rows}):
        own = [row for row in rows if (row["data"], row["epochs"]) == (data, epochs)]
        times = next((row["milliseconds"] for row in own if row["arm"] == TIMES), {})
        arms = {name: {r["seed"]: r for r in own if r["arm"] == name} for name in ARMS}
        both = set(arms["plain"]) & set(arms["plain-1/4"])
        for name, arm in arms.items():
            seeds = sorted(both & set(arm))
            if seeds and name not in DEDICATED:
                plain = [{p: arms[p][s] for p in PLAIN if s in arms[p]} for s in seeds]
                row = {"seeds": seeds} | compared([arm[seed] for seed in seeds], plain)
                if name in times:
                    every = sum(times[p] for p in PLAIN)
                    cost = {"of_plain": times[name] / times["plain"], "of_all": times[name] / every}
                    row["cost"] = {what: round(value, 2) for what, value in cost.items()}
                told.setdefault(f"{data}, {several(epochs, 'epoch')}", {})[name] = row
    return told


def compared(arm: Sequence[Row], plain: Sequence[dict[str, Row]]) -> Row:
    """An arm beside the plain networks of the same seeds, on test and on validation data."""
    horizon = plain[0]["plain"]["layers"]
    return {
        part: short_of(
            [read(row, part) for row in arm],
            [{r["layers"]: read(r, part)[-1] for r in beside.values()} for beside in plain],
            range(quarters(horizon)[0], horizon + 1),
        )
        for part in ("test", "validation")
    }


def read(row: Row, part: str) -> list[float]:
    """The accuracies, in percent, or −100 times the losses, the logarithm of the perplexity."""
    if "accuracy" in row:
        return [100 * v for v in row["accuracy" if part == "test" else part]]
    return [-100 * v for v in row["loss" if part == "test" else part]]


def short_of(arm: Sequence[Sequence[float]], plain: Sequence[dict[int, float]], at: range) -> Row:
    """How far each seed's figures of every depth are below those known of some depths."""
    short = [
        [between(known, n) - own[n] for n in at] for own, known in zip(arm, plain, strict=True)
    ]
    mean = [statistics.mean(values) for values in zip(*short, strict=True)]
    return {
        "short": round(max(mean), 2),
        "short_of_seeds": [round(max(each), 2) for each in short],
        "short_at_full_depth": round(mean[-1], 2),
        "short_at_full_depth_of_seeds": [round(each[-1], 2) for each in short],
    }


def recipe_of(data: str, options: argparse.Namespace) -> Recipe:
    """The data set's own, with what is otherwise here."""
    recipe = replace(recipe_for(data), **OVERRIDES.get(data.partition(":")[0], {}))
    given = {"data_dir": options.data_dir, "epochs": options.epochs}
    if data.startswith("text:"):
        given["model"] = f"transformers:{options.model}"
    return replace(recipe, **{name: value for name, value in given.items() if value})


def left_out(recipe: Recipe, arm: Arm) -> bool:
    """Whether a network has no such arm: there is no head, or one for states of each stage."""
    return arm.heads == "own" and (recipe.kind == "logit" or len(recipe.depth) > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="names of data sets; text:FILE with --model")
    parser.add_argument("--model", type=Path, help="folder of transformers, for its tokenizer")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(EVERY), default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", action="store_true", help="of a step of each arm, no training")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.out, {}, ("data", "epochs", "seed", "arm"))
    for seed in options.seeds[:1] if options.times else options.seeds:
        for name in options.data:
            recipe = replace(recipe_of(name, options), seed=seed)
            data = load_data(recipe, Path("runs"))
            label = f"text of {Path(name).stem}" if data.is_text else name
            arms = [arm for arm in options.arms if not left_out(recipe, EVERY[arm])]
            for arm in [TIMES] if options.times else arms:
                key = (label, recipe.epochs, seed, arm)
                if results.has(*key):
                    continue
                row = dict(zip(results.keys, key, strict=True))
                row |= (
                    timed(recipe, data, arms) if arm == TIMES else trained(recipe, data, EVERY[arm])
                )
                results.add(row, summary)
                if arm == TIMES:
                    print(*key, row["milliseconds"], flush=True)
                    continue
                shown = row.get("accuracy", row["loss"])
                few = [shown[n] for n in (1, 2, *quarters(row["layers"])) if n < len(shown)]
                print(*key, few, row["cpu_seconds"], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
