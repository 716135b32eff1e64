"""preprocessor_config.json beside a model's weights: how its images were standardised."""

import json
import math
from pathlib import Path
from typing import Any

from deeplimit.data import Standardisation
from deeplimit.errors import InputError, did_you_mean
from deeplimit.reading import read_json

PREPROCESSOR = "preprocessor_config.json"
READ = (
    "do_normalize",
    "do_rescale",
    "image_mean",
    "image_std",
    "rescale_factor",
    "rescale_offset",
)
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
    """What the file says of images in [0, 1]; None where there is none.

    The library computes (f·p − mean) / std of pixels p in 0 … 255, with f the rescale_factor, or 1
    without do_rescale; without do_normalize mean is 0 and std is 1.

    Args:
        folder: of the weights.
        channels: of the model's images.

    Raises:
        InputError: the file is damaged, or a field is misspelt, missing or impossible.
    """
    path = folder / PREPROCESSOR
    if not path.exists():
        return None
    said = read_json(path, REMEDY)
    if not isinstance(said, dict):
        raise InputError(f"{path} holds {_shown(said)}; expected an object of fields; {REMEDY}")
    for name in said:
        near = did_you_mean(name, READ, cutoff=ALIKE)
        if name not in READ and near:
            raise InputError(f"{path}: unknown field {name}{near} {REMEDY}")
    if _flag(path, said, "rescale_offset", default=False):
        raise InputError(f"{path}: rescale_offset is true, which is not known here; {REMEDY}")
    factor = 1.0
    if _flag(path, said, "do_rescale", default=True):
        factor = _number(path, "rescale_factor", said.get("rescale_factor", 1 / 255))
    mean, std = (0.0,) * channels, (1.0,) * channels
    if _flag(path, said, "do_normalize", default=True):
        mean, std = (_numbers(path, said, name, channels) for name in ("image_mean", "image_std"))
    if factor <= 0 or min(std) <= 0:
        name, value = ("rescale_factor", factor) if factor <= 0 else ("image_std", min(std))
        raise InputError(f"{path}: {name} is {value:g}; expected a number above 0; {REMEDY}")
    if factor != 1 / 255:
        mean, std = (tuple(v / (255 * factor) for v in values) for values in (mean, std))
    return Standardisation(mean, std)


def _flag(path: Path, said: dict[str, Any], name: str, *, default: bool) -> bool:
    value = said.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise InputError(f"{path}: {name} is {_shown(value)}; expected true or false; {REMEDY}")
    return value


def _numbers(path: Path, said: dict[str, Any], name: str, channels: int) -> tuple[float, ...]:
    """One for each channel; a number by itself is all of them."""
    if name not in said:
        there = ", ".join(sorted(said)[:12])
        raise InputError(
            f"{path}: no {name} among {there or 'no fields'}; expected {channels} numbers; {REMEDY}"
        )
    value = said[name]
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels:
        raise InputError(
            f"{path}: {name} has {len(values)} numbers, the model's images {channels} channels; "
            f"expected one for each; {REMEDY}"
        )
    return tuple(_number(path, name, value) for value in values)


def _number(path: Path, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{path}: {name} is {_shown(value)}; expected finite numbers; {REMEDY}")
    return number


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
