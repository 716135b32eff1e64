"""The names of PyTorch that are not documented, and what the adjoint asks of them.

All of the room's are here; each has a test that says so when it is gone or means something else.
"""

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from deeplimit.errors import RunError

SEEN_IN = "2.13"  # the version of PyTorch in which all of them were seen

try:
    from torch.autograd import forward_ad
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.utils._python_dispatch import TorchDispatchMode

    # Autograd's number for the backward pass that runs in this thread, or -1.
    graph_task: Callable[[], int] = torch._C._current_graph_task_id
    # The transform of torch.func that is at work, or None.
    transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
    # Whether a tensor stands for many at once, as where is_grads_batched=True.
    is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
    _saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
    _checkpoints = torch.utils.checkpoint._checkpoint_hook.__qualname__ + "."
    _repeats = torch.utils.checkpoint._recomputation_hook.__qualname__ + "."
    at_end_of_backward: Any = torch.autograd.Variable._execution_engine.queue_callback
    for _owner, _name in {
        Tensor: "_version",
        forward_ad: "_current_level",
        nn.Module: "_compiled_call_impl",
    }.items():
        getattr(_owner, _name)
except (AttributeError, ImportError) as gone:
    raise ImportError(
        f"deeplimit's adjoint uses private names of PyTorch {SEEN_IN}, one of which PyTorch "
        f"{torch.__version__} does not have ({gone}); use a version in which it is there"
    ) from gone

__all__ = [
    "NormBase",
    "TorchDispatchMode",
    "at_end_of_backward",
    "graph_task",
    "is_batched",
    "transform",
]

# Torch's checkpoint, without stepping out of compiled graphs once more: we are outside already.
_public: Any = torch.utils.checkpoint.checkpoint
checkpoint: Callable[..., Any] = getattr(_public, "__wrapped__", _public)
# How often a tensor was changed in place.
version_of: Callable[[Tensor], int] = attrgetter("_version")


def checkpoint_around() -> object | None:
    """The checkpoint of torch's, non-reentrant, that is recording what is run now."""
    return _saving_hook(_checkpoints)


def checkpoint_repeats() -> bool:
    """Tells whether a checkpoint of torch's, non-reentrant, is running again what it recorded."""
    return _saving_hook(_repeats) is not None


def _saving_hook(place: str) -> object | None:
    """What is called where a tensor is saved, if that was defined there."""
    even_while_tracing = True
    hooks = _saving_hooks(even_while_tracing)
    return hooks[0] if hooks and hooks[0].__qualname__.startswith(place) else None


def forward_mode() -> bool:
    """Tells whether derivatives are being carried forwards."""
    return forward_ad._current_level >= 0


def is_compiled(function: Any) -> bool:
    """Tells whether a function is what torch.compile made of another."""
    return getattr(function, "_torchdynamo_orig_callable", None) is not None


def is_stood_in_for(module: nn.Module) -> bool:
    """Tells whether something answers a module's calls for a while that torch.compile did not."""
    call = module._compiled_call_impl
    return call is not None and not is_compiled(call)


def holds_compiled(module: nn.Module) -> bool:
    """Tells whether torch.compile has been at work on a module, or on what it holds."""
    return (
        type(module).__name__ == "OptimizedModule"
        or module._compiled_call_impl is not None
        or any(is_compiled(value) for value in vars(module).values())
    )


def is_fully_sharded(module: nn.Module) -> bool:
    """Tells whether FSDP2 manages a module; nothing is imported to find out."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_scattered(parameter: Tensor | None) -> bool:
    """Tells whether a parameter is divided among processes at this moment."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(parameter, tensor.DTensor)


def shards(modules: Iterable[nn.Module]) -> tuple[list[Tensor], set[tuple[nn.Module, str]]]:
    """The sharded parameters that FSDP2 keeps for these modules, and their places in modules.

    Raises:
        RunError: PyTorch keeps them otherwise than it did.
    """
    found: list[Tensor] = []
    managed: set[tuple[nn.Module, str]] = set()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return found, managed
    for module in modules:
        if isinstance(module, fsdp.FSDPModule):
            try:
                state: Any = module._get_fsdp_state()
                for parameter in (p for g in state._fsdp_param_groups for p in g.fsdp_params):
                    at = parameter._module_info
                    names = (at.param_name, *at.shared_param_names)
                    managed.update(zip((at.module, *at.shared_modules), names, strict=True))
                    found.append(parameter.sharded_param)
            except AttributeError as gone:
                raise RunError(
                    f"FSDP2 of PyTorch {torch.__version__} does not keep its parameters as that "
                    f"of {SEEN_IN} did ({gone}), so the adjoint cannot tell whether they were "
                    "changed; call use_backprop(model)"
                ) from gone
    return found, managed
