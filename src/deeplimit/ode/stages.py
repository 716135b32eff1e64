"""The stages of a model that are dynamical systems."""

from torch import nn

from deeplimit._anatomy import Anatomy, Stack, anatomy, model_of
from deeplimit.errors import InputError
from deeplimit.network.blocks import check_values


def stages(model: nn.Module | Anatomy) -> tuple[Stack, ...]:
    """The stages of a model that have at least two layers whose blocks are alike.

    A chain is one stage; of blocks that add their input it is the longest run, in each stage, of
    one class and of parameters of the same names and shapes.
    """
    read = anatomy(model)
    fixed = set(read.fixed)
    found = [run for stack in read.stacks if (run := stack.alike(fixed)) is not None]
    long = tuple(run for run in found if run.horizon > 1)
    if not long:
        there = "alike layers in its stages: " + ", ".join(str(run.horizon) for run in found)
        there = there if found else "it has no layers, or those of a stage differ"
        raise InputError(
            f"{type(read.model).__name__} has no stage of two layers or more whose blocks have the "
            f"same class and the same shapes of parameters ({there}): its controls are no "
            "points of one curve in depth; give a network with two alike layers in a stage"
        )
    return long


def longest_stage(model: nn.Module | Anatomy) -> Stack:
    """The stage with the most layers, the first of these."""
    return max(stages(model), key=lambda stage: stage.horizon)


def with_values(model: nn.Module | Anatomy) -> nn.Module:
    """The model, or the one that an anatomy reads; its parameters have values."""
    module = model_of(model)
    check_values(module.named_parameters())
    return module
