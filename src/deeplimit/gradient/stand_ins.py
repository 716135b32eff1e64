"""What stands in a block's own attributes for its forward, and decides how a call is run."""

import inspect
from collections.abc import Callable
from operator import length_hint
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.chain import with_steps
from deeplimit._anatomy.stand_ins import ReplayedBlock, state_of
from deeplimit.errors import InputError
from deeplimit.gradient.engine import Engine
from deeplimit.gradient.learning import FirstRun, Step
from deeplimit.gradient.meter import AdjointError
from deeplimit.gradient.node import Call, Node, inside
from deeplimit.gradient.private_torch import forward_mode, is_fully_sharded, transform
from deeplimit.gradient.replay_context import Arguments


class AdjointForward(ReplayedBlock):
    """What `use_adjoint` puts in place of the forward of a block, or of a chain's step.

    Attributes:
        engine: what it shares with the others.
        step: what it runs.
        aside: whether it was switched back inside what others put around.
    """

    # A compiled graph of what is done here would keep what it must not: it stays outside of graphs.
    run: ClassVar[Callable[..., Any]]

    def __new__(cls, *_: Any) -> "AdjointForward":
        """With the first one torch's compiler is imported, which takes a second: not before."""
        if not hasattr(cls, "run"):
            cls.run = torch.compiler.disable(  # type: ignore[no-untyped-call, unused-ignore]
                cls._run,
                reason="blocks under deeplimit's adjoint run outside of a compiled graph; to have "
                "them compiled: block.forward = torch.compile(block.forward), then "
                "use_adjoint(model)",
            )
        return super().__new__(cls)

    def __init__(self, engine: Engine, step: Step, block: nn.Module):
        super().__init__(block)
        self.engine, self.step, self.aside = engine, step, False
        # Of a chain's step: where a fixed point for its input may start.
        self.start: Callable[[Tensor], Tensor] | None = getattr(block, "inverse_start", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward pass."""
        function, cost = self.own, next(self.running_costs, None)
        if cost is None or not torch.is_grad_enabled():
            return self.run((self.step, function, self.start), args, kwargs)
        several = False  # whether the block returns more than the state, or that in a tuple

        def charging(*args: Any, **kwargs: Any) -> Any:
            nonlocal several
            output = function(*args, **kwargs)
            if not torch.is_grad_enabled():  # while a state is rebuilt
                return output
            several = isinstance(output, tuple)
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            left = cast(Tensor, state_of(output))
            return (*(output if several else (output,)), cost(x, left))

        *output, paid = self.run((self.step, charging, self.start), args, kwargs)
        self.paid.append(paid)
        if paid.requires_grad and is_fully_sharded(self.block):
            # FSDP2 gathers a block's parameters when a gradient reaches its output; of the cost,
            # which it is not shown, it does not know.
            paid.register_hook(self._gather)
        return tuple(output) if several else output[0]

    @property
    def charged(self) -> bool:
        """Whether there are costs for calls to come."""
        return length_hint(self.running_costs) > 0

    def _gather(self, _: Tensor) -> None:
        sharded: Any = self.block
        sharded.unshard()

    def remove(self) -> None:
        """Puts the block's own forward back; inside what others have put around it, steps aside."""
        if vars(self.block).get("forward") is self:
            super().remove()
        else:
            self.step.plain, self.aside = "was switched back", True

    def _run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the step's own function, so that its input need not be kept."""
        engine, (step, function, _) = self.engine, call
        if engine.paused or not torch.is_grad_enabled() or inside.step or step.plain is not None:
            return function(*args, **kwargs)
        if transform() is not None:
            raise AdjointError(
                f"{step.name}: torch.func transforms do not go with the adjoint; call "
                "use_backprop(model) first"
            )
        arguments = Arguments(args, kwargs)
        x = arguments.state
        if x is None or not x.is_floating_point():
            # The end of the backward pass tells, if all blocks are so.
            step.known, step.plain = True, "is given no state, floating-point numbers in a tensor"
            output = function(*args, **kwargs)
            y = state_of(output)
            if not step.inner and y is not None and y.requires_grad:
                engine.meter.refused.append(f"{step.name} {step.plain}")
                y.register_hook(self._look_back)  # type: ignore[no-untyped-call, unused-ignore]
            return output
        if (
            x.is_inference()
            or forward_mode()
            or not (x.requires_grad or _trained(step, arguments))
            or (arguments.more and arguments.filled_cache(step.modules.layer))
        ):
            return function(*args, **kwargs)  # no gradient that could be had by a replay
        if not step.known:
            return self._run_first(call, arguments, x)
        version = x._version
        node = Node(engine, call, arguments, x)
        node.link()
        output = node.run()
        if x._version != version:
            raise AdjointError(
                f"{step.name}: changed its own input in place, which it had not done before; "
                "leave it out of blocks="
            )
        y = state_of(output)
        if y is not None and not y.is_leaf and y.shape == x.shape and y.dtype == x.dtype:
            node.leave(y)
        return output

    def _look_back(self, _: Tensor) -> None:
        self.engine.meter.this_pass(self.engine.settings)  # at its end the meter tells

    def _run_first(self, call: Call, arguments: Arguments, x: Tensor) -> Any:
        """Runs a step of which nothing is known yet, and learns whether it is residual.

        A candidate with others inside it runs as it is; an innermost one under a checkpoint.
        """
        meter, (step, function, _) = self.engine.meter, call
        meter.learnt = True
        first = FirstRun(step, function, x, coded=bool(self.engine.settings.bits))
        node = None
        if not step.inner:
            copy = first.input.detach().clone()  # in case the step edits its input
            node = Node(self.engine, call, arguments, first.input)
            node.link()
        with first.watching():
            if node is None:
                args, kwargs = arguments.at(first.input)
                output = function(*args, **kwargs)
            else:
                output = node.run()
                if first.edited:
                    node.replace_input(copy)
        first.learn(output)
        if step.plain is None:
            meter.residual += 1
            meter.kinked = meter.kinked or first.kinked
            y = state_of(output)
            if node is not None and y is not None:
                node.leave(y)
        elif not step.inner:
            meter.refused.append(f"{step.name} {step.plain}")
        return output


def _trained(step: Step, arguments: Arguments) -> bool:
    """Tells whether a gradient is asked for of something else than the state."""
    return any(t.requires_grad for t in arguments.tensors()) or step.modules.trained()


def switches(model: nn.Module) -> list[AdjointForward]:
    """All that `use_adjoint` put into a model, also where a hook of accelerate's is around it."""
    own = (vars(module).get("forward") for module in with_steps(model))
    found = (inspect.unwrap(function) for function in own if function is not None)
    return [s for s in found if isinstance(s, AdjointForward) and not s.aside]


def engines(model: nn.Module) -> list[Engine]:
    """The engines at work in a model: one, unless parts were switched by themselves.

    Raises:
        InputError: none, since the model is not switched.
    """
    found = list({id(s.engine): s.engine for s in switches(model)}.values())
    if not found:
        raise InputError(f"{type(model).__name__} is not switched; call use_adjoint(model) first")
    return found
