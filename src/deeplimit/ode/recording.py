"""The states that a network itself passes through in one of its stages, in float64."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeplimit._anatomy import Stack
from deeplimit._anatomy.evaluation import Inputs, device_of, to_device, to_precision
from deeplimit._anatomy.stand_ins import state_among, state_of
from deeplimit.errors import InputError
from deeplimit.network import ResidualChain, anatomy
from deeplimit.ode.stages import stages


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its state: masks, positions; nothing in our chains.

    Attributes:
        args: what stands behind the state.
        kwargs: what is given by name.
        name: the state's name where it is given by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    name: str | None = None

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, "Call"]:
        """The state and the rest of a block's arguments."""
        if args:
            return args[0], Call(args[1:], kwargs)
        x = cast(Tensor, state_among(args, kwargs))
        name = next(name for name, value in kwargs.items() if value is x)
        return x, Call((), {k: v for k, v in kwargs.items() if k != name}, name)

    def with_state(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with this state."""
        kwargs = self.kwargs or {}
        if self.name is None:
            return (x, *self.args), kwargs
        return self.args, {**kwargs, self.name: x}


@dataclass(frozen=True)
class Recorded:
    """A stage of a copy of the model, in float64 and evaluation mode, and what it did.

    Attributes:
        stage: the copy's.
        states: x_0 … x_N.
        call: what its first block was called with.
    """

    stage: Stack
    states: list[Tensor]
    call: Call


@torch.no_grad()
def record(model: nn.Module, x: Inputs, stage: Stack) -> Recorded:
    """Runs a copy of the model on x; keys and values are not cached.

    Raises:
        InputError: training mode where it makes a difference, the model does not run on x, or a
            state is not finite.
    """
    _check_mode(model)
    other = copy.deepcopy(model).double().eval()
    structure = anatomy(other)  # which runs the model on an example: before the hooks
    own = next(s for s in stages(structure) if s.index == stage.index)
    entered: list[tuple[Tensor, Call]] = []
    left: list[Any] = []

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(Call.of(args, kwargs))

    every = dict.fromkeys(own.blocks)  # one that is called several times, once
    hooks = [block.register_forward_pre_hook(enters, with_kwargs=True) for block in every]
    hooks.append(own.blocks[-1].register_forward_hook(lambda _, args, y: left.append(y)))
    try:
        structure.run(to_precision(to_device(x, device_of(other)), torch.float64))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{type(model).__name__} does not run on x, {_described(x)}: {reason}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    first, call = entered[0]
    if own.adds:
        states = [*(x for x, _ in entered), cast(Tensor, state_of(left[-1]))]
    else:
        states = ResidualChain(own.blocks, step=own.step, scheme=own.scheme).trajectory(first)
    _check_states(states, own)
    return Recorded(own, states, call)


def _check_states(states: list[Tensor], stage: Stack) -> None:
    shape = list(states[0].shape)
    if len(shape) < 2 or shape[0] == 0:
        raise InputError(
            f"the states have shape {shape}; expected [samples, …] with at least one sample: give "
            "a batch"
        )
    for n, state in enumerate(states):
        if not state.isfinite().all():
            raise InputError(
                f"state {n} of stage {stage.index} is not finite (NaN or infinite); its distance "
                "to the Neural ODE is not defined: give an x and a model without"
            )


def _check_mode(model: nn.Module) -> None:
    """Whether the model's function is the same in evaluation mode, in which it is examined."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            what = "is in training mode" if module.training else "keeps no running statistics"
            do = "call model.eval() first" if module.training else "give it some"
            raise InputError(
                f"the batch norm {name!r} {what}: it normalises by the batch; the gap is defined "
                f"for the function in evaluation mode: {do}"
            )
        if module.training and _drops(module):
            raise InputError(
                f"{name!r} ({type(module).__name__}) drops at random in training mode; the gap is "
                "defined for the function in evaluation mode: call model.eval() first"
            )


def _drops(module: nn.Module) -> bool:
    """Dropout, dropped paths, attention's own dropout: by the names that all libraries use."""
    own = type(module).__name__.lower()
    names = [k for k in vars(module) if "drop" in k]
    names += ["p"] if "drop" in own or "stochasticdepth" in own else []
    rates = [vars(module).get(name) for name in names]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _described(x: Inputs) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {list(x.shape)}"
    if not isinstance(x, dict):
        return f"a {type(x).__name__}; expected a tensor, or a dict of the model's arguments"
    return ", ".join(f"{name} of shape {list(value.shape)}" for name, value in x.items())
