"""Every depth of one network: what it answers there, and what that costs."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.evaluation import begun, device_of, evaluating
from deeplimit._anatomy.inputs import batch_of
from deeplimit.control.batches import any_batches, first_part
from deeplimit.control.early_exit import at_depth
from deeplimit.control.losses import Loss
from deeplimit.control.turnpike import TurnpikeProfile, turnpike_profile
from deeplimit.control.verifying import (
    LATENCY_ROUNDS,
    LATENCY_SECONDS,
    counting,
    latencies,
    multiply_adds,
)
from deeplimit.errors import InputError, several
from deeplimit.extras import need
from deeplimit.records import Record
from deeplimit.tables import decimals, numbers, shown_depths, table

Cost = TypeVar("Cost", int, float)
RECOMMENDED = "recommended"


@dataclass(frozen=True)
class DepthCosts(Record):
    """What a network costs that ends after n layers, n = 0 … N: what stands before them, and head.

        >>> costs = every_depth(model, loader, SoftCrossEntropy(4)).costs
        >>> costs.multiply_adds[-1] > costs.multiply_adds[0]
        True

    Attributes:
        parameters: numbers of parameters without those of the layers behind n that can be removed.
        multiply_adds: for one sample.
        latency: seconds of a forward pass of `latency_batch` samples. Measured are the whole
            network, the median of 7 rounds of 20 ms at least, of several stages one depth of each
            too; and in as many passes more each layer's share, its median.
        latency_batch: samples in a timed batch.
        device: where the latency was measured, as torch names it.
        least: the fewest first layers that `crop` keeps. At a smaller depth the network can be
            stopped (`at_depth`), but its layers from there on cannot all be removed.
    """

    parameters: tuple[int, ...]
    multiply_adds: tuple[int, ...]
    latency: tuple[float, ...]
    latency_batch: int
    device: str
    least: int


@dataclass(frozen=True)
class DepthTable(TurnpikeProfile):
    """A profile with what each depth costs: all that is to be known to choose one.

    z_n is what `crop(model, n)` answers, and the model in `with at_depth(model, n)`.

        >>> depths = every_depth(model, loader, SoftCrossEntropy(4))
        >>> DepthTable.from_json(depths.to_json()) == depths
        True

    Attributes:
        costs: of each depth; None in a file written before they were there.
        recommended: the depth that was chosen on other data; None: on these.
    """

    costs: DepthCosts | None = None
    recommended: int | None = None

    def __post_init__(self) -> None:
        """Checks lengths and depth, which a file that was changed by hand may not have."""
        super().__post_init__()
        check_depth(self.recommended, self.horizon)
        for name in ("parameters", "multiply_adds", "latency"):
            found = self.horizon + 1 if self.costs is None else len(getattr(self.costs, name))
            if found != self.horizon + 1:
                raise InputError(
                    f"{name} has {found} values; expected {self.horizon + 1}, as loss has: measure "
                    "the profile again"
                )

    @property
    def recommended_depth(self) -> int:
        """The depth chosen on other data where there is one, else `depth_within` the defaults.

        It is no less than what `crop` leaves at least.
        """
        depth = super().recommended_depth if self.recommended is None else self.recommended
        return max(depth, 0 if self.costs is None else self.costs.least)

    def cells(self, *, perplexity: bool = False) -> tuple[list[str], list[list[str]]]:
        """Headings, and a row of text for each depth 0 … N."""
        columns = [("depth", list(map(str, range(self.horizon + 1))))]
        if self.accuracy:
            digits = decimals(self.samples)
            errors = [f"{100 * e:.{digits}f}" for e in self.accuracy_error[:-1]]
            columns += [
                ("accuracy", [f"{100 * a:.{digits}f} %" for a in self.accuracy]),
                ("±", [*errors, ""]),
            ]
        elif perplexity:
            columns += [("perplexity", numbers([math.exp(min(v, 700)) for v in self.loss], 3))]
        losses = numbers((*self.loss, *self.loss_error[:-1]), like=self.loss)
        columns += [
            ("loss", losses[: self.horizon + 1]),
            ("±", [*losses[self.horizon + 1 :], ""]),
        ]
        if (costs := self.costs) is not None:
            columns += [
                ("parameters", [f"{n:,}" for n in costs.parameters]),
                ("multiply-adds", [f"{n:,}" for n in costs.multiply_adds]),
                ("latency, ms", numbers([1000 * t for t in costs.latency], 2)),
            ]
        headings, values = zip(*columns, strict=True)
        return list(headings), [list(row) for row in zip(*values, strict=True)]

    def marks(self, cut: int | None = None) -> dict[int, str]:
        """Names the recommended depth, that of a cut, and those that `crop` cannot cut to."""
        least = 0 if self.costs is None else self.costs.least
        found = dict.fromkeys(range(least), "no cut")
        return found | ({} if cut is None else {cut: "cut"}) | {self.recommended_depth: RECOMMENDED}

    def note(self) -> str:
        """Says what is in the columns."""
        told = [
            f"±: one standard error of the difference from depth {self.horizon}, paired by sample"
        ]
        if (costs := self.costs) is not None:
            told.append(
                f"latency of {several(costs.latency_batch, 'sample')} on {costs.device}, median of "
                f"{LATENCY_ROUNDS}"
            )
            if costs.least:
                told.append(f"crop keeps {several(costs.least, 'layer')} at least")
        return "; ".join(told)

    def lines(self, cut: int | None = None, *, perplexity: bool = False) -> list[str]:
        """Headings and a row per depth, of many layers some; the depths of `marks` are named."""
        headings, rows = self.cells(perplexity=perplexity)
        marks = self.marks(cut)
        named = [n for n, mark in marks.items() if mark != "no cut"]
        shown = [
            [f"{rows[n][0]} {marks.get(n, '')}", *rows[n][1:]]
            for n in shown_depths(self.horizon, *named)
        ]
        return table(headings, shown, len(shown) + 1).split("\n")

    def __str__(self) -> str:
        """The depths, the recommended one named, and how to take one."""
        depth = self.recommended_depth
        head = (
            f"{several(self.samples, 'sample')}; depth {depth} of {self.horizon} is as good as all"
        )
        take = f"to take a depth: crop(model, {depth}), or with at_depth(model, {depth}): …"
        return "\n".join([head, *self.lines(), self.note(), take])

    def plot(self) -> Any:
        """A plotly figure: accuracy in percent, or the loss, of each depth against multiply-adds.

        Raises:
            InputError: plotly is not installed.
        """
        graphs = need("plotly.graph_objects", "cli")
        depths, scale = range(self.horizon + 1), 100 if self.accuracy else 1
        work = (self.costs.multiply_adds if self.costs else None) or depths
        trace = graphs.Scatter(
            x=list(work if work[-1] else depths),
            y=[scale * v for v in self.accuracy or self.loss],
            error_y={"array": [scale * v for v in self.accuracy_error or self.loss_error]},
            text=[f"depth {n}" for n in depths],
            mode="lines+markers",
            hovertemplate="%{text}: %{y:.4g}",
            name="accuracy, percent" if self.accuracy else "loss",
        )
        return graphs.Figure(trace)


@torch.no_grad()
def every_depth(
    model: nn.Module | Anatomy,
    data: Iterable[Any],
    loss: Loss,
    *,
    recommended: int | None = None,
    shift: bool = False,
) -> DepthTable:
    """Measures a network at every depth: accuracy and loss, parameters, work and time.

    One pass over the data, as `turnpike_profile`; what the depths cost is measured on the first
    batch: the cost up to each state, by one run that is watched, and what stands behind it, which
    is the same for all states of a stage.

        >>> depths = every_depth(model, loader, SoftCrossEntropy(4))
        >>> smaller = crop(model, depths.recommended_depth)
        >>> len(depths.accuracy) == len(depths.costs.latency) == depths.horizon + 1
        True

    Args:
        model: the network, as `anatomy` reads it; it runs in evaluation mode.
        data: batches (x, y), such as test data.
        loss: the loss that was trained, as of `turnpike_profile`.
        recommended: the depth that other data recommend, such as validation data's
            `TurnpikeProfile.depth_within`; by default these data do, which flatters it.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Raises:
        InputError: a depth that is none; else as `turnpike_profile`.
    """
    structure: Anatomy = anatomy(model)
    check_depth(recommended, structure.horizon)
    given: list[Any] = []

    def noted(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            if not given:
                given.extend(any_batches(structure, [batch]))

    profile = turnpike_profile(structure, noted(begun(data)), loss, shift=shift)
    with evaluating(structure.model):
        costs = depth_costs(structure, given[0][0])
    return DepthTable(**vars(profile), costs=costs, recommended=recommended)


def check_depth(recommended: int | None, horizon: int) -> None:
    """Raises InputError where a depth is recommended that is none."""
    if recommended is not None and recommended not in range(horizon + 1):
        raise InputError(
            f"depth {recommended} recommended; expected a whole number from 0 to {horizon}"
        )


def depth_costs(structure: Anatomy, x: Any) -> DepthCosts:
    """What a model in evaluation mode costs at each depth, for a batch of inputs."""
    return DepthCosts(
        parameters=_parameters(structure),
        multiply_adds=depth_products(structure, x),
        latency=_latency(structure, x),
        latency_batch=batch_of(x),
        device=str(device_of(structure.model)),
        least=least_depth(structure),
    )


def depth_products(structure: Anatomy, x: Any) -> tuple[int, ...]:
    """The multiply-adds for one sample of a pass that ends after n layers, n = 0 … N."""
    one = first_part(structure, x, 1)
    with counting() as products:
        spent = _watched(structure, one, products)[1:]
    every = _at_each(structure, lambda: multiply_adds(structure, one), spent)
    return tuple(count // batch_of(one) for count in every)


def least_depth(structure: Anatomy) -> int:
    """The number of first layers that have to stay when all behind them go."""
    layers = structure.horizon
    return next((k for k in range(layers) if removable(structure, range(k, layers))), layers)


def removable(structure: Anatomy, layers: Collection[int]) -> bool:
    """Says whether the model can do without these layers."""
    try:
        structure.check_removable(layers)
    except InputError:
        return False
    return True


def _parameters(structure: Anatomy) -> tuple[int, ...]:
    """Numbers of parameters: of what is no layer, and of the layers up to each depth.

    A step takes its last block away with it, the only one that no step before it has.
    """
    needed_from: dict[nn.Parameter, int] = {}
    last = {layer.controls[-1]: n for n, layer in reversed([*enumerate(structure.layers)])}

    def hold(module: nn.Module, depth: int) -> None:
        for child in module.children():
            n = last.get(child, -1)
            hold(child, n + 1 if n >= 0 and structure.layers[n].removable else depth)
        for p in module.parameters(recurse=False):
            needed_from[p] = min(depth, needed_from.get(p, depth))

    hold(structure.model, 0)
    new = [0] * (structure.horizon + 1)
    for p, depth in needed_from.items():
        new[depth] += p.numel()
    return tuple(accumulate(new))


def _latency(structure: Anatomy, x: Any) -> tuple[float, ...]:
    """Seconds of a forward pass that ends after n layers, n = 0 … N.

    A pass is watched state by state; its layers' times are scaled to one that is not.
    """
    device = device_of(structure.model)

    def now() -> float:
        if device.type != "cpu":  # Python is further on than the device
            torch.accelerator.synchronize(device)
        return perf_counter()

    def direct() -> float:
        return latencies([structure.run], x)[0]

    whole, passes = direct(), []
    for _ in range(LATENCY_ROUNDS * max(math.ceil(LATENCY_SECONDS / max(whole, 1e-6)), 1)):
        moments = _watched(structure, x, now)
        passes.append([end - start for start, end in pairwise(moments)])
    # Of each layer by itself: what interrupts a pass falls on a few of them.
    spent = list(accumulate(median(of_one) for of_one in zip(*passes, strict=True)))
    return tuple(_at_each(structure, direct, [whole * t / spent[-1] for t in spent]))


def _watched(structure: Anatomy, x: Any, read: Callable[[], Cost]) -> list[Cost]:
    """What `read` says at the start of a forward pass, at each state, and at the end."""
    seen: list[Cost] = []
    with structure.hooked(lambda _, __: seen.append(read())):
        seen.append(read())
        structure.run(x)
        seen.append(read())
    return seen


def _at_each(structure: Anatomy, direct: Callable[[], Cost], spent: Sequence[Cost]) -> list[Cost]:
    """A cost of each depth, from what is `spent` up to each state, and in all.

    Behind the states of a stage stands the same. Of the last stage it is what is spent behind its
    last state; of each other one it is measured `direct` at one depth, and is no less.
    """
    *reached, total = spent
    stages = structure.state_stages
    behind = {stages[-1]: total - reached[-1]}
    for n, stage in enumerate(stages):
        if stage not in behind:
            with at_depth(structure, n):
                behind[stage] = max(direct() - reached[n], behind[stages[-1]])
    return [t + behind[stage] for stage, t in zip(stages, reached, strict=True)]
