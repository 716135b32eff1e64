"""Modes of a model's modules, changed for a while and put back one by one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import classes_of, shown
from deeplimit._anatomy.nested import each_tensor, tensors_in
from deeplimit.errors import InputError

# What a model takes: one tensor, tensors by name as transformers' models do, or several in order.
Inputs = Tensor | Mapping[str, Any] | Sequence[Any]


def to_device(x: Any, device: torch.device) -> Any:
    """Inputs on a device."""
    return each_tensor(lambda v: v.to(device), x)


def to_precision(x: Any, dtype: torch.dtype) -> Any:
    """Inputs whose numbers with a fraction are of this dtype; whole ones stay as they are."""
    return each_tensor(lambda v: v.to(dtype) if v.is_floating_point() else v, x)


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Batches one after the other; of one itself, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def begun(loader: Iterable[Any]) -> Iterator[Any]:
    """Begins a pass over a loader; an InputError where it is none."""
    try:
        return iter(loader)
    except TypeError:
        raise InputError(
            f"{shown(loader)} given as the loader; expected what gives batches (x, y), such as a "
            "DataLoader or a list"
        ) from None


def are_inputs(x: Any) -> bool:
    """Tells whether it is a tensor, tensors by name, or several of which one is a tensor.

    A tuple, or a list, which a DataLoader makes of it; a list of one is none.
    """
    if isinstance(x, Tensor | Mapping):
        return True
    several = isinstance(x, tuple) or (isinstance(x, list) and len(x) > 1)
    return several and any(isinstance(part, Tensor) for part in x)


def pairs(
    loader: Iterable[Any], device: torch.device, need: str | None = None
) -> Iterator[tuple[Any, Tensor]]:
    """The batches (x, y) of a loader that hold samples, on a device; y are classes.

    An InputError where they have another form, or with `need`, which says what needs one, where
    there is no sample.
    """
    batches = samples = 0
    for batch in begun(loader):
        batches += 1
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        match parts:
            case (x, y) if are_inputs(x):
                y, x = classes_of(y).to(device), to_device(x, device)
                if not y.dim():
                    raise InputError(
                        "the loader gives single samples; expected batches (x, y): put "
                        "torch.utils.data.DataLoader(…, batch_size=64) around the data"
                    )
                if y.numel() or any(value.numel() for value in tensors_in(x)):
                    samples += 1
                    yield x, y
            case _:
                given = ", ".join(map(_described, parts)) or "nothing"
                raise InputError(
                    f"the loader gives batches of {given}; expected (x, y): inputs, a tensor, "
                    "tensors by name or a tuple of them, and a tensor of targets; give it a "
                    "collate_fn that returns them"
                )
    if need is not None and not samples:
        none = "batches without a sample" if batches else "no batch"
        raise InputError(f"the loader gave {none}; {need}")


def _described(part: Any) -> str:
    if isinstance(part, Mapping):
        return f"a mapping of {', '.join(map(str, part))}"
    return f"a {type(part).__name__}"


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The whole model in evaluation mode; afterwards each module in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):  # some drop what they keep where they are told twice
        model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


class RunningStatistics:
    """Batch norms in training mode, with their running statistics as they are now.

    While it is in `use` they normalise by these and leave them alone; nothing else changes mode.
    States of all layers stacked have other statistics than a batch: through a batch norm in
    training mode they would be normalised by figures that no layer has.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        kind = nn.modules.batchnorm._BatchNorm  # noqa: SLF001
        self._norms = [m for m in modules if isinstance(m, kind) and m.training]
        # Copies: autograd keeps what is used, unguarded against a later forward that moves the
        # statistics in place, and a replay in the backward pass must find what the forward did.
        self._now = [
            tuple(None if v is None else v.clone() for v in (m.running_mean, m.running_var))
            for m in self._norms
        ]

    @contextmanager
    def use(self) -> Iterator[None]:
        """For a while; may be used again."""
        kept = [(m.running_mean, m.running_var) for m in self._norms]
        for norm, (mean, var) in zip(self._norms, self._now, strict=True):
            norm.training = False
            norm.running_mean, norm.running_var = mean, var
        try:
            yield
        finally:
            for norm, (mean, var) in zip(self._norms, kept, strict=True):
                norm.training = True
                norm.running_mean, norm.running_var = mean, var
