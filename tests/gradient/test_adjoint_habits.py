"""Habits of other people's blocks under the adjoint: tuples of one, dicts, inputs edited."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, StageCost, gradient_error, use_adjoint
from deeplimit.gradient import layout, use_backprop
from deeplimit.gradient.node import Node

WIDTH = 6


class Tower(nn.Module):
    """A stem, blocks that some function calls, a head."""

    def __init__(self, block: type[nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(block() for _ in range(5))
        self.call = call
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: object = None) -> object:
        more = context["v"] if isinstance(context, dict) else 0.0
        return x + 0.1 * torch.tanh(self.linear(x) + more)


class OfOne(Plain):
    def forward(self, x: Tensor) -> object:
        return (super().forward(x),)


class PreActivation(Plain):
    def forward(self, x: Tensor) -> object:
        return super().forward(torch.relu_(x))


class Averaging(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x: Tensor) -> object:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().abs().mean()  # another tensor
        return x + 0.1 * torch.tanh(self.linear(x)) * self.mean


def inputs(samples: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 7])
def test_a_stage_cost_leaves_tuples_of_one_as_they_are(samples: int) -> None:
    plain = StageCost(Tower(OfOne, lambda block, x: block(x)[0]), SoftCrossEntropy(3), 0.3)
    switched = copy.deepcopy(plain)
    use_adjoint(switched.model, evaluations=14)
    x, y = inputs(samples), torch.arange(samples) % 3
    for _ in range(2):
        (expected, logits), (cost, mine) = plain(x, y), switched(x, y)
        assert torch.equal(mine, logits)
        assert cost.item() == pytest.approx(expected.item(), rel=1e-13)
        expected.backward(), cost.backward()
    assert len(layout(switched.model).rebuilt) == 5
    for p, q in zip(plain.parameters(), switched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)


def test_blocks_that_edit_an_input_without_gradient_are_left_plain() -> None:
    plain = Tower(PreActivation, lambda block, x: block(x))
    plain.stem.requires_grad_(False)
    switched = use_adjoint(copy.deepcopy(plain))
    x = inputs()
    for _ in range(2):
        expected, found = plain(x), switched(x)
        assert torch.equal(expected, found)
        expected.sum().backward(), found.sum().backward()
    assert len(layout(switched).plain) == 5
    assert layout(switched).plain["blocks.0"] == "changes its own input in place"
    for p, q in zip(plain.parameters(), switched.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_the_input_that_a_block_edits_is_edited() -> None:
    model = use_adjoint(nn.Sequential(PreActivation(), PreActivation()).double())
    x = inputs()
    expected = x.relu()
    model(x)
    assert torch.equal(x, expected)


def test_buffers_that_a_block_replaces_are_put_back() -> None:
    model = use_adjoint(Tower(Averaging, lambda block, x: block(x)), evaluations=14)
    own = [block.mean for block in model.blocks]
    found = gradient_error(model, lambda m, x: m(x).sin().sum(), inputs())
    assert found.error < 1e-9
    for block, mean in zip(model.blocks, own, strict=True):
        assert block.mean is mean
        assert float(mean) == 1.0


@pytest.mark.parametrize("kind", ["tuple", "mask"])
def test_blocks_without_a_state_are_left_plain_and_said(kind: str) -> None:
    mask = torch.ones(7, 1, dtype=torch.bool)

    class Masked(Plain):
        def forward(self, pair: object = None, mask: object = None, x: object = None) -> object:
            x, seen = pair if kind == "tuple" else (x, mask)
            return super().forward(x) * seen

    calls = {"tuple": lambda b, x: b((x, mask)), "mask": lambda b, x: b(mask=mask, x=x)}
    model = use_adjoint(Tower(Masked, calls[kind]))
    says = r"blocks\.0 is given no state, floating-point numbers in a tensor"
    with pytest.warns(UserWarning, match=says):
        model(inputs()).sum().backward()
    model(inputs()).sum().backward()
    found = layout(model)
    assert found.waiting == ()
    assert set(found.plain) == {f"blocks.{n}" for n in range(5)}


@pytest.mark.slow
def test_a_dict_of_tensors_keeps_no_graph_alive() -> None:
    """A forward pass without a backward one, as of a step that is skipped."""

    def alive() -> int:
        gc.collect()
        return sum(type(one) is Node for one in gc.get_objects())

    class Tied(Tower):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.stem(x), {"v": torch.zeros(())})
            context = {"v": x.sin()}
            for block in self.blocks[1:]:
                x = block(x, context)
            return self.head(x)

    plain = Tied(Plain, lambda block, x: x)
    model = use_adjoint(copy.deepcopy(plain), evaluations=14)
    x, before = inputs(), alive()
    for _ in range(3):
        model(x)
        assert alive() == before
    model(x).sum().backward(), plain(x).sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("wrong", [{"blocks": ["nope"]}, {"anchors": ["nope"]}])
def test_what_is_refused_leaves_the_model_switched_as_it_was(wrong: dict[str, list[str]]) -> None:
    model = use_adjoint(Tower(Plain, lambda block, x: block(x)), evaluations=3)
    before = [block.forward for block in model.blocks]
    with pytest.raises(InputError, match="nope"):
        use_adjoint(model, **wrong)
    assert [block.forward for block in model.blocks] == before


@pytest.mark.slow
def test_a_compiled_function_in_a_block_stays_compiled() -> None:
    runs = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def run(*args: object) -> object:
            nonlocal runs
            runs += 1
            return graph.forward(*args)

        return run

    bent = torch.compile(lambda x: 0.1 * torch.tanh(x), backend=backend)

    class Compiled(Plain):
        def forward(self, x: Tensor) -> object:
            return x + bent(self.linear(x))

    model = use_adjoint(Tower(Compiled, lambda block, x: block(x)))
    counts = []
    for switch in (lambda: None, lambda: None, lambda: use_backprop(model)):
        switch()
        runs = 0
        model(inputs()).sin().sum().backward()
        counts.append(runs)
    assert counts[0] >= 5
    assert counts[1] >= 10  # forward, and at least once more in the backward pass
    assert counts[2] == 5
