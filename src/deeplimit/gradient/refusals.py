"""What the adjoint does not go with: a line each, before memory is wasted or a gradient wrong."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deeplimit.errors import InputError
from deeplimit.gradient.errors import AdjointError

FLAG = "gradient_checkpointing"  # transformers' own


def refuse_checkpoints(what: str, modules: Iterable[nn.Module]) -> None:
    """With transformers' own checkpoints around the blocks nothing would be saved, without a word.

    Raises:
        InputError: they are switched on.
    """
    if any(getattr(m, FLAG, False) is True for m in modules):
        raise InputError(
            f"{what} has gradient checkpointing on, which keeps every block's input and runs it "
            "again; call model.gradient_checkpointing_disable() first"
        )


def checkpoint_each(name: str) -> InputError:
    """The error for blocks each of which somebody else has put into a checkpoint."""
    return InputError(
        f"{name} and the block before it run in a checkpoint each, which keeps their inputs: "
        "nothing would be saved. Take the checkpoints away, or call use_backprop(model)"
    )


def checkpoint_around() -> object | None:
    """The checkpoint of torch's, non-reentrant, that is recording what is run now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    inside = hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")
    return hooks[0] if inside else None


def check_there(name: str, parameters: Sequence[Tensor]) -> None:
    """A replay needs the block's parameters as its forward pass had them.

    Raises:
        AdjointError: they are not there yet, or not any more.
    """
    if any(p.is_meta for p in parameters):
        raise AdjointError(
            f"{name}: its parameters are taken away between runs (offloaded to CPU or disk, as by "
            "accelerate's hooks; they are on the device 'meta'): no gradient reaches them. Load "
            "the model as a whole, accelerate.hooks.remove_hook_from_submodules(model), to train it"
        )
    if any(is_lazy(p) for p in parameters):
        raise AdjointError(
            f"{name}: its parameters have no shape yet (LazyLinear and its like); run one batch "
            "first: with torch.no_grad(): model(x)"
        )
