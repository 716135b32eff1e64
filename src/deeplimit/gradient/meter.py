"""The adjoint's settings, its errors, and the meter of how far rebuilt states are off."""

import math
import threading
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from deeplimit._anatomy.checks import check_count
from deeplimit.errors import InputError, RunError
from deeplimit.gradient.codes import BITS
from deeplimit.gradient.distances import Sample, compared
from deeplimit.gradient.private_torch import at_end_of_backward, graph_task

OnDrift = Literal["warn", "raise", "ignore"]

# Gradient error ≤ SAFETY·drift, or KINKED·√drift where there are kinks, on every network tried:
# benchmarks/results/adjoint_accuracy.json.
SAFETY = 2.0
KINKED = 2.5
# The same for coded states: gradient error ≤ CODED·response, or CODED_KINKED·√response:
# benchmarks/results/coded_states.json.
CODED = 8.0
CODED_KINKED = 4.0


GROWN = 1.25  # beyond it a bound is another one
PATIENCE = 3  # backward passes
NO_PLAN = (
    "every state is kept: with bits='auto' a plan is made before a forward pass of the module that "
    "use_adjoint was given, when a backward pass is over, and it has not been run as a whole, or "
    "its batch was overwritten by then (x = new, not x.copy_(new)). Give use_adjoint the module "
    "whose outputs the loss is made from (the stage cost, if there is one), or the plan of "
    "plan_memory"
)
NOT_FINITE = ": its update x_{n+1} − x_n is not finite, or beyond 3e38"
NOT_REPEATED = (
    ": its replay gave another output than the forward pass: something that is neither input, "
    "parameter nor buffer was changed in between (an attribute, a hook, a generator). The gradient "
    "is wrong; leave the block out of blocks=, or run backward before the change"
)


class AdjointError(RunError):
    """A gradient that would be wrong: what happened, and what to do instead."""


class DriftWarning(UserWarning):
    """Rebuilt states are so far off that the gradient may be wrong beyond the tolerance."""


@dataclass(frozen=True)
class Way:
    """How the backward pass comes by a block's input.

    Attributes:
        bits: b of the code of its update; 0 where none is kept.
        evaluations: e of the fixed point; 0 where the input itself is kept.
    """

    bits: int = 0
    evaluations: int = 0

    def __str__(self) -> str:
        """kept; rebuilt, e = 2; coded in 4 bits; coded in 2 bits, e = 2."""
        if not self.evaluations:
            return "kept"
        how = f"coded in {self.bits} bits" if self.bits else "rebuilt"
        return how if self.bits and self.evaluations == 1 else f"{how}, e = {self.evaluations}"

    def fitting(self, *, adds: bool) -> "Way":
        """This way, or where a block does not add its input, with no fixed point worth the name."""
        if adds:
            return self
        return Way(self.bits, 1) if self.bits else KEPT


KEPT = Way()


@dataclass(frozen=True)
class Settings:
    """What `use_adjoint` was asked for; its docstring says what each is.

    Attributes:
        bits: "auto" where `ways` says all, and what is not in it is kept.
        ways: those of single blocks.
        measured: an error of the gradient, and the bound that was told beside it.

    Raises:
        InputError: one of them cannot be.
    """

    evaluations: int = 2
    anchor_every: int | None = None
    tolerance: float = 1e-2
    on_drift: OnDrift = "warn"
    bits: int | Literal["auto"] = 0
    ways: Mapping[str, Way] = field(default_factory=dict)
    measured: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_count("evaluations", self.evaluations)
        if self.anchor_every is not None:
            check_count("anchor_every", self.anchor_every)
        for right, wrong in (
            (self.tolerance > 0, f"the tolerance is {self.tolerance}; it must be a number > 0"),
            (
                self.on_drift in ("warn", "raise", "ignore"),
                f"on_drift is {self.on_drift!r}; expected 'warn', 'raise' or 'ignore'",
            ),
            (
                self.bits in (0, *BITS, "auto"),
                f"bits is {self.bits!r}; expected 0 (no codes), 2, 4, 8 or 'auto'",
            ),
        ):
            if not right:
                raise InputError(wrong)

    def way(self, name: str) -> Way:
        """How the input of the block of this name is to come back."""
        return self.ways.get(name, self._usual)

    @cached_property
    def _usual(self) -> Way:
        return KEPT if self.bits == "auto" else Way(self.bits, self.evaluations)


@dataclass(eq=False)
class BackwardPass:
    """What the replays of one backward pass have found out about it.

    Attributes:
        task: autograd's number for it.
        settings: those in force when it began.
        drifts: (block, drift) at each kept state.
        faults: (block, what must not be above 0) by what is wrong where it is: how far replays from
            exact inputs went beyond rounding, and whether updates were not finite.
        coded: (block, what it met and did in the forward pass, and in the replay) of coded states
            that are to be compared.
        compared: (block, drift, response) of the others.
        rebuilt: the last block whose input was rebuilt by a fixed point.
    """

    task: int
    settings: Settings
    drifts: list[tuple[str, Tensor]] = field(default_factory=list)
    faults: dict[str, list[tuple[str, Tensor]]] = field(
        default_factory=lambda: {NOT_FINITE: [], NOT_REPEATED: []}
    )
    coded: list[tuple[str, Sample, Sample]] = field(default_factory=list)
    compared: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    rebuilt: str = ""

    def compare(self, at_least: int = 1) -> None:
        """Compares what is to be, if that is so much; small operations of many blocks in a few."""
        if len(self.coded) < at_least:
            return
        alike: dict[object, list[tuple[str, Sample, Sample]]] = defaultdict(list)
        for name, was, now in self.coded:
            alike[was.x.shape, was.x.dtype, was.x.device].append((name, was, now))
        self.coded = []
        for group in alike.values():
            names, *samples = zip(*group, strict=True)
            was, now = (Sample(*map(torch.stack, zip(*of, strict=True))) for of in samples)
            self.compared += zip(names, *compared(was, now), strict=True)


class DriftMeter:
    """Looks at every backward pass of a switched model when it ends, and tells of what is wrong.

    Attributes:
        drift: the largest of the last backward pass; NaN if it ended before a kept state.
        drift_at: the block before which it was found.
        response: of the last backward pass, √Σ r_n² over its coded states, whose blocks' updates
            came out wrong by r_n = ‖Φ_n(x̂_n) − Φ_n(x_n)‖ / ‖Φ_n(x_n)‖, on some entries; at least
            ‖x̂_n − x_n‖ / ‖x_n‖.
        bound: what the gradient's relative error may be up to, by all of these.
        kinked: whether a block is not differentiable everywhere (ReLU, max-pooling).
        residual: how many blocks were found to be residual so far.
        linked: whether one was linked to another.
        learnt: whether a step had its first run since the last backward pass.
        refused: the blocks left plain since then, each with the reason.
        unplanned: how many backward passes went by that might have led to a plan and did not.
        warned: what was warned of, each once: errors, or that nothing is saved.
    """

    def __init__(self) -> None:
        self.drift, self.drift_at = 0.0, ""
        self.response = self.bound = 0.0
        self.residual, self.linked, self.kinked = 0, False, False
        self.learnt = False
        self.warned: set[str] = set()
        self.unplanned = 0.0
        self.refused: list[str] = []
        self._passes: dict[int, BackwardPass] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        """What was learnt, without the backward passes of the original."""
        none = {"drift": 0.0, "drift_at": "", "response": 0.0, "bound": 0.0, "_passes": {}}
        return self.__dict__ | none | {"warned": set(self.warned)}

    def this_pass(self, settings: Settings) -> BackwardPass:
        """The backward pass that a replay belongs to; at its end it is looked at."""
        task, thread = graph_task(), threading.get_ident()
        found = self._passes.get(thread)
        if found is None or task not in (-1, found.task):
            found = self._passes[thread] = BackwardPass(task, settings)
            if task != -1:
                at_end_of_backward(partial(self._finish, found))
        return found

    def error_bound(self, drift: float) -> float:
        """What the gradient's relative error stayed below on all networks tried, at this drift.

        Of states rebuilt by a fixed point: 2·drift for blocks twice differentiable. Where a kink
        is met, units flip, as many as the drift says, and the gradient is off by their share's
        root: 2.5·√drift.
        """
        return max(SAFETY * drift, KINKED * math.sqrt(drift) if self.kinked else 0.0)

    def coded_bound(self, response: float) -> float:
        """What it stayed below where states were coded, at this response of the blocks to them.

        Errors of codes are independent from state to state, so that squares add up.
        """
        kinked = CODED_KINKED * math.sqrt(response) if self.kinked else 0.0
        return max(CODED * response, kinked)

    def _finish(self, done: BackwardPass) -> None:
        """Takes the largest drift of a backward pass that has ended, and says what it means."""
        self._passes = {key: other for key, other in self._passes.items() if other is not done}
        self.drift, self.drift_at, self.response, self.bound = 0.0, "", 0.0, 0.0
        for message, found in done.faults.items():
            beyond, name = _largest(found, nan=-math.inf)
            if beyond > 0:
                raise AdjointError(name + message)
        self._report_useless(done.settings)
        if done.rebuilt and not done.drifts:
            self.drift = math.nan
            self._warn(
                done.settings,
                f"the backward pass ended at {done.rebuilt}, before a "
                "kept state: how far the rebuilt states were off is not known. gradient_error "
                "measures it; anchors=[…] puts a kept state where the backward pass ends",
            )
            return
        self.drift, self.drift_at = _largest(done.drifts, nan=math.inf)
        self.bound = self.error_bound(self.drift)
        done.compare()
        if done.compared:
            self._add_coded(done)
        if not self.expected(done.settings) <= done.settings.tolerance:
            self._report_drift(done.settings)

    def expected(self, settings: Settings) -> float:
        """The gradient's error in the last backward pass, at most.

        What was measured stands where the bound is about what it was beside it; errors may grow by
        far more than their bounds do.
        """
        if settings.measured is None or self.bound > GROWN * settings.measured[1]:
            return self.bound
        return settings.measured[0]

    def _add_coded(self, done: BackwardPass) -> None:
        """Takes the coded states' drift and response into account."""
        drift, at = _largest([(name, off) for name, off, _ in done.compared], nan=math.inf)
        if drift > self.drift:
            self.drift, self.drift_at = drift, at
        squares = sum(float(response.double().square()) for _, _, response in done.compared)
        self.response = math.inf if math.isnan(squares) else math.sqrt(squares)
        self.bound = math.hypot(self.bound, self.coded_bound(self.response))

    def _report_useless(self, settings: Settings) -> None:
        """Says once that nothing is saved, and why."""
        why = self.refused[0] if self.refused and not self.residual else None
        if self.residual > 1 and not self.linked and not self.learnt:
            why = "no block's input is the output of the block before it as it is"
        if settings.bits == "auto" and not settings.ways:
            self.unplanned += 1
            if self.unplanned == PATIENCE:
                self._warn(settings, NO_PLAN, "useless")
        if why is not None:
            message = f"no state will be rebuilt: {why}. layout(model) tells more"
            self._warn(settings, message, "useless")
        self.refused.clear()
        self.learnt = False

    def _report_drift(self, settings: Settings) -> None:
        more = f"More evaluations ({settings.evaluations + 1} instead of {settings.evaluations})"
        if settings.bits == "auto":
            more = "A plan for a smaller tolerance"
        elif self.response and settings.bits < BITS[-1]:
            more = f"More bits ({settings.bits * 2} instead of {settings.bits})"
        message = (
            f"drift {self.drift:.2g} at {self.drift_at}: rebuilt states are off by that part of a "
            "layer's update, so the gradient's relative error may be up to "
            f"{self.expected(settings):.2g}, beyond the tolerance {settings.tolerance:g}. "
            f"{more}, anchor_every, or plan_memory(model, loss_of, batch, "
            "tolerance) bring it down; gradient_error measures it"
        )
        self.report(settings, message)

    def report(self, settings: Settings, message: str) -> None:
        """Says that a gradient errs beyond the tolerance, as the user wants to hear it."""
        if settings.on_drift == "raise":
            raise AdjointError(message)
        self._warn(settings, message)

    def _warn(self, settings: Settings, message: str, of: str = "error") -> None:
        """Once for each switch, unless the user wants to hear nothing."""
        if settings.on_drift != "ignore" and of not in self.warned:
            self.warned.add(of)
            warnings.warn(message, DriftWarning, stacklevel=2)


def _largest(found: list[tuple[str, Tensor]], nan: float) -> tuple[float, str]:
    """The largest of the numbers, NaN counted as `nan`, and whose it is; 0 of none."""
    if not found:
        return 0.0, ""
    values = torch.stack([value.double().cpu() for _, value in found])
    values = torch.where(values.isnan(), nan, values)
    worst = int(values.argmax())
    return float(values[worst]), found[worst][0]
