"""One step of a model: what it consists of, and what has been learnt of it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from deeplimit.gradient.arguments import layer_index
from deeplimit.gradient.circumstances import Modules


@dataclass
class Step:
    """One block of a model, or one step of a chain, and what has been learnt of it.

    Attributes:
        name: its path in the model.
        modules: what it consists of.
        inner: candidates inside it, which are preferred if they turn out to be residual.
        named: chosen by the user, or a step of our own chain: residual by definition.
        plain: why it is run as it is; None as long as nothing speaks against the adjoint.
        known: whether it has run once with gradients.
        sorts: whether shapes in it depend on numbers, so that its input is always kept.
        linked: whether it was linked to another.
    """

    name: str
    modules: Modules
    layer: int | None = None
    inner: tuple["Step", ...] = ()
    named: bool = False
    plain: str | None = None
    known: bool = False
    sorts: bool = False
    linked: bool = False

    @staticmethod
    def of(name: str, *roots: nn.Module, **settings: Any) -> "Step":
        """The step that consists of these modules."""
        layer = layer_index(m for root in roots for m in root.modules())
        return Step(name, Modules(roots), layer, **settings)
