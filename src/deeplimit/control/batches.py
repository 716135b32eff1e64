"""Batches of a loader: targets where the logits are that predict them, inputs that are finite."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.checks import IGNORED, classes_of
from deeplimit._anatomy.evaluation import Inputs, device_of, pairs
from deeplimit.errors import InputError

SURE = 8  # tokens: so many do not agree with their neighbours, or themselves, by chance


def aligned_batches(
    structure: Anatomy,
    loader: Iterable[tuple[Inputs, Tensor]],
    shift: bool = False,
    need: str | None = None,
) -> Iterator[tuple[Inputs, Tensor]]:
    """The batches (x, y) of a loader on the model's device; y as `aligned` makes it.

    Raises:
        InputError: a batch of another form, or as `aligned`; where it is said what `need`s samples,
            none, or none whose target counts.
    """
    counts = False
    for x, y in pairs(loader, device_of(structure.model), need):
        y = aligned(structure, x, y, shift)
        counts = counts or bool((y != IGNORED).any())
        yield x, y
    if need is not None and not counts:
        raise InputError(f"every target is −100; {need}")


def aligned(structure: Anatomy, x: Inputs, y: object, shift: bool, look: bool = True) -> Tensor:
    """The targets of a batch as classes, each where the logits are that predict it.

    Args:
        structure: of the model.
        x: inputs.
        y: targets [B], or [B, L] of tokens.
        shift: y [B, L] are the inputs themselves, as transformers' labels are: the target at t
            becomes y_{t+1}, and none where t or t + 1 is padding, or t is the last.
        look: whether to look for targets that are to be shifted and are not, or are already.

    Raises:
        InputError: targets that are no classes; so many of them that it is no chance are the inputs
            at their own places, and not the next ones, or with `shift` the other way round; `shift`
            of a model that has no logits for every token.
    """
    y = classes_of(y)
    if not structure.tokens:
        if shift:
            name = type(structure.model).__name__
            raise InputError(
                f"shift=True given; {name} has no logits for every token: leave it out"
            )
        return y
    given = x if isinstance(x, Tensor) else x.get("input_ids")
    if look and given is not None and given.shape == y.shape and not given.is_floating_point():
        _check(given, y, shift)
    if not shift or y.dim() != 2:
        return y
    mask = None if isinstance(x, Tensor) else x.get("attention_mask")
    if mask is not None and mask.shape == y.shape:
        y = y.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), IGNORED)
    return torch.cat([y[:, 1:], y.new_full((len(y), 1), IGNORED)], 1)


def _check(given: Tensor, y: Tensor, shift: bool) -> None:
    counts = y != IGNORED
    counted, before_last = counts.sum(), counts[:, :-1]
    own = (y == given)[counts].all()
    following = (y[:, :-1] == given[:, 1:])[before_last].all()
    if bool((counted < SURE) | (own == following)):
        return
    if bool(own) and not shift:
        raise InputError(
            "the targets are the inputs themselves, which a model of the next token need not "
            "predict; give shift=True, or shift them: y[:, t] = x[:, t + 1], −100 at the end"
        )
    if bool(following) and shift:
        raise InputError(
            "shift=True given, but each target is the next input already; leave shift out"
        )


def blame_inputs(x: Inputs, figures: Tensor) -> None:
    """Nothing where figures of a batch are finite; of a network that diverged nothing either.

    Raises:
        InputError: a figure is NaN or +∞, and a number of the inputs is NaN or infinite.
    """
    if figures.numel() == 0 or bool(figures.detach().amax().isfinite()):
        return
    for name, value in ({"x": x} if isinstance(x, Tensor) else x).items():
        wrong = ~value.isfinite()
        if bool(wrong.any()):
            place = [int(i) for i in wrong.nonzero()[0]]
            raise InputError(
                f"{name}{place} is {value[tuple(place)].item()}, and so are {int(wrong.sum()) - 1} "
                "more numbers of this batch; expected finite ones: replace them, or leave their "
                "samples out"
            )
