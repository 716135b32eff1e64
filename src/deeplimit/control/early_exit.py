"""Early exit: each sample leaves a network at the first depth that is sure of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import check_count, check_number, shown
from deeplimit._anatomy.inputs import answer, parameters_of
from deeplimit._anatomy.nested import inside, rebuilt, tensors_in
from deeplimit._anatomy.stand_ins import PASSING
from deeplimit.control.batches import part
from deeplimit.errors import InputError


@contextmanager
def at_depth(model: nn.Module | Anatomy, depth: SupportsIndex) -> Iterator[None]:
    """Stops a model after `depth` layers, x_depth → head, in each call of it inside.

    It is the same module: no parameter is copied, and its `state_dict` is as ever. Layers that are
    not run are bypassed, so that the answer is z_depth of the profile and of `crop(model, depth)`.
    In evaluation and in training mode; one thread at a time. Where depths are nested the innermost
    is that at which it stops. A model that was compiled runs as it is meanwhile.

        >>> with at_depth(model, 1):
        ...     z = model(x)
        >>> torch.equal(z, crop(model, 1)(x))
        True

    Args:
        model: the network, as `anatomy` reads it.
        depth: the number of layers that run, 0 … N.

    Raises:
        InputError: there is no such depth, or a model that cannot be read.
    """
    structure = anatomy(model)
    (last,) = _check_depths(structure, [depth], structure.horizon)
    with PASSING, structure.passing(0, None, last):
        yield


class EarlyExit(nn.Module):
    """A classifier whose samples leave at the first depth that is sure of them.

    At each exit n, in order, z_n is computed of the samples that are still there; those with
    max softmax(z_n) ≥ threshold answer z_n. The others go on from x_n: the rows of the samples that
    left are no longer in the batch of the later blocks, nor in any input of the batch's size. In
    training mode no sample leaves early. An exit costs a run of what stands before and behind the
    layers, on the samples that reach it, so a few exits pay and one at every layer may not.

        >>> early = EarlyExit(model, {1: 0.9}).eval()
        >>> early(x).shape == model(x).shape
        True

    Args:
        model: the network, as `anatomy` reads it; its forward's signature is this one's.
        thresholds: the confidence in [0, 1] from which a sample leaves, by depth 0 … N − 1, or
            pairs of the two, such as the `thresholds` of an `ExitChoice`, whose risk is known.

    Attributes:
        taken: the depth at which each sample of the last batch left, [B].

    Raises:
        InputError: a depth that is none, a threshold outside [0, 1], or a model that cannot be
            read; when it is called, outputs that are not a row of logits for each sample.
    """

    def __init__(
        self, model: nn.Module, thresholds: Mapping[int, float] | Iterable[tuple[int, float]]
    ):
        super().__init__()
        pairs = dict(thresholds)
        structure: Anatomy = anatomy(model)
        depths = _check_depths(structure, pairs, structure.horizon - 1)
        given = dict(zip(depths, pairs.values(), strict=True))
        for n, threshold in given.items():
            what, expected = f"the threshold of depth {n}", "a confidence from 0 to 1"
            check_number(what, threshold, expected, lambda t: 0 <= t <= 1)
        self.model = structure.model
        self._structure: Anatomy | None = structure
        self.thresholds = dict(sorted(given.items()))
        self.taken = torch.zeros(0, dtype=torch.int64)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, each sample's rows of the depth at which it left."""
        if self.training or not self.thresholds:
            return self.model(*args, **kwargs)
        structure = self._structure = self._read()
        kwargs = _plain(self.model, kwargs)
        exits: list[tuple[int, float | None]] = [*self.thresholds.items()]
        exits.append((structure.horizon, None))
        rows, state, first = None, None, 0
        parts: list[tuple[Tensor, Any]] = []
        for depth, threshold in exits:
            own, named = (args, kwargs) if rows is None else part((args, kwargs), rows, count)
            with PASSING, structure.passing(first, state, depth) as left:
                output = self.model(*own, **named)
            (state,) = left
            if rows is None:
                count = len(state)
                rows = torch.arange(count, device=state.device)
                depths = torch.full_like(rows, structure.horizon)
            sure = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            if threshold is not None:
                z = answer(self.model, output)
                check_rows(self.model, z, len(rows))
                sure = confidences(z) >= threshold
            if bool(sure.any()) or threshold is None or not count:
                parts.append((rows[sure], part(output, sure, len(rows))))
                depths[rows[sure]] = depth
            rows, state, first = rows[~sure], state[~sure], depth
            if not len(rows):
                break
        self.taken = depths
        return _together([p for _, p in parts], torch.cat([r for r, _ in parts]).argsort(), count)

    def _read(self) -> Anatomy:
        """What was read of the model, again where blocks have been put in others' places."""
        read, own = self._structure, set(self.model.modules())
        if read is None or any(own.isdisjoint(layer.controls) for layer in read.layers):
            read = anatomy(self.model)
            _check_depths(read, self.thresholds, read.horizon - 1)
        return read

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read of the model: a copy reads its own, when it is called first."""
        return self.__dict__ | {"_structure": None}

    def extra_repr(self) -> str:
        """The thresholds."""
        return ", ".join(f"{n}: {t:.4g}" for n, t in self.thresholds.items())


def confidences(z: Tensor) -> Tensor:
    """Gives max softmax z of logits [..., C], in float32 at least."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z.softmax(-1).amax(-1)


def _check_depths(structure: Anatomy, depths: Iterable[Any], most: int) -> list[int]:
    """The depths as Python's whole numbers; those of NumPy and tensors of one are some."""
    checked = []
    for n in depths:
        try:
            checked.append(check_count("depth", n, 0, most))
        except InputError:
            raise InputError(
                f"depth {n!r} given; expected a whole number from 0 to {most}, of the "
                f"{structure.horizon} layers of {type(structure.model).__name__}"
            ) from None
    return checked


def _plain(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments less what cannot be put together again: caches, states, a loss of the batch."""
    for name in ("labels", "output_hidden_states", "output_attentions", "past_key_values"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise InputError(
                f"{name} given to EarlyExit; samples leave at several depths: leave it out"
            )
    if "use_cache" in parameters_of(model):
        kwargs = {**kwargs, "use_cache": False}
    return kwargs


def check_rows(model: nn.Module, z: Tensor, count: int) -> None:
    """Raises InputError where an answer is no row of logits of classes for each sample."""
    if z.dim() != 2 or len(z) != count or z.shape[1] < 2:
        raise InputError(
            f"{type(model).__name__} answers {list(z.shape)} to {count} samples; expected a row of "
            "logits of at least two classes for each; stop other models at one depth, by at_depth"
        )


def _together(parts: Sequence[Any], order: Tensor, count: int) -> Any:
    """Outputs of some rows each as one of all rows, in order."""
    first = parts[0]
    if isinstance(first, Tensor):
        one_form = all(one.dim() and one.shape[1:] == first.shape[1:] for one in parts)
        if not one_form or sum(map(len, parts)) != count:
            raise _not_of_samples(f"shape {list(first.shape)}")
        return torch.cat(list(parts))[order]
    if isinstance(first, list) and not tensors_in(first) and sum(map(len, parts)) == count:
        values = [value for one in parts for value in one]
        return [values[i] for i in order.tolist()]
    columns = list(map(inside, parts))
    if any(len(column) != len(columns[0]) for column in columns):
        raise _not_of_samples(f"lengths {list(map(len, columns))}")
    if not columns[0] and any(one is not first and one != first for one in parts):
        raise _not_of_samples(f"the value {shown(first)}")
    others = zip(*columns, strict=True)
    return rebuilt(first, [_together(column, order, count) for column in others])


def _not_of_samples(what: str) -> InputError:
    return InputError(
        f"an output of {what} is none of single samples; EarlyExit needs outputs with a row for "
        "each"
    )
