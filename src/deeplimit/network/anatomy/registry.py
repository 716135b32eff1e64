"""Which anatomy reads which class of models: one registry."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from deeplimit.errors import InputError
from deeplimit.network.anatomy.anatomy import Anatomy

FAMILIES: dict[type[nn.Module], Callable[[nn.Module], Anatomy]] = {}

Family = TypeVar("Family", bound=type[Anatomy])


def register(*classes: type[nn.Module]) -> Callable[[Family], Family]:
    """Class decorator: this anatomy reads models of these classes and their subclasses."""

    def enter(family: Family) -> Family:
        for cls in classes:
            FAMILIES[cls] = family
        return family

    return enter


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a model, by the nearest registered class among its bases.

    Raises:
        InputError: no family is registered for the model's class.
    """
    for cls in type(model).__mro__:
        if cls in FAMILIES:
            return FAMILIES[cls](model)
    known = ", ".join(sorted(cls.__name__ for cls in FAMILIES))
    raise InputError(
        f"no anatomy for {type(model).__name__}; known: {known}. Subclass "
        f"deeplimit.network.anatomy.Anatomy and decorate it with @register({type(model).__name__})"
    )
