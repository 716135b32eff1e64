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
    """What is known of a network before its data are.

    Args:
        kind: one of `Kind`, or cifar-resnet, which has three stages.
        depths: the residual steps of each stage.
        width: numbers in a state, or channels of the first stage.
        hidden: particles, or hidden channels.
        reduction: how much the stem shrinks an image, a power of 2.
        step: the step size h.
        name: what the depths are called where they were given.
        least: of the steps of a stage.

    Raises:
        InputError: a number out of range, or other stages than such a network has.
    """
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
