"""Whether a block adds its input to its output, read off the graph."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

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

# Operations whose derivative jumps somewhere.
KINKS = (
    "AbsBackward",
    "AdaptiveMaxPool",
    "AmaxBackward",
    "AminBackward",
    "ClampBackward",
    "ClampM",
    "CummaxBackward",
    "EluBackward",
    "FmaxBackward",
    "FminBackward",
    "FractionalMaxPool",
    "HardshrinkBackward",
    "HardsigmoidBackward",
    "HardswishBackward",
    "HardtanhBackward",
    "LeakyReluBackward",
    "MaxBackward",
    "MaxPool",
    "MaximumBackward",
    "MedianBackward",
    "MinBackward",
    "MinimumBackward",
    "PreluKernelBackward",
    "ReluBackward",
    "RreluWithNoise",
    "SortBackward",
    "SoftshrinkBackward",
    "ThresholdBackward",
    "TopkBackward",
    "WhereBackward",
    COMPILED,  # nobody can see what is inside
)


def adds_input(y: Tensor, x: Tensor) -> bool:
    """Whether some way through the graph from y to x passes additions only: y = x + ….

    A block that is compiled as a whole is taken at its word.
    """
    if y is x:
        return True
    if y.grad_fn is None or not x.requires_grad:
        return False
    goal = get_gradient_edge(x)
    waiting: list[tuple[Any, int]] = [(y.grad_fn, y.output_nr)]
    seen = set()
    while waiting:
        node, output = waiting.pop()
        if node is None or node in seen:
            continue
        if node == goal.node and output == goal.output_nr:
            return True
        seen.add(node)
        name = node.name()
        if name == COMPILED:
            return True
        if name in PASSES:
            passed = PASSES[name]
            following = node.next_functions
            waiting += following if passed is None else [following[i] for i in passed]
    return False


def has_kinks(y: Tensor, x: Tensor) -> bool:
    """Whether some operation between x and y has a derivative that jumps."""
    end = get_gradient_edge(x).node if x.requires_grad else None
    waiting, seen = [y.grad_fn], {end}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith(KINKS):
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


class Operations(TorchDispatchMode):
    """Sees while it is entered what the graph does not show.

    Attributes:
        compared: whether numbers were compared, as in x·(x > 0): a kink.
        sorted: whether the shape of something depended on numbers, as where a router sends tokens
            to experts. From a rebuilt state, near the true one, it may have another shape.
    """

    COMPARING = ("gt", "ge", "lt", "le", "sign", "heaviside", "floor", "round", "argmax", "argmin")

    def __init__(self) -> None:
        super().__init__()
        self.compared = self.sorted = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Or functions compiled elsewhere would be given up for good where they are met here."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
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
            self.sorted = (
                self.sorted
                or not indexed
                or any(t is not None and t.dtype == torch.bool for t in args[1])
            )
        return func(*args, **(kwargs or {}))


def is_compiled(function: Any) -> bool:
    """Whether a function is what torch.compile made of another."""
    return getattr(function, "_torchdynamo_orig_callable", None) is not None
