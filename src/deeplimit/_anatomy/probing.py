"""Runs that try a model out: on an example, and its head on several inputs at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import evaluating
from deeplimit._anatomy.injection import devices_of, gap
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
from deeplimit._anatomy.stacks import Watch
from deeplimit.errors import InputError

SAMPLES = 2  # of a batch on which a head is tried
MOST = 2**26  # numbers in its answer in one run


@contextmanager
def alike(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and one random state for every run."""
    with torch.random.fork_rng(devices_of(model)), evaluating(model), torch.no_grad():
        torch.manual_seed(0)
        yield


def watched(model: nn.Module, example: Any) -> tuple[Watch, Any, Tensor]:
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
        x, watch = placed(model, given), Watch(model)
        try:
            with alike(model):
                return watch, x, watch.run(partial(call, model, x))
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
        return self._whatever(self.last, self.own, [*self.others, self.x])

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
            every = torch.cat([otherwise(states), *[states] * len(group)])
            z = self._tried(every, joined([group[0], *group], several * samples))
            if z is None:
                if len(group) == 1 and group[0] is inputs[0]:
                    return False
                continue
            self._agreed |= group[-1] is self.x and gap(z[-len(own) :], own) is None
            if len(own) != len(states) or gap(z[len(own) :], expected) is not None:
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
