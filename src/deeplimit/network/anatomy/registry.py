"""Which anatomy reads which class of models: one registry."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from deeplimit.errors import InputError
from deeplimit.network.anatomy.anatomy import Anatomy

FAMILIES: dict[type[nn.Module] | str, Callable[[nn.Module], Anatomy]] = {}

Family = TypeVar("Family", bound=type[Anatomy])


def register(*classes: type[nn.Module] | str) -> Callable[[Family], Family]:
    """Class decorator: this anatomy reads models of these classes and their subclasses.

    A class of a library that need not be there is given as text, "library.Class".
    """

    def enter(family: Family) -> Family:
        for cls in classes:
            FAMILIES[cls] = family
        return family

    return enter


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a model, by the nearest registered class among its bases.

    Raises:
        InputError: no family is registered for the model's class, or its family does not fit.
    """
    tried = []
    for cls in type(model).__mro__:
        name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        family = FAMILIES.get(cls) or FAMILIES.get(name)
        if family is not None:
            return family(model)
        if cls is nn.Module:
            break
        tried.append(name)
    known = sorted(cls if isinstance(cls, str) else cls.__name__ for cls in FAMILIES)
    raise InputError(
        f"no anatomy for {type(model).__name__}; tried {', '.join(tried)}; known: "
        f"{', '.join(known)}. Subclass deeplimit.network.BlockAnatomy (or Anatomy) and decorate it "
        f"with @register({type(model).__name__})"
    )
