"""How many layers to cut, and which, of all stages: the most, or the best, under one budget."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import islice, product
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.by_branch import ByBranch, check_granularity
from deeplimit._anatomy.checks import check_number, layer_numbers
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control.cropping import Budget, CutChoice, check_profile
from deeplimit.control.losses import Loss, SampleLoss, sample_loss
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.control.trials import QUALITY, MayGo, Spending, Trials
from deeplimit.control.turnpike import TurnpikeProfile, loss_tolerance
from deeplimit.control.verdict import check_rise, check_tolerance
from deeplimit.errors import InputError

NAMES: tuple[Budget, ...] = get_args(Budget)


@torch.no_grad()
def choose_cut(
    model: nn.Module | Anatomy,
    profile: TurnpikeProfile,
    loader: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    accuracy: float | None = None,
    rise: float | None = None,
    blocks: int | None = None,
    multiply_adds: float | None = None,
    latency: float | None = None,
    protect: Iterable[SupportsIndex] = (),
    contiguous: bool = False,
    shift: bool = False,
    granularity: Literal["layer", "branch"] = "layer",
    confidence: float | None = None,
) -> CutChoice:
    """Chooses which layers to remove, of any stage, under one budget.

    Layers are put in order of what is lost without them, and the first so many go. The orders:
    block influence of the profile, least first; the last layer first; where the profile shows a
    leaving arc, from the exit back; and, with a loader, by trial (`Trials.order`). With a loader
    the best of them is taken: under `accuracy` or `rise` the one that removes most, else the one
    with the highest accuracy, or the least loss; the smaller divergence among equals. Without one,
    only `blocks` can be the budget, and the last layers go where the profile says that nothing is
    lost by that, else those of least influence.

        >>> profile = turnpike_profile(model, loader, SoftCrossEntropy(4))
        >>> smaller = crop(model, choose_cut(model, profile, loader, blocks=2))
        >>> anatomy(smaller).horizon
        2

    Args:
        model: the network; it is left as it was.
        profile: `turnpike_profile` of it.
        loader: batches (x, y) that did not train it, unshuffled; gone through once for each cut
            tried. Of an order the number that goes is found by bisection, for trials one by one.
            The first batch, or half of the samples if that is less, puts the layers in order; the
            others judge the cuts.
        loss: that of the profile, where it is another than the soft cross-entropy, which the
            profile tells.
        accuracy: the fraction of accuracy that may be lost on the loader: most layers go. The rule
            is that of `TurnpikeProfile.depth_within`, on accuracy and loss; that many cuts are
            tried is corrected for (Bonferroni): z is the quantile of 1 − 0.05/m for m cuts. Where
            fewer than 11 samples judge (`verdict.FEW`) no layer goes: their standard errors, 0 of
            one, mean nothing.
        rise: by how much the mean loss may rise, in its units: the same rule on the loss alone, and
            the budget of quality where the loss knows no classes.
        blocks: how many layers are kept.
        multiply_adds: the fraction of the multiply-adds that is kept at most: fewest layers go.
        latency: the fraction of the latency of the first batch, likewise.
        protect: layers that stay, counted from the end where negative: [0, -1].
        contiguous: whether the layers that go follow one another.
        shift: targets of tokens are the inputs themselves: each predicts the next.
        granularity: "branch" removes the attention or the MLP of a block alone, as `crop` does; the
            profile orders the blocks, and `blocks` counts branches.
        confidence: with this probability over the samples the cut loses no more than `accuracy`, or
            `rise`, allows on later samples drawn as these were, whatever the network. By
            fixed-sequence testing: layers go in one order that the judging samples took no part in
            (of one stage the last first, so that all samples judge; else by trial), each cut is
            tested at level 1 − confidence against the full network, and the first that fails ends
            it, so that no correction is due. Tests: `verdict.excludes` of the accuracy, whose exact
            level is kept, and `verdict.most_risen` of the loss, right to O(1/S) for S samples. Both
            have to pass. The choice says in `needed` where so few samples can tell nothing: half a
            point takes 623 at 95 %, where no answer changes.

    Raises:
        InputError: a layer to be protected that is not there; no budget or several, one out of
            range, or one that cannot be met by removing layers; a profile of another network, or a
            loader that is missing or does not fit; a confidence outside (0.5, 1), without a limit
            of quality, or of tokens, which are no independent samples.
    """
    given = (accuracy, rise, blocks, multiply_adds, latency)
    check_granularity(granularity)
    structure = anatomy(model)
    check_profile(profile, structure.horizon)
    orders, protected = _orders(structure, profile), _protected(structure.horizon, protect)
    if granularity == "branch":
        structure = ByBranch(structure)
        of = [n for n, _ in structure.pairs]
        orders = {
            k: [i for n in own for i, at in enumerate(of) if at == n] for k, own in orders.items()
        }
        protected = {i for i, n in enumerate(of) if n in protected}
    budget, limit = _budget(
        dict(zip(NAMES, given, strict=True)), structure.horizon, data=loader is not None
    )
    most = limit if budget == "rise" else loss_tolerance(limit) * profile.loss_range
    ordering = True
    if confidence is not None:
        check_confidence(confidence, budget)
        # The profile may be of these very samples: what it says of the layers orders nothing.
        orders = {"tail": [*reversed(range(structure.horizon))]}
        ordering = structure.stages > 1 or structure.tokens
    ranked = next(iter(orders.values()))
    with evaluating(structure.model):
        trials = None
        if loader is not None:
            measure = _loss_of(profile, loss, budget)
            if confidence is not None and measure.of_classes and structure.tokens:
                raise InputError(
                    "a confidence is asked for, and tokens of one text are no independent samples; "
                    "give a loss with a value for each text, and rise=…, or leave confidence out"
                )
            trials = Trials(structure, loader, measure, shift=shift, ordering=ordering)
        tried = 0 if confidence is not None else len(orders)
        spending = Spending(structure, trials, budget, limit, most, tried, confidence)
        cuts = _cuts(structure, orders, spending, protected, trials, contiguous=contiguous)
        if not cuts:
            raise InputError(spending.unmet())
        choice = spending.choice(*_best(cuts, profile, trials, ranked, quality=spending.quality))
    if isinstance(structure, ByBranch):
        whole = tuple(structure.whole(choice.removed))
        pairs = tuple(structure.pairs[i] for i in choice.removed)
        choice = replace(choice, removed=whole, branches=pairs)
    return choice


def _orders(structure: Anatomy, profile: TurnpikeProfile) -> dict[str, list[int]]:
    """All layers in the orders that a profile gives; its score of each layer comes first."""
    every = range(structure.horizon)
    named = "update" if profile.influence is None else "influence"
    score = profile.relative_update if profile.influence is None else profile.influence
    # NaN: no sample tells what the layer does, so it goes last.
    ranked = sorted(every, key=lambda n: (math.isnan(score[n]), score[n], -n))
    orders = {named: ranked, "tail": list(reversed(every))}
    last = profile.exit()
    if last is not None and last < profile.horizon:
        orders["turnpike"] = [*reversed(every[:last]), *reversed(every[last:])]
    # What moved no sample at all, as a layer that has vanished, goes for nothing.
    still = [n for n in every if profile.relative_update[n : n + 1] == (0,)]
    return {k: [*still, *(n for n in own if n not in still)] for k, own in orders.items()}


def _protected(horizon: int, protect: Iterable[SupportsIndex]) -> set[int]:
    """The layers that stay, each counted from the front."""
    layers = layer_numbers(protect)
    for n in layers:
        if not -horizon <= n < horizon:
            raise InputError(
                f"layer {n} to be protected; the model has layers 0 … {horizon - 1}, or "
                f"-{horizon} … -1"
            )
    return {n % horizon for n in layers}


def _cuts(
    structure: Anatomy,
    orders: dict[str, list[int]],
    spending: Spending,
    protected: set[int],
    trials: Trials | None,
    *,
    contiguous: bool,
) -> list[tuple[str, tuple[int, ...]]]:
    """The cuts that meet the budget, with their scores: of each order, and by trial."""

    def may_go(gone: Collection[int], n: int) -> bool:
        beside = not (contiguous and gone) or n in (min(gone) - 1, max(gone) + 1)
        return n not in protected and beside

    cuts: list[tuple[str, tuple[int, ...]]] = []
    bisected = orders if spending.confidence is None else {}
    runs = _runs(structure, may_go) if contiguous else [range(structure.horizon)]
    for (score, order), run in product(bisected.items(), runs):
        possible = _possible(structure, [n for n in order if n in run], may_go)
        removed = spending.bisected(list(islice(possible, spending.most)))
        if removed is not None:
            cuts.append((score, removed))
    if trials is not None:
        least = min((len(cut) for _, cut in cuts), default=0)
        ranked = next(iter(orders.values()))
        named = ("trial", trials.order(ranked, may_go))
        if not trials.ordering:
            named = ("tail", _possible(structure, ranked, may_go))
        removed = spending.one_by_one(named[1], least)
        if removed is not None:
            cuts.append((named[0], removed))
    return cuts


def _runs(structure: Anatomy, may_go: MayGo) -> list[range]:
    """The runs of layers, one after the other, that may go and can."""
    runs: list[range] = []
    for n, layer in enumerate(structure.layers):
        if layer.removable and may_go((), n):
            first = runs.pop().start if runs and runs[-1].stop == n else n
            runs.append(range(first, n + 1))
    return runs


def _possible(structure: Anatomy, order: Iterable[int], may_go: MayGo) -> Iterator[int]:
    """The layers of an order that the model can do without beside those before them."""
    gone: list[int] = []
    left = list(order)
    while (n := next((n for n in left if may_go(gone, n)), None)) is not None:
        left.remove(n)
        try:
            structure.check_removable([*gone, n])
        except InputError:
            continue
        gone.append(n)
        yield n


def _best(
    cuts: list[tuple[str, tuple[int, ...]]],
    profile: TurnpikeProfile,
    trials: Trials | None,
    ranked: list[int],
    *,
    quality: bool,
) -> tuple[str, tuple[int, ...]]:
    """The cut to be taken, with its score; among equals the first."""
    if trials is None:
        for score, cut in cuts:
            depth = profile.horizon - len(cut)
            at_the_end = score == "tail" and min(cut, default=depth) == depth
            if at_the_end and profile.depth_within() <= depth:
                return score, cut
        return min(cuts, key=lambda named: sum(map(ranked.index, named[1])))

    def worth(named: tuple[str, tuple[int, ...]]) -> tuple[float, float, float]:
        change = trials.change(named[1])
        good = change.accuracy_after if change.has_accuracy else -change.loss_after
        many = float(len(named[1])) if quality else 0.0
        return many, good, -trials.divergence(named[1])

    return max(cuts, key=worth)


def _loss_of(profile: TurnpikeProfile, loss: Loss | None, budget: Budget) -> SampleLoss:
    """The loss that was given, or that the profile tells where it counts."""
    if loss is None and not profile.classes:
        raise InputError(
            "the profile is of a loss that knows no classes, and which it is it does not tell; "
            "give it: loss=…"
        )
    if loss is None and budget in QUALITY and profile.softness > 0:
        loss = SoftCrossEntropy(profile.classes, profile.softness)
    of = sample_loss(loss)
    if budget == "accuracy" and not of.of_classes:
        raise InputError(
            "a loss of accuracy is allowed, and the loss knows no classes; give rise=…, by how "
            "much the loss may rise"
        )
    return of


def check_confidence(confidence: float, budget: Budget) -> None:
    """Raises InputError for a confidence that is none, or of a budget that samples cannot keep."""
    expected = "a fraction above 0.5 and below 1, such as 0.95"
    check_number("confidence", confidence, expected, lambda c: 0.5 < c < 1)
    if budget not in QUALITY:
        raise InputError(
            f"a confidence is asked for, and {budget} is given, which no sample judges; give "
            "accuracy or rise, or leave confidence out"
        )


def _budget(
    given: dict[Budget, int | float | None], horizon: int, *, data: bool
) -> tuple[Budget, float]:
    """The one budget that is given, in its range, with the data that it takes."""
    named = [(name, value) for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(name for name, _ in named) or "none"
        raise InputError(
            f"a cut is chosen under one budget: {', '.join(NAMES[:-1])} or {NAMES[-1]}; "
            f"{found} given"
        )
    budget, value = named[0]
    limit = check_number(budget, value, "a number", lambda _: True)
    if budget == "blocks":
        if not (1 <= limit <= horizon and limit.is_integer()):
            raise InputError(
                f"{limit:g} blocks are to be kept; the model has {horizon}: 1 … {horizon}"
            )
    elif budget in QUALITY:
        (check_tolerance if budget == "accuracy" else check_rise)(limit)
    elif not 0 < limit <= 1:
        raise InputError(
            f"a fraction of {limit:g} of the {budget.replace('_', '-')} is to be kept; expected "
            "one above 0 up to 1"
        )
    if budget != "blocks" and not data:
        raise InputError(
            f"the budget {budget} is measured on data; give a loader of data that did not train "
            "the model"
        )
    return budget, limit
