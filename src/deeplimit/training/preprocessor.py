"""preprocessor_config.json beside a model's weights: how its images were standardised."""

import json
import math
from pathlib import Path
from typing import Any

from deeplimit.data import Standardisation
from deeplimit.errors import InputError, did_you_mean
from deeplimit.reading import read_json
from deeplimit.records import coerce

PREPROCESSOR = "preprocessor_config.json"
FLAGS = {"rescale_offset": False, "do_rescale": True, "do_normalize": True}
READ = (*FLAGS, "image_mean", "image_std", "rescale_factor")
ALIKE = 0.9  # a name so near to one of these is that one, misspelt; do_resize is not
REMEDY = "correct the file; or delete it, and give --mean and --std where they are not the data's"


def preprocessor(scale: Standardisation) -> dict[str, Any]:
    """For AutoImageProcessor: pixels of 0 … 255 as the model was trained on; no resizing."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(scale.mean),
        "image_std": list(scale.std),
    }


def standardisation_beside(folder: Path, channels: int) -> Standardisation | None:
    """Reads from the file how images in [0, 1] are standardised; None where there is none.

    The library computes (f·p − mean) / std of pixels p in 0 … 255, with f the rescale_factor, or 1
    without do_rescale; without do_normalize mean is 0 and std is 1.

    Raises:
        InputError: the file is damaged, or a field is misspelt, missing or impossible.
    """
    path = folder / PREPROCESSOR
    if not path.exists():
        return None
    said = read_json(path, REMEDY)
    try:
        return _standardisation(said, channels)
    except InputError as error:
        raise InputError(f"{path}: {error}; {REMEDY}") from None


def _standardisation(said: Any, channels: int) -> Standardisation:
    if not isinstance(said, dict):
        raise InputError(f"it holds {_shown(said)}; expected an object of fields")
    for name in said:
        near = did_you_mean(name, READ, cutoff=ALIKE)
        if name not in READ and near:
            raise InputError(f"unknown field {name}{near}")
    flags = {
        name: coerce(bool, default if said.get(name) is None else said[name], name)
        for name, default in FLAGS.items()
    }
    if flags["rescale_offset"]:
        raise InputError("rescale_offset is true, which is not known here")
    factor = 1.0
    if flags["do_rescale"]:
        factor = _number("rescale_factor", said.get("rescale_factor", 1 / 255))
    mean, std = (0.0,) * channels, (1.0,) * channels
    if flags["do_normalize"]:
        mean, std = (_numbers(said, name, channels) for name in ("image_mean", "image_std"))
    for name, value in (("rescale_factor", factor), ("image_std", min(std))):
        if value <= 0:
            raise InputError(f"{name} is {value:g}; expected a number above 0")
    if factor != 1 / 255:
        mean, std = (tuple(v / (255 * factor) for v in values) for values in (mean, std))
    return Standardisation(mean, std)


def _numbers(said: dict[str, Any], name: str, channels: int) -> tuple[float, ...]:
    """One for each channel; a number by itself is all of them."""
    if name not in said:
        there = ", ".join(sorted(said)[:12]) or "no fields"
        raise InputError(f"no {name} among {there}; expected {channels} numbers")
    value = said[name]
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels:
        raise InputError(
            f"{name} has {len(values)} numbers, the model's images {channels} channels; expected "
            "one for each"
        )
    return tuple(_number(name, value) for value in values)


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} is {_shown(value)}; expected finite numbers")
    return number


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
