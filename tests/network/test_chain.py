"""ResidualChain: its keys, its trajectory, its parts and copies."""

import copy
import pickle

import pytest
import torch
from model_families import shaken
from naive_networks import naive_chain
from torch import Tensor, nn

from deeplimit import Euler, Heun, InputError, ResidualChain
from deeplimit.network import TwoLayerResidual

SCHEMES = [Euler(), Heun()]
Scheme = Euler | Heun


def chain_of(count: int, scheme: Scheme, step: float = 0.3) -> ResidualChain:
    blocks = [TwoLayerResidual(3, 5, "tanh") for _ in range(count)]
    return shaken(ResidualChain(blocks, step=step, scheme=scheme))


def batch() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(9)).double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_keys_are_those_of_the_blocks_in_sequence(scheme: Scheme) -> None:
    chain = chain_of(12, scheme)
    keys = [
        f"{n}.{name}" for n in range(12) for name in ("inner.weight", "inner.bias", "outer.weight")
    ]
    assert list(chain.state_dict()) == keys
    plain = nn.Sequential(*(TwoLayerResidual(3, 5) for _ in range(12))).double()
    plain.load_state_dict(chain.state_dict())
    assert torch.equal(plain[11].outer.weight, chain[11].outer.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("step", [1.0, 0.5, 0.3])
def test_trajectory_is_a_naive_loop(scheme: Scheme, step: float) -> None:
    chain, x = chain_of(6, scheme, step), batch()
    states, naive = chain.trajectory(x), naive_chain(chain, x)
    assert len(states) == chain.horizon + 1 == len(naive)
    assert states[0] is x
    for mine, theirs in zip(states, naive, strict=True):
        # h·φ is exact for h a power of two; else a fused multiply-add may differ in the last bit.
        assert torch.equal(mine, theirs) or step == 0.3
        assert torch.allclose(mine, theirs, rtol=1e-14, atol=1e-15)
    assert torch.equal(chain(x), states[-1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trajectory_is_the_loop_over_the_schemes_steps_to_the_last_bit(scheme: Scheme) -> None:
    chain, x = chain_of(6, scheme), batch()
    state, naive, blocks = x, [x], list(chain)
    for n in range(chain.horizon):
        state = scheme.step(blocks[n : n + scheme.nodes], state, 0.3)
        naive.append(state)
    assert all(map(torch.equal, chain.trajectory(x), naive))


def test_trajectory_is_in_the_graph() -> None:
    chain, x = chain_of(4, Euler()), batch().requires_grad_()
    chain.trajectory(x)[2].sum().backward()
    assert x.grad is not None
    assert chain[1].outer.weight.grad is not None
    assert chain[2].outer.weight.grad is None
    with torch.no_grad():
        assert not chain.trajectory(x)[2].requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
def test_slices_keep_step_scheme_and_mode_and_share_the_blocks(scheme: Scheme) -> None:
    chain = chain_of(7, scheme).eval()
    part = chain[2:6]
    assert type(part) is ResidualChain
    assert (part.step, part.scheme, len(part), part.training) == (0.3, scheme, 4, False)
    assert all(a is b for a, b in zip(part, list(chain)[2:6], strict=True))
    assert isinstance(chain[-1], TwoLayerResidual)
    x = batch()
    head = chain[: 3 + scheme.nodes - 1]
    assert torch.equal(head(x), chain.trajectory(x)[3])
    assert torch.equal(chain[3:](head(x)), chain(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_independent_and_without_the_hooks(copier) -> None:
    chain, x = chain_of(3, Heun()), batch()
    seen: list[int] = []
    with chain.register_state_hook(lambda n, _: seen.append(n)):
        other = copier(chain)
        before = chain(x)
        assert seen == [0, 1, 2]
        assert torch.equal(other(x), before)
        assert seen == [0, 1, 2]  # the copy shows its states to nobody
        assert (other.step, other.scheme, other.horizon) == (0.3, Heun(), 2)
        with torch.no_grad():
            other[0].outer.weight.zero_()
        assert torch.equal(chain(x), before)
        with other.register_state_hook(lambda n, _: seen.append(-n)):
            other(x)
        assert seen == [0, 1, 2, 0, 1, 2, 0, -1, -2]
    chain(x)
    assert len(seen) == 9


def test_state_hooks_see_every_state_and_are_removed() -> None:
    chain, x = chain_of(4, Euler()), batch()
    seen: list[tuple[int, Tensor]] = []
    handle = chain.register_state_hook(lambda n, s: seen.append((n, s)))
    states = chain.trajectory(x)
    assert [n for n, _ in seen] == [0, 1, 2, 3, 4]
    assert all(torch.equal(mine, s) for (_, mine), s in zip(seen, states, strict=True))
    handle.remove()
    chain(x)
    assert len(seen) == 5
    assert not chain._state_hooks


def test_an_exception_leaves_no_hook_behind() -> None:
    chain = chain_of(4, Euler())
    with pytest.raises(RuntimeError):
        chain.trajectory(torch.zeros(2, 5, dtype=torch.float64))
    assert not chain._state_hooks


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kept", range(6))
def test_without_the_tail_the_first_steps_are_as_they_were(scheme: Scheme, kept: int) -> None:
    chain, x = chain_of(5 + scheme.nodes - 1, scheme), batch()
    short = chain.without(range(kept, 5))
    assert short.horizon == kept
    assert len(short) == kept + scheme.nodes - 1
    assert all(map(torch.equal, short.trajectory(x), chain.trajectory(x)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_the_middle_the_ends_are_joined(scheme: Scheme) -> None:
    chain, x = chain_of(8, scheme), batch()
    blocks = list(chain)
    short = chain.without([4, 2, 3])
    # Euler: steps 2, 3, 4 are blocks 2, 3, 4. Heun: their last controls are blocks 3, 4, 5, so
    # that step 2 of the shorter chain joins θ_2 and θ_6.
    gone = {Euler(): {2, 3, 4}, Heun(): {3, 4, 5}}[scheme]
    kept = [block for i, block in enumerate(blocks) if i not in gone]
    assert [id(b) for b in short] == [id(b) for b in kept]
    assert short.horizon == chain.horizon - 3
    assert (short.step, short.scheme) == (0.3, scheme)
    expected = naive_chain(ResidualChain(kept, step=0.3, scheme=scheme), x)
    for mine, theirs in zip(short.trajectory(x), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-14, atol=1e-15)
    assert all(map(torch.equal, short.trajectory(x)[:3], chain.trajectory(x)[:3]))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", [-1, 5, 50])
def test_a_step_that_is_not_there_cannot_be_left_out(scheme: Scheme, n: int) -> None:
    chain = chain_of(5 + scheme.nodes - 1, scheme)
    with pytest.raises(InputError, match=rf"step {n} .* 0 … 4"):
        chain.without([1, n])


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_size_that_is_no_positive_number_is_refused(step: float) -> None:
    with pytest.raises(InputError, match=r"step size is .* positive number"):
        ResidualChain([], step=step)
