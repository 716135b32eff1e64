"""Networks whose true accuracy without any layers is known, and validation samples of them.

A sample's margin is m + Σ_{k removed} (a_k ξ_k − b_k), with m ~ N(μ, 1) and ξ_k ~ N(0, 1) of its
own. It is right where that is positive: the accuracy is Φ((μ − Σb)/√(1 + Σa²)). The loss is
log(1 + exp(−2·margin)). Only what is measured is simulated: the functions of `control` choose.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from profiles import profile
from torch import Tensor

from deeplimit.control.choosing import _best, _cuts
from deeplimit.control.trials import MayGo, Spending, Trials
from deeplimit.control.turnpike import TurnpikeProfile, loss_tolerance
from deeplimit.control.verdict import mean_and_error
from deeplimit.control.verifying import Change
from deeplimit.network import Architecture, anatomy

NORMAL = NormalDist()
LAYERS = 16
ORDERING = 256  # samples at most, as of a run
STRUCTURE = anatomy(Architecture("vector", (2,), 2, (LAYERS,), width=2, hidden=2).build())


@dataclass(frozen=True)
class Simulated:
    """A network of so many stages, with the accuracy μ tells and the layers' spreads and shifts."""

    right: float
    spread: tuple[float, ...]  # a
    shift: tuple[float, ...]  # b
    stages: int = 1

    def lost(self, removed: Collection[int]) -> float:
        """The accuracy that is truly lost without these layers."""
        shift = sum(self.shift[k] for k in removed)
        spread = math.sqrt(1 + sum(self.spread[k] ** 2 for k in removed))
        return self.right - NORMAL.cdf((NORMAL.inv_cdf(self.right) - shift) / spread)


def losing(right: float, lost: Sequence[float], spread: float, stages: int = 1) -> Simulated:
    """A network of which layer k alone loses lost[k], and changes margins by `spread` besides."""
    shifts = [
        NORMAL.inv_cdf(right) - math.sqrt(1 + spread**2) * NORMAL.inv_cdf(right - one)
        if one
        else 0.0
        for one in lost
    ]
    spreads = tuple(spread if one else 0.0 for one in lost)
    return Simulated(right, spreads, tuple(shifts), stages)


def networks(tolerance: float, stages: int) -> dict[str, Simulated]:
    """One that loses just more than the tolerance without one layer, two that lose by and by."""
    half = LAYERS // 2
    cliff = [0.0] * (half - 1) + [1.05 * tolerance] + [0.0] * half
    return {
        "a layer that counts": losing(0.97, cliff, 0.05, stages),
        "each a little": losing(0.97, [0.15 * tolerance] * LAYERS, 0.02, stages),
        "many answers change": losing(0.95, [0.15 * tolerance] * LAYERS, 0.15, stages),
    }


class Draw(Trials):
    """Samples of a network, as `Trials` measures them; of several stages some order, not judge."""

    def __init__(self, network: Simulated, samples: int, seed: int):
        draws = torch.Generator().manual_seed(seed)
        self._margin = torch.randn(samples, generator=draws) + NORMAL.inv_cdf(network.right)
        spread = torch.tensor(network.spread)[:, None]
        moved = spread * torch.randn(LAYERS, samples, generator=draws)
        self._moved = moved - torch.tensor(network.shift)[:, None]
        self.network, self.ordering = network, network.stages > 1
        self._first = min(ORDERING, samples // 2) if self.ordering else 0
        self.samples = samples - self._first
        self._own = self._figures(())

    def _figures(self, removed: Iterable[int]) -> dict[str, Tensor]:
        moved = self._moved[list(removed), self._first :].sum(0)
        margin = (self._margin[self._first :] + moved).double()
        loss = torch.nn.functional.softplus(-2 * margin)
        return {"loss": loss, "right": (margin > 0).double()}

    def change(self, removed: Collection[int]) -> Change:
        return Change.of(self._own, self._figures(removed))

    def divergence(self, removed: Collection[int]) -> float:
        first = self._first or len(self._margin)
        return float(self._moved[list(removed), :first].sum(0).square().mean())

    def order(self, ranked: Iterable[int], may_go: MayGo | None = None) -> Iterator[int]:
        moved, left = self._moved[:, : self._first or None], list(ranked)
        gone = torch.zeros(moved.shape[1])
        while left:  # the one with which the divergence is least
            best = left.pop(int((gone + moved[left]).square().mean(1).argmin()))
            gone = gone + moved[best]
            yield best

    def profile(self) -> TurnpikeProfile:
        """That of all samples, from the first layer's state on."""
        depths = [self._figures(range(n, LAYERS)) for n in range(LAYERS + 1)]
        gaps = {
            name: tuple(mean_and_error(one[name] - depths[-1][name])[1] for one in depths)
            for name in ("loss", "right")
        }
        losses, accuracies = (
            tuple(float(one[name].mean()) for one in depths) for name in ("loss", "right")
        )
        return TurnpikeProfile(
            samples=self.samples,
            classes=2,
            softness=0.0,
            minimum=0.0,
            loss=losses,
            accuracy=accuracies,
            distance=(),
            class_distance=(),
            relative_update=(0.0,) * LAYERS,
            loss_error=gaps["loss"],
            accuracy_error=gaps["right"],
        )


def removed(draw: Draw, tolerance: float, confidence: float | None, *, loss: bool) -> set[int]:
    """The layers that the rule takes out, with its condition on the loss or without."""
    network = draw.network
    rise = loss_tolerance(tolerance) * math.log(2) if loss else math.inf
    if confidence is None and not draw.ordering:
        return set(range(draw.profile().depth_within(tolerance, rise=min(rise, 1e9)), LAYERS))
    orders = {"tail": list(reversed(range(LAYERS)))}
    if confidence is None:
        sizes = torch.tensor(network.spread) + torch.tensor(network.shift)
        orders = {"influence": sizes.argsort().tolist()} | orders
    tried = len(orders) if confidence is None else 0
    spending = Spending(STRUCTURE, draw, "accuracy", tolerance, rise, tried, confidence)
    cuts = _cuts(STRUCTURE, orders, spending, set(), draw, contiguous=False)
    ranked = next(iter(orders.values()))
    return set(_best(cuts, profile([0.0] * (LAYERS + 1)), draw, ranked, quality=True)[1])
