"""Which depths samples may leave at, and how sure a depth has to be: by learn-then-test."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import check_number
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control.batches import any_batches
from deeplimit.control.depth_table import depth_products
from deeplimit.control.early_exit import check_rows, confidences
from deeplimit.errors import InputError, several
from deeplimit.records import Record
from deeplimit.tables import percent, table

NEED = "exits are chosen on samples"
MOST = 4  # exits: each costs a run of the head on the samples that reach it
STEPS = 20  # of the sequence of thresholds, from no disagreement up to twice the risk


@dataclass(frozen=True)
class ExitChoice(Record):
    """Thresholds of early exits with a bounded risk; for `EarlyExit(model, choice.thresholds)`.

        >>> exit_depths(model, loader, risk=0.2, confidence=0.8).horizon
        4

    Attributes:
        horizon: N, the number of layers.
        thresholds: (depth, confidence from which a sample leaves there), in order; none where no
            exit could be shown to keep the risk.
        risk: the share of samples whose answer may be another than the whole network's.
        confidence: with this probability over the samples the risk is kept.
        samples: how many judged; as many others chose the exits and thresholds.
        disagreements: of these samples, how many were answered otherwise than by the network.
        shares: of these samples, the share that left at each exit, and at the end.
        mean_depth: the mean number of layers that they passed.
        work: multiply-adds per sample relative to the whole network, those of the exits included;
            layers, of a network without any.
        needed: how many samples in all could show the risk if none disagreed.
    """

    horizon: int
    thresholds: tuple[tuple[int, float], ...]
    risk: float
    confidence: float
    samples: int
    disagreements: int
    shares: tuple[float, ...]
    mean_depth: float
    work: float
    needed: int

    def __str__(self) -> str:
        """The exits in a table, and what they save."""
        if not self.thresholds:
            why = f"no exit keeps a risk of {percent(self.risk)} at {percent(self.confidence)}"
            few = f"; at least {self.needed:,} samples are needed, {2 * self.samples:,} were given"
            return why + (few if 2 * self.samples < self.needed else "")
        exits = [*self.thresholds, (self.horizon, None)]
        rows = [
            [f"{n} of {self.horizon}", "" if t is None else f"{t:.4f}", percent(share)]
            for (n, t), share in zip(exits, self.shares, strict=True)
        ]
        return "\n".join(
            [
                table(["depth", "confidence", "samples that leave"], rows),
                f"mean depth {self.mean_depth:.2f} of {self.horizon}, {percent(self.work)} of the "
                f"multiply-adds; {self.disagreements} of {several(self.samples, 'sample')} answered"
                f" otherwise than by the whole network: at most {percent(self.risk)} with "
                f"confidence {percent(self.confidence)}",
            ]
        )


@torch.no_grad()
def exit_depths(
    model: nn.Module | Anatomy,
    data: Iterable[Any],
    *,
    risk: float = 0.01,
    confidence: float = 0.95,
    exits: Sequence[int] | None = None,
) -> ExitChoice:
    """Chooses exits and thresholds so that P(argmax z_exit ≠ argmax z_N) ≤ risk.

    Half of the samples, drawn with a fixed seed, orders: depths are added as exits one by one while
    that lowers the expected multiply-adds, and for every λ of a rising sequence the thresholds are
    the lowest with which a share λ of these samples is answered otherwise. The other half judges,
    by fixed-sequence testing (learn-then-test, Angelopoulos et al., arXiv 2110.01052): from λ = 0
    up while P(Binomial(S, risk) ≤ disagreements) ≤ 1 − confidence. So the risk of the thresholds
    returned is at most `risk` with probability `confidence` over the samples, whatever the network,
    if later samples are drawn as these were. No target is used.

        >>> choice = exit_depths(model, loader, risk=0.2, confidence=0.8)
        >>> early = EarlyExit(model, choice.thresholds)

    Args:
        model: a classifier, as `anatomy` reads it; it runs in evaluation mode.
        data: batches (x, y) that were not trained on; y is not looked at.
        risk: in (0, 1).
        confidence: in (0, 1).
        exits: depths 0 … N − 1 that may be exits; by default up to four are chosen among all.

    Raises:
        InputError: no samples, a risk or confidence outside (0, 1), a depth that is none, or a
            model without a row of logits for each sample.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        check_number(name, value, "a fraction above 0 and below 1", lambda v: 0 < v < 1)
    structure = anatomy(model)
    horizon = structure.horizon
    if exits is not None and (
        wrong := [n for n in exits if isinstance(n, bool | float) or n not in range(horizon)]
    ):
        raise InputError(f"exits at {wrong} given; expected depths from 0 to {horizon - 1}")
    with evaluating(structure.model):
        answers = measured_answers(structure, data)
    return chosen_exits(answers, risk, confidence, exits)


def chosen_exits(
    answers: "Answers", risk: float, confidence: float, exits: Sequence[int] | None = None
) -> ExitChoice:
    """The exits and thresholds for samples whose answers at each depth are known."""
    drawn = torch.randperm(answers.count, generator=torch.Generator().manual_seed(0))
    ordering, judging = map(answers.rows, drawn.tensor_split(2))
    chosen = ordering.exits(risk / 2) if exits is None else sorted(set(exits))
    accepted: dict[int, float] = {}
    for step in range(STEPS + 1):
        thresholds = ordering.thresholds(chosen, 2 * risk * step / STEPS)
        if binomial_tail(judging.wrong(thresholds), judging.count, risk) > 1 - confidence:
            break
        accepted = thresholds
    left, horizon = judging.left_at(accepted), len(answers.costs) - 1
    return ExitChoice(
        horizon=horizon,
        thresholds=tuple(accepted.items()),
        risk=risk,
        confidence=confidence,
        samples=judging.count,
        disagreements=judging.wrong(accepted),
        shares=tuple(float((left == n).double().mean()) for n in (*accepted, horizon)),
        mean_depth=float(left.double().mean()),
        work=judging.work(accepted) / answers.costs[-1],
        needed=2 * math.ceil(math.log(1 - confidence) / math.log(1 - risk)),
    )


@dataclass(frozen=True)
class Answers:
    """What samples are answered at each depth.

    Attributes:
        sure: the confidences [S, N + 1].
        same: whether the answer is the network's own, [S, N + 1].
        costs: multiply-adds of a sample that stops at each depth, stem and head among them.
    """

    sure: Tensor
    same: Tensor
    costs: Sequence[int]

    @property
    def count(self) -> int:
        """S: the number of samples."""
        return len(self.sure)

    def rows(self, samples: Tensor) -> "Answers":
        """Those of some samples."""
        return Answers(self.sure[samples], self.same[samples], self.costs)

    def thresholds(self, exits: Sequence[int], level: float) -> dict[int, float]:
        """The lowest thresholds with which a share `level` is answered otherwise at most.

        Each exit may spend as much as the others, and what those before it left. An exit at which
        nobody may leave is left out.
        """
        found: dict[int, float] = {}
        gone = torch.zeros(self.count, dtype=torch.bool)
        spent = 0
        for i, n in enumerate(exits, 1):
            allowed = math.floor(level * self.count * i / len(exits) + 1e-9) - spent
            sure, order = self.sure[~gone, n].sort(descending=True)
            wrong = (~self.same[~gone, n][order]).cumsum(0)
            # Samples that are equally sure leave together.
            last = torch.ones_like(wrong, dtype=torch.bool)
            last[:-1] = sure[1:] < sure[:-1]
            fits = (last & (wrong <= allowed)).nonzero()
            if len(fits):
                end = int(fits[-1])
                found[n] = float(sure[end])
                spent += int(wrong[end])
                gone |= self.sure[:, n] >= found[n]
        return found

    def left_at(self, thresholds: Mapping[int, float]) -> Tensor:
        """The depth [S] at which each sample leaves."""
        left = torch.full((self.count,), self.sure.shape[1] - 1)
        for n, threshold in sorted(thresholds.items(), reverse=True):
            left[self.sure[:, n] >= threshold] = n
        return left

    def wrong(self, thresholds: Mapping[int, float]) -> int:
        """How many samples are answered there otherwise than by the whole network."""
        return int((~self.same.gather(1, self.left_at(thresholds)[:, None])).sum())

    def work(self, thresholds: Mapping[int, float]) -> float:
        """The mean multiply-adds of a sample, where stem and head run once for every exit met."""
        left, costs, total, before = self.left_at(thresholds), self.costs, 0.0, 0
        for n in (*sorted(thresholds), len(costs) - 1):
            still = float((left >= n).double().mean())
            total += still * (costs[0] + costs[n] - costs[before])
            before = n
        return total

    def exits(self, level: float) -> list[int]:
        """The depths that are worth an exit: one by one that which saves most."""
        chosen: list[int] = []
        least = float(self.costs[-1])
        while len(chosen) < MOST:
            rest = [n for n in range(len(self.costs) - 1) if n not in chosen]
            tried = {n: self.work(self.thresholds(sorted([*chosen, n]), level)) for n in rest}
            best = min(tried, key=tried.__getitem__, default=None)
            if best is None or tried[best] >= least:
                break
            least = tried[best]
            chosen.append(best)
        return sorted(chosen)


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) ≤ k)."""
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return math.fsum(map(math.exp, logs))


def measured_answers(structure: Anatomy, data: Iterable[Any]) -> Answers:
    """Runs a model once over samples, all depths of each."""
    sure, same = [], []
    costs: Sequence[int] = ()
    for x, _ in any_batches(structure, data, NEED):
        states, own = structure.states(x)
        check_rows(structure.model, own, len(states[0]))
        z = torch.cat([structure.logits(states[:-1], x=x), own[None]]) if states[1:] else own[None]
        answers = z.argmax(-1)
        sure.append(confidences(z).T.cpu())
        same.append((answers == answers[-1]).T.cpu())
        costs = costs or depth_products(structure, x)
    return Answers(torch.cat(sure), torch.cat(same), costs if costs[-1] else range(len(costs)))
