"""The stages of a model that are dynamical systems: alike residual blocks, one after the other."""

from collections.abc import Sequence

from torch import nn

from deeplimit._anatomy import Stack
from deeplimit.errors import InputError
from deeplimit.network import Anatomy, anatomy


def stages(model: nn.Module | Anatomy) -> tuple[Stack, ...]:
    """The stages of a model that have at least two layers whose blocks are alike.

    Of a `ResidualChain` the chain itself; of our classifiers their chains; of any other model that
    `anatomy` can read the longest run, in each of its stages, of blocks of one class, whose
    parameters have the same names and shapes, and which do not change the state's shape.

    Raises:
        InputError: a model that `anatomy` cannot read, or that has no such stage.
    """
    read = anatomy(model)
    fixed = set(read.fixed)
    found = [run for stack in read.stacks if (run := stack.alike(fixed)) is not None]
    long = tuple(run for run in found if run.horizon > 1)
    if not long:
        raise InputError(
            f"{type(read.model).__name__} has no stage of two layers or more whose blocks have the "
            f"same class and the same shapes of parameters ({_few(found)}): its controls are no "
            "points of one curve in depth; give a network with two alike layers in a stage"
        )
    return long


def _few(found: Sequence[Stack]) -> str:
    """What there is instead."""
    if not found:
        return "it has no layers, or those of a stage differ"
    return f"alike layers in its stages: {', '.join(str(stage.horizon) for stage in found)}"


def longest_stage(model: nn.Module) -> Stack:
    """The stage with the most layers, the first of these.

    Raises:
        InputError: as `stages`.
    """
    return max(stages(model), key=lambda stage: stage.horizon)
