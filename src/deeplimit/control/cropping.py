"""Cutting the layers that do nothing, at once or by and by."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy, check_rebuilt
from deeplimit._anatomy.by_branch import ByBranch, check_granularity
from deeplimit._anatomy.checks import check_count, check_number, layer_numbers, shown
from deeplimit._anatomy.stand_ins import ForwardStandIn, state_among, state_of, with_state
from deeplimit.control.bridge import bridge as build_bridge
from deeplimit.control.turnpike import ACCURACY_TOLERANCE, TurnpikeProfile
from deeplimit.control.verdict import CONFIDENCE, FEW, samples_needed
from deeplimit.errors import InputError, several
from deeplimit.records import Record

Budget = Literal["accuracy", "rise", "blocks", "multiply_adds", "latency"]
Score = Literal["influence", "update", "tail", "turnpike", "trial"]


@dataclass(frozen=True)
class CutChoice(Record):
    """The layers to be removed under a budget; `crop(model, choice)` removes them.

        >>> profile = turnpike_profile(model, loader, SoftCrossEntropy(4))
        >>> choice = choose_cut(model, profile, blocks=2)
        >>> choice.limit, sum(choice.layers_after)
        (2.0, 2)

    Figures that take data are None where none were given, and the latencies where latency was not
    the budget. Those of accuracy are of the data that the choice was made on: they flatter it, so
    report a cut on other data (`verify_crop`).

    Attributes:
        removed: the layers that go whole, in order of the network.
        score: what put them into that order: "influence" (block influence of the profile),
            "update" (relative update, where an older profile has no influence), "tail" (the last
            first), "turnpike" (from the exit of the tube back), "trial" (each removed by trial).
        budget: what was limited.
        limit: the accuracy that might be lost, by how much the loss might rise, the number of
            layers kept, or the fraction of the multiply-adds or of the latency kept.
        layers_before, layers_after: layers of each stage of the anatomy, counted by the state that
            enters them.
        samples: number of samples that the accuracies are of: those that put no layer in order.
        accuracy_before, accuracy_after: fractions in [0, 1]; None where the loss knows no classes.
        accuracy_error: standard error of accuracy_after − accuracy_before, paired by sample.
        multiply_adds_before, multiply_adds_after: for one sample.
        latency_before, latency_after: median seconds of a forward pass of the first batch, the two
            networks timed in turns.
        loss_before, loss_after: mean losses on these samples, where the loss was limited or knows
            no classes.
        loss_error: standard error of loss_after − loss_before, paired by sample.
        branches: where branches were chosen, the pairs (layer, branch) that go; `layers_before` and
            `layers_after`, and a limit in blocks, count branches then.
        confidence: with which the limit is kept on later samples, where that was asked for.
    """

    removed: tuple[int, ...]
    score: Score
    budget: Budget
    limit: float
    layers_before: tuple[int, ...]
    layers_after: tuple[int, ...]
    samples: int | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_error: float | None = None
    multiply_adds_before: int | None = None
    multiply_adds_after: int | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    loss_error: float | None = None
    branches: tuple[tuple[int, str], ...] | None = None
    confidence: float | None = None

    @property
    def needed(self) -> int | None:
        """Samples without which the accuracy that may be lost cannot be told.

        None where there are so many, and for another budget.
        """
        if self.budget != "accuracy":
            return None
        return samples_needed(self.limit, self.samples or 0, self.confidence)

    def __str__(self) -> str:
        """A line: the layers kept of each stage, and what that costs."""
        if not (self.removed or self.branches):
            return "; ".join(["no layer is removed: the network stays the same", *self._judged()])
        stages = zip(self.layers_after, self.layers_before, strict=True)
        kept = ", ".join(f"{after} of {before}" for after, before in stages)
        of = "layers" if self.branches is None else "branches"
        parts = [f"{of} kept per stage: {kept} (by {self.score})", *self._judged()]
        if self.multiply_adds_before is not None:
            parts.append(
                f"multiply-adds {self.multiply_adds_before:,} → {self.multiply_adds_after:,}"
            )
        if self.latency_before is not None and self.latency_after is not None:
            before, after = 1000 * self.latency_before, 1000 * self.latency_after
            parts.append(f"latency {before:.3g} → {after:.3g} ms")
        return "; ".join(parts)

    def _judged(self) -> list[str]:
        """The accuracies, or losses, and how many samples could tell of what was asked."""
        name, scale, form = "accuracy", 100, ".2f"
        figures = (self.accuracy_before, self.accuracy_after)
        if None in figures:
            name, scale, form = "loss", 1, ".4g"
            figures = (self.loss_before, self.loss_after)
        if self.samples is None or None in figures:
            return []
        shown = [f"{scale * cast(float, value):{form}}" for value in figures]
        shown = shown if self.removed or self.branches else shown[:1]
        unit, on = " %" if scale == 100 else "", several(self.samples, "sample")
        parts = [f"{name} {' → '.join(shown)}{unit} of {on}"]
        sure = f"{100 * (self.confidence or CONFIDENCE):g} %"
        if self.confidence is not None:
            parts.append(f"the limit is kept with confidence {sure}")
        if self.needed is not None:
            parts.append(
                f"so few cannot exclude a loss of {several(100 * self.limit, 'point')} at {sure}, "
                f"{self.needed:,} could"
            )
        return parts


def layers_to_remove(profile: TurnpikeProfile, accuracy: float = ACCURACY_TOLERANCE) -> range:
    """The layers that a profile says can go.

    The tail from `profile.depth_within(accuracy)` on. If no depth but the full one will do because
    the states leave the tube again at the end (a leaving arc, exit < N), the layers from entry to
    exit: n_in … n_out − 1. A profile of fewer than 11 samples says nothing: no layer.

        >>> profile = turnpike_profile(model, loader, SoftCrossEntropy(4))
        >>> layers_to_remove(profile, accuracy=0.01).stop <= profile.horizon
        True

    Raises:
        InputError: the accuracy that may be lost is no fraction.
    """
    depth, horizon = profile.depth_within(accuracy), profile.horizon
    if profile.samples < FEW:
        return range(horizon, horizon)
    entry, last = profile.entry(), profile.exit()
    if depth == horizon and entry is not None and last is not None and last < horizon:
        return range(entry, last)
    return range(depth, horizon)


def check_profile(profile: object, horizon: int) -> None:
    """Raises InputError if it is no profile of a network with so many layers."""
    if not isinstance(profile, TurnpikeProfile):
        raise InputError(
            f"{shown(profile)} given as the profile; expected what turnpike_profile(model, loader, "
            "loss) returns"
        )
    if profile.horizon != horizon:
        raise InputError(
            f"the profile is of a network with {several(profile.horizon, 'layer')}, the model has "
            f"{horizon}; "
            "profile this model"
        )


def crop(
    model: nn.Module | Anatomy,
    depth: SupportsIndex | TurnpikeProfile | CutChoice | None = None,
    *,
    remove: Iterable[SupportsIndex | tuple[SupportsIndex, str]] | None = None,
    bridge: Iterable[Any] | None = None,
    granularity: Literal["layer", "branch"] = "layer",
) -> nn.Module:
    """A smaller model of the same kind, independent of the first.

        >>> smaller = crop(model, remove=[1, 2])
        >>> anatomy(smaller).horizon == anatomy(model).horizon - 2
        True

    `crop(model, 5)` keeps the first 5 layers: in evaluation mode its output is, to the last bit,
    the model's own intermediate output at that depth. `crop(model, profile)` takes out what
    `layers_to_remove(profile)` names, `crop(model, choice)` what `choose_cut` chose, and
    `crop(model, remove=range(5, 18))` those layers, from the middle if need be: the output then
    changes by what they did. With `bridge`, batches (x, y) or x of calibration data, what each run
    of removed layers did is fitted by least squares and folded into the weights before it, as far
    as that helps on samples held out (`control.bridge.bridge`); `bridge_of(cropped)` tells what was
    fitted. Class and configuration stay.

    `crop(model, remove=[(3, "mlp"), (5, "attention")], granularity="branch")` leaves out single
    branches of blocks: what they add to the state, with the norms before them. A branch is named
    by the block's child that holds it, "attention" where it mixes tokens and "mlp" where not.
    Nothing is computed there, and no weights are held; what is saved holds zeros in their place, so
    that the class alone loads it, gives the same answers, and computes with the zeros. Norms behind
    a sum, as in BERT, stay, unless all branches of a layer go: then the layer does.

    Raises:
        InputError: a depth outside 0 … N, a profile or a choice of another horizon, a layer that
            does not exist or that the model cannot do without, neither or both of depth and remove,
            or a model whose class, built from the new configuration, is another (`check_rebuilt`);
            `bridge` where nothing can be bridged, or of data that are not finite; a branch that is
            not there, or that the model cannot do without.
    """
    check_granularity(granularity)
    structure: Anatomy = anatomy(model)
    if granularity == "branch" or (isinstance(depth, CutChoice) and depth.branches is not None):
        if bridge is not None:
            raise InputError("bridge is fitted for layers; leave it out where branches go")
        structure = ByBranch(structure)
    horizon = structure.horizon
    if (depth is None) == (remove is None):
        raise InputError("give crop a depth, a profile, or remove=…; exactly one of them")
    if isinstance(depth, CutChoice):
        if sum(depth.layers_before) != horizon:
            raise InputError(
                f"the choice is of a network with {several(sum(depth.layers_before), 'layer')}, "
                f"the model has {horizon}; choose for this model"
            )
        remove = depth.removed if depth.branches is None else depth.branches
    elif isinstance(depth, TurnpikeProfile):
        check_profile(depth, horizon)
        remove = layers_to_remove(depth)
    elif depth is not None:
        try:
            kept = check_count("depth", depth, 0, horizon)
        except InputError:
            raise InputError(
                f"depth {depth} given; the model has {several(horizon, 'layer')}: 0 … {horizon}"
            ) from None
        remove = range(kept, horizon)
    if isinstance(structure, ByBranch):
        gone = structure.numbers(() if remove is None else remove)
    else:
        gone = layer_numbers(cast(Iterable[SupportsIndex], () if remove is None else remove))
    smaller = structure.without(gone)
    for module in smaller.modules():  # of a model that is fading: the crop does not
        standing = vars(module).get("forward")
        if isinstance(standing, FadedForward):
            standing.remove()
    if bridge is not None:
        build_bridge(structure, smaller, gone, bridge)
    if not isinstance(structure, ByBranch):  # its copies are
        check_rebuilt(structure, smaller)
    return smaller


class FadedForward(ForwardStandIn):
    """Stands in a block's own attributes for its forward: x + s·(y − x) in place of y.

    In place of a residual function φ, whose chain adds its input by itself, so that there is no
    `past` that takes a state past it: s·φ(x). The `step` s goes from 1, the block as it is, to 0,
    with which it is not run unless it has a key-value cache to fill or returns more than the state,
    or may.
    """

    def __init__(self, block: nn.Module, past: Callable[[Tensor], Tensor] | None):
        super().__init__(block)
        self.past, self.step = past, 1.0
        self._state_alone = past is None  # whether the block is known to return nothing else

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The next state, or the update; what else the block returns stays as it is."""
        x = cast(Tensor, state_among(args, kwargs))
        # A block with a key-value cache is run: the cache's length is read off its layers.
        cached = any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values()))
        if self.step == 0 and self._state_alone and not cached:
            return torch.zeros_like(x) if self.past is None else self.past(x)
        y = self.own(*args, **kwargs)
        self._state_alone = isinstance(y, Tensor)
        if self.step == 1:
            return y
        state = cast(Tensor, state_of(y))
        if self.past is None:
            return with_state(y, self.step * state)
        past = self.past(x)
        return with_state(y, torch.lerp(past, state, self.step) if self.step else past)


class Fading:
    """These layers of a model, in place, have a step that can be lowered to zero:

        x_{n+1} = x_n + s·(Φ_n(x_n) − x_n)

    With s = 1 the model is what it was, with s = 0 it is `crop(model, remove=layers)` to the last
    bit: training while s goes from 1 to 0 leads from the one to the other without a jump. The
    parameters and the keys of the state_dict do not change. `end()` puts everything back, with what
    was learnt; used in a with statement it is called when that is left. To be combined with
    `use_adjoint`, fade first.

        >>> with Fading(model, [1, 2]) as fade:
        ...     fade.set_step(0.0)
        ...     faded = model(loader[0][0])
        >>> torch.equal(faded, crop(model, remove=[1, 2])(loader[0][0]))
        True

    Args:
        model: any that `anatomy` can read.
        layers: which, counted through all stages.

    Raises:
        InputError: a layer that does not exist, that the model cannot do without, or of a scheme
            whose steps share their controls (Heun).
    """

    def __init__(self, model: nn.Module | Anatomy, layers: Iterable[SupportsIndex]):
        structure = anatomy(model)
        self.layers = tuple(sorted(layer_numbers(layers)))
        structure.check_removable(self.layers)
        adding = {n for stack in structure.stacks if stack.adds for n in stack.layers}
        self._faded: list[FadedForward] = []
        for n in self.layers:
            block, *others = structure.layers[n].controls
            if isinstance(vars(block).get("forward"), FadedForward):
                raise InputError(f"layer {n} fades already; end that first")
            if others:
                raise InputError(f"layer {n} shares its controls with another: it cannot be faded")
            past = structure.past(n) if n in adding else None
            self._faded.append(FadedForward(block, past))
        for stand_in in self._faded:
            stand_in.put()

    def set_step(self, step: float) -> None:
        """Sets s of every layer, 1 … 0.

        Raises:
            InputError: another number.
        """
        expected = "a number from 0 to 1"
        step = check_number("a faded layer's step", step, expected, lambda s: 0 <= s <= 1)
        for stand_in in self._faded:
            stand_in.step = step

    def end(self) -> None:
        """Puts the blocks' own forward back."""
        for stand_in in self._faded:
            stand_in.remove()
        self._faded.clear()

    def __enter__(self) -> "Fading":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
