"""Learning what a block is: whether it adds its input, and what else its first run shows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from deeplimit._anatomy.stand_ins import state_of
from deeplimit.gradient.private_torch import TorchDispatchMode, is_compiled
from deeplimit.gradient.replay_context import Modules

# Operations that hand one of their inputs on as it is: by form, by type, or through an addition
# or a last activation. The inputs that they hand on.
PASSES: dict[str, tuple[int, ...] | None] = {
    "AddBackward0": None,
    "AddcmulBackward0": (0,),
    "SubBackward0": (0,),
    "AliasBackward0": (0,),
    "CloneBackward0": (0,),
    "ContiguousBackward0": (0,),
    "HardtanhBackward0": (0,),
    "PermuteBackward0": (0,),
    "ReluBackward0": (0,),
    "ReshapeAliasBackward0": (0,),
    "SqueezeBackward1": (0,),
    "ToCopyBackward0": (0,),
    "TransposeBackward0": (0,),
    "UnsafeViewBackward0": (0,),
    "UnsqueezeBackward0": (0,),
    "ViewBackward0": (0,),
    "BackwardHookFunctionBackward": None,
}
COMPILED = "CompiledFunctionBackward"

Edge = tuple[Any, int]  # a node of autograd's graph, and which of its outputs

# Operations whose derivative jumps somewhere.
KINKS = (
    "AbsBackward", "AdaptiveMaxPool", "AmaxBackward", "AminBackward", "ClampBackward", "ClampM",
    "CummaxBackward", "EluBackward", "FmaxBackward", "FminBackward", "FractionalMaxPool",
    "HardshrinkBackward", "HardsigmoidBackward", "HardswishBackward", "HardtanhBackward",
    "LeakyReluBackward", "MaxBackward", "MaxPool", "MaximumBackward", "MedianBackward",
    "MinBackward", "MinimumBackward", "PreluKernelBackward", "ReluBackward", "RreluWithNoise",
    "SortBackward", "SoftshrinkBackward", "ThresholdBackward", "TopkBackward", "WhereBackward",
    COMPILED,  # nobody can see what is inside
)  # fmt: skip


@dataclass
class Step:
    """One block of a model, or one step of a chain, and what has been learnt of it.

    Attributes:
        name: its path in the model.
        modules: what it consists of.
        inner: candidates inside it, which are preferred if they turn out to be residual.
        named: chosen by the user, or a step of our own chain: residual by definition.
        plain: why it is run as it is; None as long as nothing speaks against the adjoint.
        adds: whether it adds its input to its output, once that is known.
        known: whether it has run once with gradients.
        data_dependent_shape: whether shapes in it depend on numbers, so that its input is kept.
        linked: whether it was linked to another.
        size: numbers in its state, and bytes of each, when it last ran.
    """

    name: str
    modules: Modules
    inner: tuple["Step", ...] = ()
    named: bool = False
    plain: str | None = None
    adds: bool = True
    known: bool = False
    data_dependent_shape: bool = False
    linked: bool = False
    size: tuple[int, int] = (0, 0)

    @staticmethod
    def of(name: str, *roots: nn.Module, **settings: Any) -> "Step":
        """The step that consists of these modules."""
        return Step(name, Modules(roots), **settings)


class FirstRun:
    """Looks at the first run of a step with gradients, and learns from it.

    Attributes:
        input: what the step is to be given in place of x: the graph of one without a gradient
            would not show the way through.
        kinked: whether the step is not differentiable everywhere.
        coded: whether states are coded, for which a block need not add its input.
    """

    def __init__(self, step: Step, function: Any, x: Tensor, *, coded: bool):
        self.step, self._x, self.coded = step, x, coded
        self.input = x
        if not step.named and not x.requires_grad:
            self.input = x.detach().requires_grad_().clone()  # a leaf could not be edited in place
        self._version = self.input._version
        self._seen = Operations()
        self.kinked = False
        # A compiled function would be given up for good where a mode looks at what it does.
        self._watched = not (is_compiled(function) or step.modules.compiled())

    def watching(self) -> AbstractContextManager[Any]:
        """Around the run."""
        return self._seen if self._watched else nullcontext()

    @property
    def edited(self) -> bool:
        """Whether the step has changed its own input in place."""
        return self.input._version != self._version

    def learn(self, output: Any) -> None:
        """Says of the step what its output, and the graph behind it, tell."""
        step, x = self.step, self._x
        if self.edited and self.input is not x:
            with torch.no_grad():
                x.copy_(self.input)  # as the step would have done to its own input
        # Of a mapping nothing says that what comes first is the state.
        y = None if isinstance(output, Mapping) else state_of(output)
        step.known = True
        inner = [s for s in step.inner if s.known and s.plain is None]
        step.adds = step.named or (y is not None and adds_input(y, self.input))
        # Parts that add nothing are preferred only if they are a chain, and no branch of a block.
        own = [s for s in inner if s.adds or (s.linked and not step.adds)]
        if own:
            step.plain = f"holds {'residual' if own[0].adds else 'linked'} blocks of its own"
            step.plain += f" ({own[0].name}, …)"
        elif y is None or y.shape != x.shape or y.dtype != x.dtype:
            was = "no tensor" if y is None else f"{tuple(y.shape)}, {y.dtype}"
            step.plain = f"turns a state {tuple(x.shape)}, {x.dtype} into {was}"
        elif self.edited:
            step.plain = "changes its own input in place"
        elif not (step.adds or self.coded):
            step.plain = "does not add its input to its output: not a residual block"
        else:
            for part in inner:
                part.plain = f"is part of {step.name}"
            step.data_dependent_shape = self._seen.data_dependent_shape
            self.kinked = bool(step.inner) or self._seen.compared or has_kinks(y, self.input)


def adds_input(y: Tensor, x: Tensor) -> bool:
    """Tells whether some way through the graph from y to x passes additions only: y = x + ….

    A block that is compiled as a whole is taken at its word.
    """
    if y is x:
        return True
    if y.grad_fn is None or not x.requires_grad:
        return False
    goal = tuple(get_gradient_edge(x))[:2]
    return any(edge == goal or edge[0].name() == COMPILED for edge in _behind(y, _handed_on))


def _handed_on(node: Any) -> Iterator[Edge]:
    """Where a node's output is, as it is, one of its inputs."""
    passed, following = PASSES.get(node.name(), ()), node.next_functions
    yield from following if passed is None else (following[i] for i in passed)


def has_kinks(y: Tensor, x: Tensor) -> bool:
    """Tells whether some operation between x and y has a derivative that jumps."""
    end = get_gradient_edge(x).node if x.requires_grad else None
    within = _behind(y, lambda node: [e for e in node.next_functions if e[0] != end])
    return any(node != end and node.name().startswith(KINKS) for node, _ in within)


def _behind(y: Tensor, following: Callable[[Any], Iterable[Edge]]) -> Iterator[Edge]:
    """Walks back through the graph of y: its nodes, each with those of its outputs that count."""
    waiting: list[Edge] = [(y.grad_fn, y.output_nr)]
    seen = set()
    while waiting:
        edge = waiting.pop()
        if edge[0] is not None and edge not in seen:
            seen.add(edge)
            yield edge
            waiting += following(edge[0])


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Sees while it is entered what the graph does not show.

    Attributes:
        compared: whether numbers were compared, as in x·(x > 0): a kink.
        data_dependent_shape: whether the shape of something depended on numbers, as where a router
            sends tokens to experts. From a rebuilt state, near the true one, it may be another.
    """

    COMPARING = ("gt", "ge", "lt", "le", "sign", "heaviside", "floor", "round", "argmax", "argmin")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.compared = self.data_dependent_shape = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Or functions compiled elsewhere would be given up for good where they are met here."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        _: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation, and looks at what it is."""
        if func.overloadpacket.__name__.rstrip("_") in self.COMPARING:
            numbers = (a for a in args if isinstance(a, Tensor) and a.dim() > 0)
            self.compared = self.compared or any(a.is_floating_point() for a in numbers)
        if torch.Tag.dynamic_output_shape in func.tags:
            # Of the ways to index only that by a mask depends on numbers.
            indexed = func.overloadpacket.__name__ == "index"
            masks = not indexed or any(t is not None and t.dtype == torch.bool for t in args[1])
            self.data_dependent_shape = self.data_dependent_shape or masks
        return func(*args, **(kwargs or {}))
