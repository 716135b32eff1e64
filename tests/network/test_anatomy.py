"""One conformance suite for all anatomies, and what a new family needs."""

import copy

import pytest
import torch
from model_families import Sample, sample
from naive_networks import naive_carry, naive_logits, naive_walk
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit import Heun, InputError, ResidualChain
from deeplimit._anatomy import Layer
from deeplimit._anatomy.read_model import FAMILIES
from deeplimit.network import Anatomy, CifarResNet, anatomy, register


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_states_are_those_of_the_naive_walk(family: Sample, training: bool) -> None:
    model = family.model.train(training)
    walk, naive = naive_walk(copy.deepcopy(model), family.x)
    structure = anatomy(model)
    states, logits = structure.states(family.x)
    assert structure.horizon == family.depth == len(walk) - 1
    assert structure.state_stages == tuple(stage for stage, _ in walk)
    assert len(states) == len(walk)
    for mine, (_, theirs) in zip(states, walk, strict=True):
        assert close(mine, theirs)
    assert close(logits, naive)
    # Every layer does something here, or the comparison would prove little.
    for n in range(len(states) - 1):
        assert states[n].shape != states[n + 1].shape or not close(states[n], states[n + 1], 1e-3)


def test_states_are_the_models_own_forward(family: Sample) -> None:
    model = family.model.eval()
    structure = anatomy(model)
    states, logits = structure.states(family.x)
    assert torch.equal(logits, model(family.x))
    assert torch.equal(structure.head(states[-1]), logits)
    assert not model._forward_hooks
    with structure.recording() as twice:
        model(family.x)
        model(family.x)
    assert len(twice) == 2 * len(states)
    model(family.x)
    assert len(twice) == 2 * len(states)


def test_states_are_in_the_graph(family: Sample) -> None:
    structure = anatomy(family.model)
    states, logits = structure.states(family.x)
    (gradient,) = torch.autograd.grad(logits.sum(), states[-1], retain_graph=True)
    assert gradient.abs().max() > 0
    first = next(p for p in structure.control(0))
    grads = torch.autograd.grad(states[-1].square().sum(), first)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_stacked_logits_are_those_one_by_one(family: Sample, training: bool) -> None:
    model = family.model.train(training)
    structure = anatomy(model)
    states, _ = structure.states(family.x)
    before, modes_before = buffers(model), modes(model)
    stacked = structure.logits(states)
    assert stacked.shape == (family.depth + 1, len(family.x), 4)
    for n, (stage, state) in enumerate(zip(structure.state_stages, states, strict=True)):
        assert close(stacked[n], naive_logits(model, stage, state))
    assert modes(model) == modes_before
    after = buffers(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 2), (2, 1), (1, 3)])
def test_logits_of_some_of_the_states(family: Sample, first: int, count: int) -> None:
    structure = anatomy(family.model)
    states, _ = structure.states(family.x)
    some = states[first : first + count]
    every = structure.logits(states)
    assert close(structure.logits(some, first=first), every[first : first + count])


def test_of_states_there_are_as_many_numbers_as_states() -> None:
    """What has none would be left out of the answer, or divided among the others."""
    structure = anatomy(ResidualChain([nn.Linear(3, 3) for _ in range(3)], step=1.0))
    states, _ = structure.states(torch.randn(2, 3))
    with pytest.raises(ValueError, match="zip"):
        structure.logits(states, first=[0, 1])


def test_gradients_of_stacked_logits_are_those_one_by_one(family: Sample) -> None:
    model = family.model
    structure = anatomy(model)
    states, _ = structure.states(family.x)
    stages = structure.state_stages
    one_by_one = [naive_logits(model, m, s) for m, s in zip(stages, states, strict=True)]
    weights = torch.linspace(-1, 1, len(states), dtype=torch.float64)
    parameters = list(model.parameters())

    def gradients(z: Tensor) -> tuple[Tensor | None, ...]:
        total = (z.square().sum((1, 2)) * weights).sum()
        return torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)

    fast, slow = gradients(structure.logits(states)), gradients(torch.stack(one_by_one))
    for mine, theirs in zip(fast, slow, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or close(mine, theirs, 1e-11)


def test_a_state_is_carried_through_the_projections_alone(family: Sample) -> None:
    structure = anatomy(family.model)
    states, _ = structure.states(family.x)
    before = buffers(family.model)
    for n in range(family.depth):
        stage, after = structure.state_stages[n], structure.state_stages[n + 1]
        expected = states[n]
        for m in range(stage, after):
            expected = naive_carry(family.model, m, expected)
        carried = structure.carried(n, states[n])
        assert close(carried, expected)
        assert carried.shape == states[n + 1].shape
    after_all = buffers(family.model)
    assert all(torch.equal(before[name], after_all[name]) for name in before)


def test_layers_vanish_with_their_controls(family: Sample) -> None:
    """θ_n = 0 leaves the state alone (past the shortcut, where the stage changes)."""
    model = family.model.eval()
    structure = anatomy(model)
    with torch.no_grad():
        for theta in structure.controls:
            theta.zero_()
    states, _ = structure.states(family.x)
    for n in range(family.depth):
        assert close(structure.carried(n, states[n]), states[n + 1])


def test_controls_are_each_counted_once_and_belong_to_the_layers(family: Sample) -> None:
    structure = anatomy(family.model)
    controls = structure.controls
    assert len({id(p) for p in controls}) == len(controls)
    own = {id(p) for n in range(family.depth) for p in structure.control(n)}
    assert own == {id(p) for p in controls}
    model = family.model
    names = {id(p): name for name, p in model.named_parameters()}
    last = {name.rsplit(".", 2)[-2] for name in (names[id(p)] for p in controls)}
    if isinstance(model, CifarResNet):
        assert last == {"bn2"}
    elif "batch" in family.name or "group" in family.name:
        assert last == {"norm2"}
    else:
        chains = [model] if isinstance(model, ResidualChain) else model.stages
        assert own == {id(p) for chain in chains for p in chain.parameters()}


def test_neighbouring_heun_layers_share_a_control() -> None:
    structure = anatomy(sample("chain, Heun").model)
    blocks = list(structure.model)
    assert [layer.controls for layer in structure.layers] == [
        (blocks[n], blocks[n + 1]) for n in range(4)
    ]


@pytest.mark.parametrize("training", [True, False])
def test_without_is_an_independent_copy_in_the_same_modes(family: Sample, training: bool) -> None:
    model = family.model.train(training)
    weights = copy.deepcopy(model.state_dict())
    smaller = anatomy(model).without([0])
    assert type(smaller) is type(model)
    assert anatomy(smaller).horizon == family.depth - 1
    assert {m.training for m in smaller.modules()} == {training}
    with torch.no_grad():
        for tensor in (*smaller.parameters(), *smaller.buffers()):
            tensor.zero_()
    assert all(torch.equal(weights[key], model.state_dict()[key]) for key in weights)
    if not isinstance(model, ResidualChain):
        assert sum(smaller.architecture.depths) == family.depth - 1
        rebuilt = smaller.architecture.build().double()
        assert list(rebuilt.state_dict()) == list(smaller.state_dict())


@pytest.mark.slow
def test_without_a_layer_its_neighbours_remain(family: Sample) -> None:
    """Each layer in turn: the states before it are the same, all behind follow the naive walk."""
    model = family.model.eval()
    states, _ = anatomy(model).states(family.x)
    for n in range(family.depth):
        smaller = anatomy(model).without([n])
        others, logits = anatomy(smaller).states(family.x)
        walk, naive = naive_walk(smaller, family.x)
        # With the first block of a stage, or a Heun control, the state before the gap may be gone.
        assert all(map(torch.equal, states[:n], others[:n]))
        assert all(close(mine, theirs) for mine, (_, theirs) in zip(others, walk, strict=True))
        assert close(logits, naive)


def test_layers_that_are_not_there_cannot_be_removed(family: Sample) -> None:
    structure = anatomy(family.model)
    for n in (-1, family.depth):
        with pytest.raises(InputError, match=rf"layer {n} .* 0 … {family.depth - 1}"):
            structure.without([n])


def test_the_parts_can_be_printed(family: Sample) -> None:
    text = str(anatomy(family.model))
    assert text.startswith(f"{type(family.model).__name__}: {family.depth} layers")
    assert f"… {family.depth - 1}" in text


def test_logits_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        anatomy(sample("chain").model).logits([])


def test_models_without_layers_are_told_what_was_looked_for() -> None:
    says = r"no stack of blocks in Linear: expected a ModuleList or Sequential .* first output$"
    with pytest.raises(InputError, match=says):
        anatomy(nn.Linear(2, 2))


def test_a_subclass_is_read_by_its_nearest_family() -> None:
    class Mine(ResidualChain):
        pass

    assert type(anatomy(Mine([]))) is type(anatomy(ResidualChain([])))


class Recurrent(nn.Module):
    """Somebody's own model: one stem, residual functions in a list, a head.

    Its blocks do not return the state, which is why its own forward does not tell the layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classify = nn.Linear(3, 4), nn.Linear(4, 2)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.body:
            x = x + block(x)
        return self.classify(x)


class RecurrentAnatomy(Anatomy):
    stages = 1

    @property
    def layers(self) -> tuple[Layer, ...]:
        last = len(self.model.body) - 1
        return tuple(Layer(0, (b,), removable=n < last) for n, b in enumerate(self.model.body))

    def register_state_hook(self, hook) -> list[RemovableHandle]:
        parts = [*self.model.body, self.model.classify]
        return [
            part.register_forward_pre_hook(lambda _, args, n=n: hook(n, args[0]))
            for n, part in enumerate(parts)
        ]

    def carry(self, stage: int, x: Tensor) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.model.classify(x)

    def leave_out(self, removed: set[int]) -> nn.Module:
        smaller = copy.copy(self.model)
        smaller._modules = dict(self.model._modules)
        smaller.body = nn.ModuleList(b for n, b in enumerate(self.model.body) if n not in removed)
        return copy.deepcopy(smaller)


def test_somebodys_own_family_takes_one_small_class(monkeypatch) -> None:
    monkeypatch.delitem(FAMILIES, Recurrent, raising=False)
    torch.manual_seed(0)
    model = Recurrent().double()
    with pytest.raises(InputError, match="logits of its last state differ from its own by"):
        anatomy(model)
    assert register(Recurrent)(RecurrentAnatomy) is RecurrentAnatomy
    try:
        structure, x = anatomy(model), torch.randn(5, 3).double()
        states, logits = structure.states(x)
        state, naive = model.embed(x), []
        for block in model.body:
            naive.append(state)
            state = state + block(state)
        assert all(map(torch.equal, states, [*naive, state]))
        assert torch.equal(logits, model.classify(state))
        assert close(structure.logits(states)[2], model.classify(naive[2]))
        assert structure.fixed == (5,)
        assert "cannot be removed: layers 5" in str(structure)
        with pytest.raises(InputError, match="layer 5 cannot be removed: Recurrent needs it"):
            structure.without([4, 5])
        smaller = structure.without([1, 2])
        assert len(smaller.body) == 4
        assert len(model.body) == 6
        assert torch.equal(anatomy(smaller).states(x)[0][1], states[1])
    finally:
        del FAMILIES[Recurrent]


def test_heun_is_still_heun_when_cut() -> None:
    smaller = anatomy(sample("logit, Heun, with a stem").model).without([3])
    assert smaller.stages[0].scheme == Heun()
    assert smaller.architecture.scheme == "heun"
    assert smaller.architecture.depths == (3,)
