"""The vocabulary of a network's shape and its validator; neither needs torch."""

import math
from collections.abc import Sequence
from typing import Literal

from deeplimit.errors import InputError

Kind = Literal["logit", "vector", "convolutional"]
Activation = Literal["relu", "gelu", "tanh", "silu"]
Norm = Literal["batch", "group", "none"]
SchemeName = Literal["euler", "heun"]

LEAST = {"width": 1, "hidden": 0, "reduction": 1}


def check_shape(
    kind: str,
    depths: Sequence[int],
    *,
    width: int = 1,
    hidden: int = 0,
    reduction: int = 1,
    step: float = 1.0,
    name: str = "depths",
    least: int = 0,
) -> None:
    """Checks what is known of a network before its data are."""
    shown = " ".join(map(str, depths)) or "empty"
    if not depths or min(depths) < least:
        raise InputError(
            f"{name} is {shown}; expected at least {least} residual steps in every stage"
        )
    if kind in ("logit", "vector") and len(depths) != 1:
        raise InputError(
            f"{name} is {shown}: a {kind} network has one stage, {len(depths)} given; give one "
            "number, or the kind convolutional"
        )
    if kind == "cifar-resnet" and len(depths) != 3:
        raise InputError(
            f"{name} is {shown}: a cifar-resnet has three stages; give three numbers, 9 9 9 for "
            "ResNet-56"
        )
    for label, value in (("width", width), ("hidden", hidden), ("reduction", reduction)):
        if value < LEAST[label]:
            raise InputError(f"{label} is {value}; expected at least {LEAST[label]}")
    if reduction & (reduction - 1):
        raise InputError(f"reduction is {reduction}; expected a power of 2: 1, 2, 4, …")
    if not (math.isfinite(step) and step > 0):
        raise InputError(f"step is {step:g}; expected a number above 0: 1, or T/N")
