"""Which anatomy reads which class of models: one registry."""

from collections import Counter
from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

from deeplimit.errors import InputError
from deeplimit.network.anatomy.anatomy import Anatomy
from deeplimit.network.checks import shown

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
        InputError: no model, no family is registered for its class, or its family does not fit.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{shown(model)} given as the model; expected a torch.nn.Module")
    tried = []
    for cls in type(model).__mro__:
        name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        family = FAMILIES.get(cls) or FAMILIES.get(name)
        if family is not None:
            return family(model)
        if cls is nn.Module:
            break
        tried.append(name)
    raise InputError(
        f"no anatomy for {type(model).__name__}; tried {', '.join(tried)}; known: {_known(tried)}. "
        "Subclass deeplimit.network.BlockAnatomy (or Anatomy) and decorate it with "
        f"@register({type(model).__name__})"
    )


def _known(tried: list[str]) -> str:
    """Classes without a library, those of names near its own, and how many others there are."""
    names = [cls if isinstance(cls, str) else cls.__name__ for cls in FAMILIES]
    own = [name for name in names if "." not in name]
    foreign = [name for name in names if "." in name]
    near = get_close_matches(tried[0], foreign, n=3, cutoff=0.5)
    shown = sorted(dict.fromkeys([*own, *near]))
    libraries = Counter(name.partition(".")[0] for name in foreign if name not in near)
    rest = [f"{count} classes of {library}" for library, count in sorted(libraries.items())]
    return ", ".join([*shown, *rest])
