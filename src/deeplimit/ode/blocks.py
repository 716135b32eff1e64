"""The residual blocks of a model, and whether their parameters can be averaged."""

from collections.abc import Iterable

from torch import nn

from deeplimit._anatomy.checks import check_module
from deeplimit.errors import InputError
from deeplimit.network import Anatomy, anatomy


def blocks_of(model: nn.Module | Anatomy) -> list[nn.Module]:
    """All residual blocks in order; of a chain by Heun's method one more than its steps.

    Raises:
        InputError: a model that `anatomy` cannot read.
    """
    return [block for stack in anatomy(model).stacks for block in stack.blocks]


def check_whole(name: str, number: object) -> None:
    """Raises InputError unless it is a whole number ≥ 1."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InputError(f"{name} is {number!r}; expected a whole number ≥ 1, such as 2")


def check_values(model: nn.Module) -> None:
    """Raises InputError where parameters have no values, or none that can be averaged."""
    check_module(model)
    name = type(model).__name__
    if any(p.is_meta for p in model.parameters()):
        raise InputError(f"{name} is on the meta device, without values; load its weights first")
    if getattr(model, "is_quantized", False) or not all(
        p.is_floating_point() for p in model.parameters()
    ):
        raise InputError(
            f"{name} is quantised; change the model it was made from, then quantise the result"
        )
    for path, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"{path} of {name} is not finite: its training diverged; give the last good "
                "checkpoint"
            )


def check_untied(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Raises InputError where blocks share a parameter."""
    seen: set[nn.Parameter] = set()
    for block in blocks:
        own = set(block.parameters())
        if own & seen:
            raise InputError(
                f"layers of this {type(model).__name__} share parameters; give untie(model)"
            )
        seen |= own
