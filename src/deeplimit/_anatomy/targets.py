"""Targets of batches: classes, one for each sample."""

import torch
from torch import Tensor

from deeplimit._anatomy.checks import shown
from deeplimit.errors import InputError

IGNORED = -100  # as a target: what PyTorch's cross-entropy and transformers take for “none”


def classes_of(y: object) -> Tensor:
    """Targets as whole numbers of 64 bits, whatever whole numbers they were.

    Raises:
        InputError: no tensor, or one with another number.
    """
    if not isinstance(y, Tensor):
        raise InputError(f"{shown(y)} given as the targets; expected a tensor: torch.as_tensor(y)")
    if y.dtype == torch.int64:
        return y
    if y.is_complex() or bool((other := y.long() != y).any()):
        given = y if y.is_complex() else y[other]
        raise InputError(
            f"targets of {y.dtype} given, such as {given.flatten()[0].item()}; expected classes, "
            "whole numbers: what is measured here are classifiers"
        )
    return y.long()


def fitted(logits: Tensor, y: object) -> Tensor:
    """Targets of logits [..., C] as `classes_of`: [...], each 0 … C − 1 or −100.

    Raises:
        InputError: another shape, or a number that is no class. Not looked for where it would wait
            for a device.
    """
    targets, classes = classes_of(y), logits.shape[-1]
    if logits.shape[:-1] != targets.shape:
        raise InputError(
            f"targets of shape {tuple(targets.shape)} given for logits of shape "
            f"{tuple(logits.shape)}; expected {tuple(logits.shape[:-1])}, a class per sample"
        )
    if targets.device.type == "cpu" and targets.numel():
        least, most = torch.aminmax(targets.masked_fill(targets == IGNORED, 0))
        if not 0 <= int(least) <= int(most) < classes:
            raise InputError(
                f"targets from {int(least)} to {int(most)} given; expected classes, 0 … "
                f"{classes - 1}, or {IGNORED} where there is none"
            )
    return targets
