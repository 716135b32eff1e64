"""A model's own forward without some of its blocks, and with states put in; trials of both."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import RunningStatistics, evaluating
from deeplimit._anatomy.inputs import (
    FAILS,
    TOKENS,
    batch_of,
    call,
    examples,
    first_sample,
    joined,
    one_token,
    others,
    otherwise,
    placed,
    told,
)
from deeplimit._anatomy.stacks import Block, Calls, Watch, is_plain
from deeplimit._anatomy.stand_ins import (
    PASSING,
    StandIn,
    own_call,
    standing_in,
    state_among,
    with_argument,
)
from deeplimit.errors import InputError

# Of the logits' rounding, what the same head may make of the same state in another call. Sums in
# half precision are rounded once, at their end.
SLACK, HALF_SLACK = 100, 4
SAMPLES = 2  # of a batch on which a head is tried
MOST = 2**26  # numbers in its answer in one run


@contextmanager
def _altered(
    blocks: Sequence[Block], kept: Collection[int], enter: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Bypasses all blocks but those kept: they return their input in the form of their output.

    The state that enters block n becomes enter(n, state); with as many as there are blocks for n
    what a bypassed last one returns. One module may be several blocks.
    """
    numbers: dict[nn.Module, list[int]] = {}
    for n, block in enumerate(blocks):
        numbers.setdefault(block.module, []).append(n)

    def of(module: nn.Module, turns: Iterator[int]) -> StandIn:
        own = own_call(module)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            n, h = next(turns), cast(Tensor, state_among(args, kwargs))
            x = enter(n, h)
            if n in kept:
                args, kwargs = with_argument(args, kwargs, h, x)
                return own(*args, **kwargs)
            if (shortcut := blocks[n].shortcut) is not None:
                x = shortcut(x)
            return blocks[n].form(x if n + 1 < len(blocks) else enter(n + 1, x))

        return stand_in

    with standing_in({module: of(module, cycle(own)) for module, own in numbers.items()}):
        yield


@contextmanager
def bypassing(blocks: Sequence[Block], gone: Collection[int]) -> Iterator[None]:
    """Those of the blocks that are gone return their input, in the form of their output.

    Threads take turns.
    """
    kept = set(range(len(blocks))).difference(gone)
    with PASSING, _altered(blocks, kept, lambda _, h: h):
        yield


@contextmanager
def passing(
    blocks: Sequence[Block], first: int, x: Tensor | None, last: int
) -> Iterator[list[Tensor]]:
    """Runs blocks first … last − 1 alone, from x or the model's own state.

    Collects x_last as it enters block `last`, where there is one.
    """
    left: list[Tensor] = []

    def enter(n: int, h: Tensor) -> Tensor:
        if n == first and x is not None:
            h = x
        if n == last:
            left.append(h)
        return h

    with _altered(blocks, range(first, last), enter):
        yield left


def injected(
    model: nn.Module,
    blocks: Sequence[Block],
    run: Callable[[], Tensor],
    at: Mapping[int, Tensor],
    statistics: RunningStatistics | None = None,
    read: int | None = None,
) -> Tensor:
    """The logits of states that are put in at the end of their stages, all blocks bypassed.

    States of earlier stages come first in the answer. What the model carries from its stem is
    dropped where the first states come in. The random state and running statistics are afterwards
    what they were. With `read`, a stage, what enters it is returned in place of the logits; an
    InputError where a stage does not go on from the one before.
    """
    end = blocks[-1]
    stages = [*(block.stage for block in blocks), end.stage + (end.shortcut is not None)]
    rows = 0
    taken: list[Tensor] = []

    def enter(n: int, h: Tensor) -> Tensor:
        nonlocal rows
        stage = stages[n]
        if n == 0 or stages[n - 1] != stage:
            if rows and len(h) != rows:
                raise InputError(
                    f"stage {stage} does not go on from the one before, so that they are no one "
                    "stack; name one list of blocks with blocks=…"
                )
            if stage == read:
                taken.append(h)
        if stage in at and stage not in stages[n + 1 :]:
            h = torch.cat([h, at[stage]]) if rows else at[stage]
            rows = len(h)
        return h

    statistics = statistics or RunningStatistics(model.modules())
    with torch.random.fork_rng(devices_of(model)), statistics.use(), _altered(blocks, (), enter):
        logits = run()
    return logits if read is None else taken[0]


def devices_of(model: nn.Module) -> list[int]:
    """The devices other than the CPU whose random state a forward may change."""
    initialised = cast(Any, torch.cuda).is_initialized()
    # No walk through a large model for each call of its head where there is no such device.
    found = {p.device for p in model.parameters()} if initialised else set()
    return sorted({d.index or 0 for d in found if d.type == "cuda"})


def slack_of(dtype: torch.dtype) -> float:
    """Bounds the difference of two sums of the same numbers, relative to the largest."""
    return (HALF_SLACK if dtype.itemsize < 4 else SLACK) * torch.finfo(dtype).eps


def gap(a: Tensor | None, b: Tensor) -> str | None:
    """Says in words by what two answers differ; None where they are equal but for rounding.

    NaN is no agreement; infinite logits, of tokens that may not be said, are equal to themselves.
    """
    if a is None or a.shape != b.shape:
        return f"in shape, {None if a is None else list(a.shape)} and {list(b.shape)}"
    if b.numel() == 0:
        return None
    largest = float(b.abs().masked_fill_(b.isinf(), 0).max())
    limit = slack_of(b.dtype) * (1 + largest)
    difference = a.to(torch.promote_types(b.dtype, torch.float32)) - b
    apart = float(difference.masked_fill_(a == b, 0).abs_().max())
    return None if apart <= limit else f"by {apart:.2g}"


@contextmanager
def alike(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and one random state for every run."""
    with torch.random.fork_rng(devices_of(model)), evaluating(model), torch.no_grad():
        torch.manual_seed(0)
        yield


def watched(model: nn.Module, example: Any) -> tuple[Calls, Any, Tensor]:
    """Runs the model on the example, which is made where none was given: what was seen, its logits.

    An InputError where something else is given, or the model does not run on it.
    """
    if example is not None and not isinstance(example, Tensor | Mapping | tuple | list):
        raise InputError(
            f"{shown(example)} given as the example; expected a batch of the model's inputs: a "
            "tensor, tensors by name, or a tuple"
        )
    reason = ""
    for given in examples(model) if example is None else [example]:
        parts = (m for m in model.modules() if m is not model and not is_plain(m))
        x, watch = placed(model, given), Watch(parts)
        try:
            with alike(model):
                own = watch.run(partial(call, model, x))
            return watch.seen, x, own
        except FAILS as error:
            reason = reason or told(error)  # of the likeliest
    what = "the example" if example is not None else "an example made for it"
    raise InputError(
        f"{type(model).__name__} does not run on {what} ({reason or 'none could be made'}); give a "
        "batch of its inputs: anatomy(model, example=…), and that in place of the model"
    )


def check_answer(model: nn.Module, own: Tensor) -> None:
    """Raises InputError for an answer that is no logits."""
    name = type(model).__name__
    if not own.is_floating_point() or not own.dim():
        raise InputError(
            f"{name} answers {shown(own)}; expected logits: numbers with a fraction, of each sample"
        )
    if bool(own.isnan().any()):
        raise InputError(
            f"{name} answers NaN to its example, with which no reading agrees: its parameters are "
            "not finite, or the example does not fit; give a batch of its inputs: "
            "anatomy(model, example=…)"
        )


class HeadTrial:
    """The last state injected while the model runs on other inputs than it is of.

    Args:
        model: whose head is tried.
        inject: (last states, inputs to run on) ↦ logits.
        x, last, own: inputs, their last state and the model's own logits.
    """

    def __init__(
        self,
        model: nn.Module,
        inject: Callable[[Tensor, Any], Tensor],
        x: Any,
        last: Tensor,
        own: Tensor,
    ):
        self.model, self.inject, self.whole = model, inject, (x, last, own)
        if len(last) == len(own) == batch_of(x):
            x, last, own = first_sample(x, SAMPLES), last[:SAMPLES], own[:SAMPLES]
        self.x, self.last, self.own = x, last, own
        self.others = others(model, x)
        self._agreed, self._why = False, ""

    def reads_tokens(self) -> bool:
        """Tells whether each token is read by itself; one token does not tell."""
        if self.last.shape[1] < 2 or self.own.shape[:-1] != self.last.shape[:-1]:
            return False
        each, own = (t[:, :TOKENS].flatten(0, 1)[:, None] for t in (self.last, self.own))
        inputs = [*(one_token(o, -1) for o in self.others), one_token(self.x)]
        return self._whatever(each, own, [joined([one], len(each)) for one in inputs])

    def reads_states(self) -> bool:
        """Tells whether a state is read by itself, whatever the inputs."""
        several = [*self.others, self.x]
        return len(self.own) == len(self.last) and self._whatever(self.last, self.own, several)

    def check(self, name: str | None) -> None:
        """Raises InputError unless the last state has the model's own logits on its own inputs."""
        x, last, own = self.whole
        z = own if self._agreed else self._tried(last, x)
        apart = gap(z, own)
        if apart is None:
            return
        how = f"the logits of its last state differ from its own {apart}"
        if z is None:
            how = f"it does not run ({self._why})"
        raise InputError(
            f"{type(self.model).__name__} cannot be read: with its blocks bypassed, {how}, so that "
            f"something but the last block's state decides them; the blocks read are those of "
            f"{name or 'the list given'}"
        )

    def _whatever(self, states: Tensor, own: Tensor, inputs: Sequence[Any]) -> bool:
        """Tells whether the logits of states are their own beside each of the inputs, in one run.

        Other states are beside them, and the last inputs are their own. Where the model does not
        run on all inputs it is run on one after the other; but for the first they may be such as
        it does not take.
        """
        samples = batch_of(inputs[0])
        if not samples:
            return False
        at_once = [inputs] if len(inputs) * own.numel() < MOST else []
        for group in (*at_once, *([one] for one in inputs)):
            several, expected = len(group) + 1, torch.cat([own] * len(group))
            # Larger ones, which set the scale of a head that is quantised by the batch.
            beside = 2 * otherwise(states)
            every = torch.cat([beside, *[states] * len(group)])
            z = self._tried(every, joined([group[0], *group], several * samples))
            if z is None:
                if len(group) == 1 and group[0] is inputs[0]:
                    return False
                continue
            mine, known = z[-len(own) :], own
            if mine.shape[1:2] == z.shape[:1]:  # a number for each two rows, as of images and texts
                mine, known = mine[:, -len(own) :], own[:, : len(own)]
            self._agreed |= group[-1] is self.x and gap(mine, known) is None
            if gap(z[len(own) :], expected) is not None:
                return False
            if group is inputs:
                return True
        return True

    def _tried(self, states: Tensor, x: Any) -> Tensor | None:
        try:
            return self.inject(states, x)
        except FAILS as error:
            self._why = told(error)
            return None
