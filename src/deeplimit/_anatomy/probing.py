"""What a model's head reads besides the states of the last block: tried out on other inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.batches import first_sample, first_token, others, placed, small
from deeplimit._anatomy.calling import FAILS, call, told
from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import evaluating
from deeplimit._anatomy.examples import examples
from deeplimit._anatomy.injection import by_stage, devices_of, gap
from deeplimit._anatomy.stacks import Watch
from deeplimit.errors import InputError


@contextmanager
def alike(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and one random state for every run."""
    with torch.random.fork_rng(devices_of(model)), evaluating(model), torch.no_grad():
        torch.manual_seed(0)
        yield


def watched(model: nn.Module, example: Any) -> tuple[Watch, Any, Tensor]:
    """What was seen in a run on the example, which is made where none was given.

    Raises:
        InputError: something else is given, or the model does not run on it.
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


def small_part(
    x: Any, states: Callable[[Any], tuple[list[Tensor], Tensor]]
) -> tuple[Any, list[Tensor], Tensor]:
    """A small part of a batch, or all of one that cannot be cut; its states and its logits."""
    part = small(x)
    try:
        return part, *states(part)
    except FAILS:
        return x, *states(x)


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


class HeadProbe:
    """Injects the last state while the model runs on other inputs than it is of.

    Args:
        model: whose head is tried.
        injected: (states by stage, inputs to run on) ↦ logits.
        x: a small batch.
        own: the model's own logits of it.
    """

    def __init__(
        self,
        model: nn.Module,
        injected: Callable[[dict[int, Tensor], Any], Tensor],
        x: Any,
        own: Tensor,
    ):
        self.model, self.x, self.own = model, x, own
        self._injected = injected
        self._why = ""

    def reads_tokens(self, last: Tensor) -> bool:
        """Whether each token is read by itself, whatever the inputs."""
        if last.shape[1] < 2 or self.own.shape[:-1] != last.shape[:-1]:  # one tells nothing
            return False
        each, expected = last.flatten(0, 1)[:, None], self.own.flatten(0, 1)[:, None]
        return self._whatever({0: each}, [first_token(o) for o in self._others()], expected)

    def reads_states(self, states: Sequence[Tensor], stages: Sequence[int]) -> bool:
        """Whether states of many layers are read at once, whatever the inputs."""
        if stages[-1] == 0:  # nothing but the head to be tried
            states, stages = [states[0], states[-1]], stages[-2:]
        drivers = [first_sample(o) for o in self._others()]
        return self._whatever(by_stage(states, stages), drivers, self.own)

    def check(self, at: dict[int, Tensor], name: str | None) -> None:
        """Raises InputError unless the last state has the model's own logits on its own inputs."""
        z = self._tried(at, self.x)
        apart = gap(z, self.own)
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

    def _others(self) -> list[Any]:
        return others(self.model, self.x)

    def _whatever(self, at: dict[int, Tensor], drivers: Sequence[Any], own: Tensor) -> bool:
        """Whether the last states' logits are `own` on all inputs; the first the model must take.

        The others may be such as it does not.
        """
        rows = sum(map(len, at.values()))
        for n, driver in enumerate(drivers):
            z = self._tried(at, driver)
            if z is None and n:
                continue
            if z is None or len(z) != rows or gap(z[-len(own) :], own) is not None:
                return False
        return True

    def _tried(self, at: dict[int, Tensor], x: Any) -> Tensor | None:
        try:
            return self._injected(at, x)
        except (InputError, *FAILS) as error:
            self._why = told(error)
            return None
