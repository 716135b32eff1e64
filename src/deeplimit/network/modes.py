"""Modes of a model's modules, changed for a while and put back one by one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The whole model in evaluation mode; afterwards each module in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms use their running statistics and leave them alone; nothing else changes mode.

    States of all layers stacked have other statistics than a batch: through a batch norm in
    training mode they would be normalised by figures that no layer has.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    kept = [(m.running_mean, m.running_var) for m in norms]
    for norm, (mean, var) in zip(norms, kept, strict=True):
        norm.training = False
        if mean is not None and var is not None:
            # Autograd keeps what is used here, unguarded against a later forward that moves the
            # statistics in place: without copies, gradients of that first use would be wrong.
            norm.running_mean, norm.running_var = mean.clone(), var.clone()
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.training = True
            norm.running_mean, norm.running_var = mean, var
