"""torch.compile around, on and inside switched blocks; torch.func transforms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_references import (
    DEPTH,
    exact_gradients,
    gradients,
    inputs,
    loss_of,
    relative_error,
    tower,
)
from torch import Tensor, nn

from deeplimit import use_adjoint, use_backprop
from deeplimit.gradient import AdjointError, layout


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def whole_in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def whole(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)


def each_in_place(model: nn.Module, backend: Any) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def each(model: nn.Module, backend: Any) -> nn.Module:
    for n, block in enumerate(model.blocks):
        model.blocks[n] = torch.compile(block, backend=backend)
    return model


def each_forward(model: nn.Module, backend: Any) -> nn.Module:
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    return model


def each_residual(model: nn.Module, backend: Any) -> nn.Module:
    for block in model.blocks:
        block.residual = torch.compile(block.residual, backend=backend)
    return model


# The default backend without its C++ compiler: differentiates and saves as that does.
BACKEND = "aot_eager"

Compile = Callable[[nn.Module, Any], nn.Module]


class Graphs:
    """A backend that counts the runs of compiled graphs with a tanh in them: a block's."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        block = any("tanh" in str(node.target) for node in graph.graph.nodes)

        def run(*args: Tensor) -> Any:
            self.runs += block
            return graph.forward(*args)

        return run


def check(compiled: nn.Module, model: nn.Module, limit: float = 1e-6) -> None:
    """Several steps of a compiled and switched model against plain backpropagation."""
    for step in range(2):
        x = inputs(step)
        loss, exact = exact_gradients(tower(), x)
        loss_now, found = gradients(compiled, x)
        found = {name.replace("_orig_mod.", ""): g for name, g in found.items()}
        assert abs(float(loss_now - loss)) < 1e-12
        assert 0 < relative_error(found, exact) < limit
        assert len(layout(model).rebuilt) == DEPTH


@pytest.mark.slow
@pytest.mark.parametrize("compiles", [whole, whole_in_place, each, each_in_place, each_residual])
def test_compiled_after_the_switch(compiles: Compile) -> None:
    model = use_adjoint(tower(), evaluations=6, on_drift="ignore")
    check(compiles(model, BACKEND), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiles", [whole, whole_in_place, each, each_in_place, each_forward, each_residual]
)
def test_compiled_before_the_switch(compiles: Compile) -> None:
    model = tower()
    compiled = compiles(model, BACKEND)
    use_adjoint(model, evaluations=6, on_drift="ignore")
    check(compiled, model)


@pytest.mark.slow
@pytest.mark.parametrize("compiles", [each, each_forward, each_residual])
def test_ways_in_which_blocks_are_compiled(compiles: Compile) -> None:
    graphs = Graphs()
    model = compiles(tower(), graphs)
    use_adjoint(model, evaluations=2, on_drift="ignore")
    gradients(model, inputs())
    before = graphs.runs
    gradients(model, inputs())
    # The forward passes, their replays, and one more for each state that is rebuilt.
    assert graphs.runs - before == 2 * DEPTH + (DEPTH - 2)


def test_a_full_graph_is_refused_with_the_way_that_works() -> None:
    model = use_adjoint(tower(), on_drift="ignore")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"block\.forward = torch\.compile\(block\.forward\)"):
        compiled(inputs())


def test_backprop_puts_a_compiled_forward_back() -> None:
    model = each_forward(tower(), "eager")
    compiled = [block.forward for block in model.blocks]
    use_backprop(use_adjoint(model))
    assert [block.forward for block in model.blocks] == compiled


def parameters_of(model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    return {name: factor * p.detach() for name, p in model.named_parameters()}


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(
        lambda p: torch.func.functional_call(m, p, x).square().mean()
    )(parameters_of(m)),
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "vjp": lambda m, x: torch.func.vjp(m, x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused(name: str) -> None:
    model, x = tower(), inputs()
    TRANSFORMS[name](model, x)
    use_adjoint(model)
    with pytest.raises(AdjointError, match=r"torch\.func transforms do not go with the adjoint"):
        TRANSFORMS[name](model, x)
    TRANSFORMS[name](use_backprop(model), x)


class Backward(nn.Module):
    """A forward and a backward pass in one call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(self.model, x), list(self.model.parameters()))


def test_functional_call_around_both_passes_is_right_and_around_one_is_an_error() -> None:
    model, x = tower(), inputs()
    others = {f"model.{n}": p.requires_grad_() for n, p in parameters_of(model, 1.1).items()}
    exact = torch.func.functional_call(Backward(model), others, x)
    use_adjoint(model, evaluations=8, on_drift="ignore")
    found = torch.func.functional_call(Backward(model), others, x)
    names = list(others)
    error = relative_error(
        dict(zip(names, found, strict=True)), dict(zip(names, exact, strict=True))
    )
    assert 0 < error < 1e-6
    inside = {name.removeprefix("model."): p for name, p in others.items()}
    loss = torch.func.functional_call(model, inside, x).sum()
    with pytest.raises(AdjointError, match="functional_call around both"):
        loss.backward()
