"""refine and coarsen: controls by hand, orders in N, there and back again, what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, sample, shaken
from smooth_networks import MAKERS, WIDTH, Folded, TanhBlock, batch, folded, slope
from smooth_networks import smooth_chain as chain_of
from torch import Tensor, nn

from deeplimit import InputError, use_adjoint
from deeplimit.network import (
    Architecture,
    CifarArchitecture,
    CifarResNet,
    Heun,
    LinearResidual,
    ResidualChain,
    TwoLayerResidual,
    anatomy,
    load,
    save,
)
from deeplimit.ode import coarsen, discretization_gap, refine, tie

CHANGEABLE = [name for name in FAMILIES if name != "CIFAR ResNet, cut"]


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def naive(theta: list[Tensor], m: int, nodes: int) -> list[Tensor]:
    """Interpolated controls, one number after the other."""
    fine = []
    horizon = len(theta) - nodes + 1
    for k in range(m * horizon + nodes - 1):
        n, j = divmod(k, m)
        right = theta[min(n + 1, len(theta) - 1)]
        fine.append((1 - j / m) * theta[n] + j / m * right)
    return fine


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_controls_are_interpolated_and_the_step_shrinks(kind: str, m: int) -> None:
    model = MAKERS[kind](4)
    before = copy.deepcopy(model.state_dict())
    fine = refine(model, m)
    blocks, finer = (list(getattr(f, "blocks", f)) for f in (model, fine))
    for name, _ in blocks[0].named_parameters():
        theta = [block.get_parameter(name).detach() for block in blocks]
        expected = naive(theta, m, 2 if kind == "Heun" else 1)
        if kind == "folded" and name.startswith("outer"):
            expected = [value / m for value in expected]
        for block, value in zip(finer, expected, strict=True):
            assert torch.allclose(block.get_parameter(name), value, rtol=1e-15, atol=1e-15)
    if kind != "folded":
        assert fine.step == 1 / 4 / m
        assert (fine.horizon, fine.scheme) == (4 * m, model.scheme)
    with torch.no_grad():  # independent of the model given
        for p in fine.parameters():
            p.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_the_output_changes_by_the_order_of_the_scheme(kind: str) -> None:
    depths, x = (8, 16, 32, 64), batch()
    errors = []
    for n in depths:
        model = MAKERS[kind](n)
        y = output(model, x)
        errors.append(float((output(refine(model, 2), x) - y).norm() / y.norm()))
    assert slope(depths, errors) == pytest.approx(-2 if kind == "Heun" else -1, abs=0.2)
    assert errors[-1] < 0.02


def test_copied_controls_would_lose_an_order() -> None:
    """The reference that interpolation is better than: each control twice."""
    depths, x, errors = (8, 16, 32, 64), batch(), []
    for n in depths:
        model = chain_of(n, Heun())
        copied = ResidualChain(
            [model[k // 2] for k in range(2 * n + 1)], step=1 / (2 * n), scheme=Heun()
        )
        errors.append(float((output(copied, x) - output(model, x)).norm()))
    assert slope(depths, errors) == pytest.approx(-1, abs=0.2)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(CHANGEABLE),
    st.integers(1, 6),
    st.integers(0, 5),
)
def test_coarsen_after_refine_is_the_identity(name: str, m: int, seed: int) -> None:
    model = sample(name, seed).model
    back = coarsen(refine(model, m), m)
    same(back, model, exactly=m in (1, 2, 4) or not name.startswith("CIFAR"))


def same(back: nn.Module, model: nn.Module, *, exactly: bool) -> None:
    """The same class and architecture, parameters, buffers, modes."""
    assert type(back) is type(model)
    ours, theirs = back.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        tolerance = 0 if exactly else 3e-16
        assert torch.allclose(ours[key], value, rtol=tolerance, atol=0), key
    for mine, other in zip(back.modules(), model.modules(), strict=True):
        assert mine.training == other.training
    if isinstance(model, ResidualChain):
        assert back.step == pytest.approx(model.step, rel=3e-16)
    else:
        settings, expected = back.architecture.to_dict(), model.architecture.to_dict()
        assert settings.pop("step", 1.0) == pytest.approx(expected.pop("step", 1.0), rel=3e-16)
        assert settings == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CHANGEABLE if not n.startswith("chain")])
def test_saved_and_loaded_it_is_the_same_network(name: str, tmp_path: Path) -> None:
    """The architecture beside the weights says the new depths and the new step."""
    found = sample(name)
    if isinstance(found.model, CifarResNet):  # whose figures are in the architecture
        found.model.standardise(torch.full((3,), 0.5), torch.full((3,), 0.25))
    fine = refine(found.model, 2).eval()
    loaded = load(save(fine, tmp_path / "fine.safetensors"))
    assert torch.equal(output(loaded, found.x), output(fine, found.x))
    assert not torch.allclose(output(fine, found.x), output(found.model.eval(), found.x))
    halves = coarsen(fine, 2)
    assert torch.equal(output(halves, found.x), output(found.model, found.x))


def test_statistics_of_norms_are_interpolated_and_counters_copied() -> None:
    model = sample("convolutional, batch").model
    fine = refine(model, 2)
    for name in ("norm1.running_mean", "norm2.running_var"):
        theta = [block.get_buffer(name) for block in model.stages[0]]
        expected = naive(theta, 2, 1)
        for block, value in zip(fine.stages[0], expected, strict=True):
            assert torch.allclose(block.get_buffer(name), value, rtol=1e-15)
    assert {int(block.norm1.num_batches_tracked) for block in fine.stages[0]} == {7}


def test_a_stage_of_one_layer_goes_with_the_others() -> None:
    """All chains of a classifier have one step; the layer is repeated."""
    model = sample("three stages, batch").model  # 2, 1, 2 layers
    fine = refine(model, 2)
    assert fine.architecture.depths == (4, 2, 4)
    assert {chain.step for chain in fine.stages} == {0.2} == {fine.architecture.step}
    for block in fine.stages[1]:
        assert torch.equal(block.conv1.weight, model.stages[1][0].conv1.weight)


@pytest.mark.slow
def test_blocks_that_change_the_shape_stay() -> None:
    model = shaken(CifarResNet(CifarArchitecture((2, 3, 3), (True, True), 4)))
    fine = refine(model, 2)
    assert fine.architecture.depths == (4, 5, 5)
    for m in (1, 2):
        old, new = model.stages[m], fine.stages[m]
        assert torch.equal(new[0].bn2.weight, old[0].bn2.weight)
        assert torch.equal(new[1].bn2.weight, old[1].bn2.weight / 2)
        assert torch.equal(new[1].conv1.weight, old[1].conv1.weight)
        mean = (old[1].bn1.running_mean + old[2].bn1.running_mean) / 2
        assert torch.allclose(new[2].bn1.running_mean, mean, rtol=1e-15)
    back = coarsen(fine, 2)
    assert back.architecture == model.architecture
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(output(back.eval(), x), output(model.eval(), x))


@pytest.mark.slow
def test_mode_precision_and_requires_grad_stay() -> None:
    model = folded(4).float().eval()
    model.blocks[0].inner.train()
    model.blocks[1].inner.weight.requires_grad_(False)
    fine = refine(model, 2)
    assert {p.dtype for p in fine.parameters()} == {torch.float32}
    assert [block.inner.training for block in fine.blocks] == [True] * 2 + [False] * 6
    frozen = [not block.inner.weight.requires_grad for block in fine.blocks]
    assert frozen == [False, False, True, True, False, False, False, False]


@pytest.mark.parametrize(("factor", "size"), [(10**9, "13 TB"), (10**30, "PB")])
def test_what_does_not_fit_is_refused_before_it_is_made(factor: int, size: str) -> None:
    with pytest.raises(
        InputError, match=f"of {4 * factor} layers does not fit .* {size} of .* a smaller factor$"
    ):
        refine(chain_of(4), factor)


@pytest.mark.parametrize("factor", [0, -2])
def test_a_factor_that_is_none(factor: int) -> None:
    for change in (refine, coarsen, tie):
        with pytest.raises(InputError, match=r"(factor|every) is .*; expected a whole number ≥ 1"):
            change(chain_of(4), factor)


def test_depths_that_cannot_be_divided() -> None:
    model = Architecture("convolutional", (3, 8, 8), 3, (6, 12), 2, 2).build()
    with pytest.raises(InputError, match=r"factor is 4, .* have 6, 12 layers; .*: 2, 3, 6$"):
        coarsen(model, 4)
    with pytest.raises(InputError, match="have 5 layers; what divides them: 5"):
        coarsen(chain_of(5), 2)
    with pytest.raises(InputError, match="have 4, 3 layers; nothing divides them"):
        coarsen(Architecture("convolutional", (3, 8, 8), 3, (4, 3), 2, 2).build(), 2)


class Bounded(TanhBlock):
    """What it adds is no module's output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * (super().forward(x) - x).tanh()


class Normed(TanhBlock):
    """Adds something else as well."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).tanh()) + 0.01 * x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Bounded, "where the residual branches of Bounded end is not known"),
        (Normed, r"residual branches of Normed end is not known: .* its input by 0\.01"),
    ],
)
def test_branches_whose_end_is_not_known(kind: type[TanhBlock], words: str) -> None:
    model = folded(3)
    for n, block in enumerate(model.blocks):
        model.blocks[n] = kind().double()
        model.blocks[n].load_state_dict(block.state_dict())
    with pytest.raises(InputError, match=words):
        refine(model, 2)


def test_models_that_are_refused() -> None:
    unlike = ResidualChain([LinearResidual(WIDTH), TwoLayerResidual(WIDTH, 4)])
    for model in (unlike, chain_of(1), ResidualChain([])):
        with pytest.raises(InputError, match="no stage of two layers or more"):
            refine(model, 2)
    with pytest.raises(InputError, match="no stack of blocks in Linear"):
        refine(nn.Linear(2, 2), 2)
    for model in (chain_of(4), folded(4)):
        for change in (refine, coarsen):
            with pytest.raises(InputError, match="on the meta device"):
                change(model.to("meta"), 2)
    quantised = folded(4)
    quantised.is_quantized = True
    with pytest.raises(InputError, match="Folded is quantised"):
        refine(quantised, 2)
    whole = chain_of(4)
    whole[0].inner.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantised"):
        refine(whole, 2)
    diverged = chain_of(4)
    diverged[2].outer.weight.data[0, 0] = torch.nan
    for change in (refine, coarsen):
        with pytest.raises(InputError, match=r"2\.outer\.weight has numbers that are not finite"):
            change(diverged, 2)
    shared = chain_of(4)
    shared[1].inner.weight = shared[0].inner.weight
    with pytest.raises(InputError, match=r"ResidualChain share parameters; give untie\(model\)"):
        refine(shared, 2)
    two = Architecture("convolutional", (3, 8, 8), 3, (2, 2), 2, 2).build()
    two.stages[1][0] = nn.Identity()
    with pytest.raises(InputError, match="stage 1 differ in class or shape"):
        refine(two, 2)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_switched_model_is_refused(kind: str) -> None:
    model = use_adjoint(MAKERS[kind](4))
    with pytest.raises(InputError, match=r"was replaced, as use_adjoint does; call use_backprop"):
        refine(model, 2)


@pytest.mark.slow
def test_a_users_own_blocks_are_read_after_the_change() -> None:
    fine = refine(folded(3), 3)
    assert anatomy(fine).horizon == 9
    assert all(isinstance(block, TanhBlock) for block in fine.blocks)
    assert [name for name, _ in fine.blocks.named_children()] == [str(i) for i in range(9)]


class Scaled(Folded):
    """Takes what no example can be made of."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale * super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["names", "tuple"])
def test_a_model_is_changed_on_the_example_that_it_was_read_on(given: str) -> None:
    model, plain, x, scale = folded(4), folded(4), batch(), torch.tensor(3.0).double()
    model.__class__ = Scaled
    for change in (refine, coarsen, tie):
        with pytest.raises(InputError, match=r"does not run on an example made for it.*example=…"):
            change(model, 2)
    anatomy(model, example={"x": x, "scale": scale} if given == "names" else (x, scale))
    for change in (refine, coarsen, tie, lambda m, k: refine(refine(m, k), k)):
        mine, expected = change(model, 2), change(plain, 2)
        assert type(mine) is Scaled
        theirs = expected.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.state_dict().items())
        assert torch.equal(mine(x, scale), 3 * expected(x))
    gap = discretization_gap(model, {"x": x, "scale": scale})
    assert gap == discretization_gap(plain, x)
