"""Batches of a loader: targets where the logits are that predict them, inputs that are finite."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.checks import IGNORED, classes_of, shown
from deeplimit._anatomy.evaluation import (
    Inputs,
    are_inputs,
    begun,
    device_of,
    evaluating,
    to_device,
)
from deeplimit._anatomy.inputs import FAILS, batch_of, parameters_of, unwrapped
from deeplimit._anatomy.nested import inside, rebuilt, tensors_in
from deeplimit.errors import InputError

SURE = 8  # tokens: so many do not agree with their neighbours, or themselves, by chance


def labelled(structure: Anatomy, loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; a mapping as (x, y), y what it calls "labels"."""
    for batch in begun(loader):
        x = _inputs_of(structure, batch) if isinstance(batch, Mapping) else {}
        yield (x, batch["labels"]) if x and "labels" in batch else batch


def any_batches(
    structure: Anatomy, loader: Iterable[Any], need: str | None = None
) -> Iterator[tuple[Any, Any]]:
    """The batches (x, y) of a loader that hold samples, on the model's device, whatever y is.

    Of a batch that is a mapping x is what the model's forward takes and is no target, and y the
    whole batch.
    """
    device, empty = device_of(structure.model), True
    for batch in begun(loader):
        match batch:
            case Mapping() if x := _inputs_of(structure, batch):
                y = batch
            case (x, y) if are_inputs(x):
                pass
            case _:
                raise InputError(
                    f"the loader gives {shown(batch)}; expected batches (x, y), or mappings: "
                    "what the model takes, and what the loss takes"
                )
        if batch_of(x):
            empty = False
            yield to_device(x, device), to_device(y, device)
    if empty and need is not None:
        raise InputError(f"the loader gave no sample; {need}")


def part(values: Any, rows: slice | Tensor, count: int) -> Any:
    """The rows of whatever holds `count` samples: tensors and lists, in mappings and tuples too."""
    if isinstance(values, list) and len(values) == count:
        if isinstance(rows, slice):
            return values[rows]
        if not any(v.dim() and len(v) == count for v in tensors_in(values)):
            return [values[i] for i in torch.arange(count)[rows.cpu()].tolist()]
    if isinstance(values, Tensor):
        where = rows.to(values.device) if isinstance(rows, Tensor) else rows
        return values[where] if values.dim() and len(values) == count else values
    return rebuilt(values, [part(value, rows, count) for value in inside(values)])


def first_part(structure: Anatomy, x: Any, count: int) -> Any:
    """The first samples of a batch of inputs, at most so many.

    Of inputs on no part of which the model runs, such as a graph with its edges, all of them.
    """
    some = part(x, slice(count), batch_of(x))
    try:
        with evaluating(structure.model), torch.no_grad():
            structure.run(some)
    except FAILS:
        return x
    return some


def _is_target(name: str) -> bool:
    return "label" in name or name in ("start_positions", "end_positions")


def _inputs_of(structure: Anatomy, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model's forward takes, less targets: it would make a loss."""
    takes = parameters_of(unwrapped(structure.model))
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    named = {k: v for k, v in batch.items() if not _is_target(k) and v is not None}
    given, labels = {k: v for k, v in named.items() if k in takes}, batch.get("labels")
    key, made = "decoder_input_ids", "prepare_decoder_input_ids_from_labels"
    model: Any = unwrapped(structure.model)
    if given and labels is not None and key in takes and key not in given and hasattr(model, made):
        given[key] = getattr(model, made)(labels=labels)
    return given or (named if anything else {})


def aligned(structure: Anatomy, x: Inputs, y: object, *, shift: bool, look: bool = True) -> Tensor:
    """The targets y [B], or [B, L], as classes, each where the logits are that predict it.

    With `shift` they are the inputs themselves, as transformers' labels are: the target at t
    becomes y_{t+1}, and none where t or t + 1 is padding, or t is the last. Where it is to `look`,
    targets are refused that are the inputs at their own places, and not the next ones, or with
    `shift` the other way round, if they are so many that it is no chance.
    """
    y = classes_of(y)
    if not structure.tokens:
        if shift:
            name = type(structure.model).__name__
            raise InputError(
                f"shift=True given; {name} has no logits for every token: leave it out"
            )
        return y
    named = x if isinstance(x, Mapping) else {}
    given = x if isinstance(x, Tensor) else named.get("decoder_input_ids", named.get("input_ids"))
    if look and given is not None and given.shape == y.shape and not given.is_floating_point():
        _check(given, y, shift=shift)
    if not shift or y.dim() != 2:
        return y
    mask = named.get("attention_mask")
    if mask is not None and mask.shape == y.shape:
        y = y.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), IGNORED)
    return torch.cat([y[:, 1:], y.new_full((len(y), 1), IGNORED)], 1)


def _check(given: Tensor, y: Tensor, *, shift: bool) -> None:
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


def blame_inputs(x: Any, figures: Tensor | None = None) -> None:
    """Refuses inputs of which a number is NaN or infinite.

    Where figures of the batch are given it looks only if one of them is NaN or infinite too; of a
    network that diverged by itself nothing is said.
    """
    if figures is not None and (not figures.numel() or bool(figures.detach().amax().isfinite())):
        return
    parts = {f"x[{i}]": v for i, v in enumerate(x)} if isinstance(x, tuple | list) else x
    for name, value in ({"x": x} if isinstance(x, Tensor) else parts).items():
        wrong = ~value.isfinite() if isinstance(value, Tensor) else torch.zeros(0)
        if bool(wrong.any()):
            place = [int(i) for i in wrong.nonzero()[0]]
            raise InputError(
                f"{name}{place} is {value[tuple(place)].item()}, and so are {int(wrong.sum()) - 1} "
                "more numbers of this batch; expected finite ones: replace them, or leave their "
                "samples out"
            )
