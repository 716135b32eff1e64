"""Blocks, step, scheme and what adds, as the reading tells them; what looks through it."""

import copy

import pytest
import torch
from smooth_networks import batch, smooth_chain
from torch import Tensor, nn

from deeplimit import InputError, anatomy
from deeplimit.network import Architecture, CifarArchitecture, Euler, Heun, ResidualChain, Scheme
from deeplimit.ode import (
    coarsen,
    discretization_gap,
    refine,
    smoothness,
    tie,
    untie,
    with_solver,
)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.tanh(self.linear(x))


class Loop(nn.Module):
    """The same step again and again, or steps of its own."""

    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        once = len(set(steps)) == 1
        self.steps = nn.ModuleList(steps[:1] if once else steps)
        self.count, self.head = len(steps) // len(self.steps), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.count):
            for step in self.steps:
                x = step(x)
        return self.head(x)


@pytest.mark.parametrize("scheme", [Euler(), Heun()])
def test_a_chain_and_a_classifier_tell_their_blocks_and_steps(scheme: Scheme) -> None:
    chain = smooth_chain(4, scheme)
    (stack,) = anatomy(chain).stacks
    assert (stack.blocks, stack.step, stack.scheme) == (tuple(chain), 0.25, scheme)
    assert (stack.index, stack.layers, stack.adds) == (0, range(4), False)
    name = type(scheme).__name__.lower()
    model = Architecture(
        "convolutional", (1, 8, 8), 3, (2, 0, 3), 4, 4, step=0.5, scheme=name, reduction=1
    ).build()
    stacks = anatomy(model).stacks
    assert [s.blocks for s in stacks] == [tuple(chain) for chain in model.stages]
    assert [s.layers for s in stacks] == [range(2), range(2, 2), range(2, 5)]
    assert {(s.step, s.scheme, s.adds) for s in stacks} == {(0.5, scheme, False)}
    model.head.append(ResidualChain([nn.Linear(3, 3)]))  # one that is no stage
    assert [s.layers for s in anatomy(model).stacks] == [s.layers for s in stacks]
    assert anatomy(model).horizon == 5


def test_blocks_that_add_their_input_have_step_one() -> None:
    structure = anatomy(CifarArchitecture(depths=(2, 3, 2)).build())
    stacks = structure.stacks
    assert tuple(b for s in stacks for b in s.blocks) == structure.blocks
    assert [s.layers for s in stacks] == [range(3), range(3, 6), range(6, 7)]  # to the next stage
    assert {(s.step, s.scheme, s.adds) for s in stacks} == {(1.0, Euler(), True)}
    assert [s.alike().layers for s in stacks] == [range(2), range(3, 5), range(6, 7)]


@pytest.mark.slow
def test_a_wrapped_chain_is_still_a_chain() -> None:
    chain, x = smooth_chain(4), batch()
    gap = discretization_gap(chain, x, bound=False)
    wrapped = discretization_gap(nn.DataParallel(chain), x, bound=False)
    assert wrapped == gap
    assert min(gap.gap[1:]) > 0


@pytest.mark.slow
def test_an_anatomy_is_as_good_as_the_model() -> None:
    chain, x = smooth_chain(4), batch()
    read = anatomy(chain)
    assert smoothness(read) == smoothness(chain)
    assert discretization_gap(read, x, bound=False) == discretization_gap(chain, x, bound=False)
    for change in (refine, coarsen, tie, lambda model, m: with_solver(model, "rk4", m)):
        assert torch.equal(change(read, 2)(x), change(chain, 2)(x))
    assert type(untie(read)) is ResidualChain


def test_the_old_name_of_with_solver_warns() -> None:
    with pytest.warns(DeprecationWarning, match="is called with_solver now"):
        from deeplimit.ode import solved
    assert solved is with_solver


@pytest.mark.slow
def test_one_module_called_again_and_again_has_states_of_its_own() -> None:
    torch.manual_seed(0)
    step, x = Step(), torch.randn(4, 3)
    loop = Loop([step] * 4).eval()
    unrolled = Loop([copy.deepcopy(step) for _ in range(4)]).eval()
    unrolled.head = loop.head
    gap = discretization_gap(loop, x, bound=False)
    assert gap == discretization_gap(unrolled, x, bound=False)
    assert max(gap.gap) > 1e-3
    with pytest.raises(InputError, match="calls of one module"):
        untie(loop)


def test_a_chain_inside_somebodys_network_is_solved_too() -> None:
    torch.manual_seed(0)
    chain, x = smooth_chain(4), batch()
    model = nn.Sequential(nn.Linear(3, 3), chain, nn.Linear(3, 2)).double()
    assert torch.allclose(with_solver(model, "euler", 4)(x), model(x), rtol=0, atol=1e-12)
    fine = model[2](with_solver(chain, "rk4", 40)(model[0](x)))
    assert torch.equal(with_solver(model, "rk4", 40)(x), fine)
    nested = ResidualChain([ResidualChain([nn.Linear(3, 3).double()])], step=0.5)
    assert torch.allclose(with_solver(nested, "euler", 1)(x), nested(x), rtol=0, atol=1e-12)
