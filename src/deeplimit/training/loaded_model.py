"""A model that was named on the command line, and how it is said that there is none."""

import difflib
import traceback
from collections.abc import Iterable
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


def told(error: BaseException) -> str:
    """An error in a line: its type, the first line of what it says, and where it was raised."""
    lines = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) or (frames and frames[-1].filename.startswith("<")):
        at = ""  # the first says it itself; the others are in no file
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}{at}"


def meant(name: str, names: Iterable[str]) -> str:
    """`, did you mean a, b?`, or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f", did you mean {', '.join(close)}?" if close else ""
