"""Which anatomy reads a model: our own networks' by class, any other model's by its own forward."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from torch import nn

from deeplimit._anatomy.anatomy import Anatomy
from deeplimit._anatomy.chain import ResidualChain, chains_in
from deeplimit._anatomy.chain_anatomy import ChainAnatomy, HeldChains
from deeplimit._anatomy.checks import check_module
from deeplimit._anatomy.inputs import unwrapped
from deeplimit._anatomy.read_model import READ_AS, ReadModel
from deeplimit.errors import InputError

FAMILIES: dict[type[nn.Module], Callable[[nn.Module], Anatomy]] = {ResidualChain: ChainAnatomy}

Family = TypeVar("Family", bound=type[Anatomy])


def register(*classes: type[nn.Module]) -> Callable[[Family], Family]:
    """Class decorator: this anatomy reads models of these classes and their subclasses."""

    def enter(family: Family) -> Family:
        for cls in classes:
            FAMILIES[cls] = family
        return family

    return enter


def of_family(model: nn.Module) -> Anatomy | None:
    """The anatomy of a network of our own, or of a class that was registered."""
    return next((FAMILIES[cls](model) for cls in type(model).__mro__ if cls in FAMILIES), None)


def anatomy(
    model: nn.Module | Anatomy,
    example: Any = None,
    blocks: str | Iterable[nn.Module] | None = None,
) -> Anatomy:
    """Reads a model: its residual blocks, their states, and the logits of each state.

    The example and the blocks that were given are remembered on the model: whatever takes the model
    later, or a copy or a crop of it, reads it likewise. `StageCost`, `crop`, `verify_crop`,
    `turnpike_profile`, `choose_cut` and `Fading` take what this returns in its place, too. Wrappers
    of torch.compile, DataParallel and DistributedDataParallel are looked through.

        a = anatomy(model, example=batch, blocks="encoder.layers")
        states, logits = a.states(batch)
        z = a.logits(states, x=batch)       # [N + 1, B, …]

    Args:
        model: any module with a ModuleList or Sequential of blocks that take and return a state of
            one shape; or an anatomy, which is returned.
        example: a batch of inputs on which it is read: a tensor, tensors by name, or a tuple. By
            default one is made: of the width, channels or tokens that its first layer takes.
        blocks: the name of the list that is meant where there are several (an encoder's and a
            decoder's), a pattern such as "layers.*.blocks", or the blocks; by default the list, or
            lists whose names differ in numbers only, with the most blocks.

    Raises:
        InputError: no model, or as `ReadModel`.
    """
    if isinstance(model, Anatomy):
        return model
    check_module(model)
    model = unwrapped(model)
    own = of_family(model)
    if own is not None:
        return own
    before = vars(model).get(READ_AS, (None, None))
    given = example if example is not None else before[0]
    meant = blocks if blocks is not None else before[1]
    structure = _read(model, given, meant)
    if example is not None or blocks is not None:
        vars(model)[READ_AS] = structure.example(), structure.name
    return structure


def _read(model: nn.Module, example: Any, blocks: Any) -> Anatomy:
    if blocks is None and chains_in(model):
        try:
            return HeldChains(model, example)
        except InputError:
            with suppress(InputError):  # they are parts of blocks
                return ReadModel(model, example)
            raise
    return ReadModel(model, example, blocks)


def model_of(model: nn.Module | Anatomy) -> nn.Module:
    """The model, or the one that an anatomy reads.

    Raises:
        InputError: neither.
    """
    module = model.model if isinstance(model, Anatomy) else model
    check_module(module)
    return module
