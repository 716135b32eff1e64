"""A model that was named on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from deeplimit.data import Standardisation
from deeplimit.gradient.accuracy import LossOf


@dataclass(frozen=True)
class LoadedModel:
    """What a specification stands for.

    Attributes:
        spec: as the user gave it.
        model: on the CPU; in training mode, except that what a user's function returns is left as
            it is.
        weights: where its parameters come from, in words.
        run: path of the run folder that it is the network of.
        batch: what a user's function returned beside it: a tensor, a dict of keyword arguments, or
            (inputs, targets).
        loss_of: likewise: loss_of(model, batch) → a scalar.
        input_shape: of one sample, where a library says it.
        standardisation: of its inputs, where what it was trained with is known.
    """

    spec: str
    model: nn.Module
    weights: str
    run: Path | None = None
    batch: Any = None
    loss_of: LossOf | None = None
    input_shape: tuple[int, ...] | None = None
    standardisation: Standardisation | None = None
