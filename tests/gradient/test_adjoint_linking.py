"""When two blocks are linked and when not; what is kept, what is let go; drift and its warnings."""

import gc
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from adjoint_models import EXACT, MANY, Block, assert_equal, inputs, sequence
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deeplimit import InputError, ResidualChain, drift, gradient_error, use_adjoint, use_backprop
from deeplimit.gradient import AdjointError, DriftWarning, layout
from deeplimit.gradient.meter import Settings
from deeplimit.gradient.stand_ins import engines, switches


class Between(nn.Module):
    """Blocks with something done to the state after the third."""

    def __init__(self, what: str, depth: int = 6):
        super().__init__()
        self.blocks, self.what = sequence(depth), what

    def forward(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.blocks):
            x = block(x)
            if n == 2:
                x = self._between(x)
        return x

    def _between(self, x: Tensor) -> Tensor:
        if self.what == "edited":
            x += 0.1
        elif self.what == "slice":
            return x[:, :4].repeat(1, 2)[:, :6]
        elif self.what == "first rows":
            return x[:3]
        elif self.what == "transposed":
            return x.T.contiguous().T
        elif self.what == "view":
            return x.view(x.shape)
        elif self.what == "memory used again":
            values = x.tolist()
            del x
            return torch.tensor(values, dtype=torch.float64).requires_grad_() * 1.0
        return x


def chains(model: nn.Module, x: Tensor) -> list[int]:
    """Lengths of the chains of a forward pass."""
    (engine,) = engines(model)
    engine.chains = []
    model(x)
    found, engine.chains = engine.chains, None
    return [len(chain) for chain in found]


@pytest.mark.parametrize(
    ("what", "lengths"),
    [
        ("nothing", [6]),
        ("view", [6]),  # the same numbers at the same place, as FSDP2 passes them on
        ("edited", [3, 3]),
        ("slice", [3, 3]),
        ("first rows", [3, 3]),
        ("transposed", [3, 3]),
        ("memory used again", [3, 3]),
    ],
)
def test_a_chain_ends_where_the_state_is_another(what: str, lengths: list[int]) -> None:
    model, x = Between(what), inputs(5, 6).requires_grad_()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).sin().sum(), leaves, allow_unused=True)
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    for _ in range(2):
        got = torch.autograd.grad(model(x).sin().sum(), leaves, allow_unused=True)
        assert_equal(list(got), list(expected), EXACT)
    assert chains(model, x) == lengths


def test_a_state_that_goes_two_ways() -> None:
    """One block after it links, the other starts a chain of its own; a later use is no matter."""
    blocks = nn.ModuleList(sequence(6))
    x = inputs(5, 6).requires_grad_()

    def loss() -> Tensor:
        y = blocks[1](blocks[0](x))
        left, right = blocks[3](blocks[2](y)), blocks[5](blocks[4](y))
        return left.sin().sum() + right.square().sum() + y.cos().sum()

    leaves = [x, *blocks.parameters()]
    expected = torch.autograd.grad(loss(), leaves)
    use_adjoint(blocks, **MANY)  # type: ignore[arg-type]
    for _ in range(2):
        assert_equal(list(torch.autograd.grad(loss(), leaves)), list(expected), EXACT)


def test_a_loss_on_an_intermediate_state_only() -> None:
    """The later states are rebuilt from the end although their blocks have no gradient."""
    model, x = sequence(8), inputs(5, 6).requires_grad_()

    def loss() -> Tensor:
        states = [x]
        for block in model:
            states.append(block(states[-1]))
        return states[4].sin().sum()

    leaves = [x, *model[:4].parameters()]
    expected = torch.autograd.grad(loss(), leaves)
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    for _ in range(2):
        assert_equal(list(torch.autograd.grad(loss(), leaves)), list(expected), EXACT)


def test_an_input_edited_after_its_use_is_an_error() -> None:
    model, x = use_adjoint(sequence(3), **MANY), inputs(5, 6)  # type: ignore[arg-type]
    start = x.requires_grad_() * 1.0
    loss = model(start).sum()
    with torch.no_grad():
        start.mul_(2.0)
    with pytest.raises(AdjointError, match="changed in place after it was used"):
        loss.backward()


class EditsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x += 0.2 * self.inside(x)
        return x


def test_a_block_that_edits_its_input_is_left_plain_and_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(EditsItsInput() for _ in range(4))).double()
    x = inputs(5, 6).requires_grad_()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x * 1.0).sin().sum(), leaves)
    use_adjoint(model)
    for turn in range(2):
        if turn == 0:
            with pytest.warns(DriftWarning, match="no state will be rebuilt: 0 changes its own"):
                got = torch.autograd.grad(model(x * 1.0).sin().sum(), leaves)
        else:
            got = torch.autograd.grad(model(x * 1.0).sin().sum(), leaves)
        assert_equal(list(got), list(expected), 1e-15)
    assert set(layout(model).plain) == {"0", "1", "2", "3"}
    assert "changes its own input" in str(layout(model))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["backward", "dropped", "exception"])
def test_states_die_without_the_garbage_collector(end: str) -> None:
    model = use_adjoint(sequence(6), evaluations=2, on_drift="ignore")
    seen: list[StorageWeakRef] = []
    for block in model:
        block.register_forward_hook(
            lambda m, args, y: seen.append(StorageWeakRef(y.untyped_storage()))
        )
    gradients_of = inputs(5, 6).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        model(gradients_of).sum().backward()
        seen.clear()
        loss = model(gradients_of).sum()
        alive = [not ref.expired() for ref in seen]
        assert alive == [False] * 4 + [True, False]  # the last block's input is kept
        if end == "backward":
            loss.backward()
        elif end == "exception":
            model[2].inner.weight.data.mul_(2.0)  # type: ignore[union-attr,operator]
            with torch.no_grad():
                model[2].inner.weight.add_(1.0)  # type: ignore[union-attr,operator]
            with pytest.raises(AdjointError):
                loss.backward()
        del loss
        assert all(ref.expired() for ref in seen)
    finally:
        gc.enable()


@pytest.mark.slow
def test_anchors_are_kept_and_exact() -> None:
    model, x = sequence(9, gain=0.6), inputs(5, 6)
    errors = []
    for every in (None, 4, 2, 1):
        use_adjoint(model, evaluations=1, anchor_every=every, on_drift="ignore")
        errors.append(gradient_error(model, lambda m, x: m(x).sin().sum(), x).error)
    assert errors[0] > 1.05 * errors[1] > 1.1 * errors[2] > 0
    assert errors[3] < 1e-15
    assert drift(model) == 0


def test_drift_is_the_rebuilt_state_against_the_true_one() -> None:
    """Four blocks: x_2 and x_1 are rebuilt from x_3; drift is that of x_1, by hand."""
    model, x = sequence(4, gain=0.5), inputs(5, 6)
    with torch.no_grad():
        states = [x]
        for block in model:
            states.append(block(states[-1]))
        z = states[3]
        rebuilt = {}
        for n in (2, 1):
            target, z = z, z
            for _ in range(2):
                z = target - (model[n](z) - z)
            rebuilt[n] = z
        # the updates of the replays, at the points where the gradients are taken
        updates = []
        for n, after in ((2, states[3]), (1, rebuilt[2])):
            before = after - (model[n](after) - after)
            updates.append((model[n](before) - before).norm(dim=1))
        ratio = (rebuilt[1] - states[1]).norm(dim=1) / torch.minimum(*updates)
        expected = float(ratio.square().mean().sqrt())
    use_adjoint(model, evaluations=2, on_drift="ignore")
    model(x).sum().backward()
    assert drift(model) == pytest.approx(expected, rel=1e-9)


class Shifting(nn.Module):
    """Adds something huge to some entries, which later blocks may not even read."""

    def __init__(self, shift: Tensor):
        super().__init__()
        self.block, self.shift = Block(6, gain=1.5), shift

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.shift


@pytest.mark.parametrize("size", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("where", ["sample", "all"])
def test_one_huge_update_does_not_hide_the_drift(where: str, size: float) -> None:
    """Of one sample, or of all in one layer: the gradient stays wrong, and that is told."""
    torch.manual_seed(0)
    shift = torch.zeros(8, 6, dtype=torch.float64)
    shift[0 if where == "sample" else slice(None), 0] = size
    blocks = [Block(6, gain=1.5) for _ in range(9)]
    model = nn.Sequential(blocks[0], Shifting(shift), *blocks[1:]).double()
    use_adjoint(model, evaluations=2)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x)[1:, 1:].square().mean()

    with pytest.warns(DriftWarning, match="beyond the tolerance"):
        loss(model, inputs(8, 6)).backward()
    report = gradient_error(model, loss, inputs(8, 6))
    assert report.error > 0.01
    assert report.drift > report.error / 2


def test_a_large_drift_warns_once_with_the_layer_and_the_remedy() -> None:
    model, x = use_adjoint(sequence(6, gain=2.0), evaluations=1), inputs(5, 6)
    with pytest.warns(DriftWarning, match=r"drift .* at 1: .*\(2 instead of 1\).*plan_memory"):
        model(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
    assert drift(model) > 0.01


def test_a_large_drift_raises_where_that_is_asked_for() -> None:
    model = use_adjoint(sequence(6, gain=2.0), evaluations=1, on_drift="raise")
    for _ in range(2):
        with pytest.raises(AdjointError, match=r"may be up to .*, beyond the tolerance 0\.01"):
            model(inputs(5, 6)).sum().backward()
    use_adjoint(model, evaluations=30, on_drift="raise", anchor_every=2)


class Masked(nn.Module):
    """ReLU in ways that leave no trace in the graph."""

    def __init__(self, way: int = 0):
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return x * (x > 0)
        return x.masked_fill(x < 0, 0) if self.way == 1 else Ramp.apply(x)  # type: ignore[no-any-return]


class Ramp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.ge(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0].ge(0)


SMOOTH = (nn.Tanh, nn.GELU, nn.SiLU)
KINKED = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, *(partial(Masked, n) for n in range(3)))


@pytest.mark.parametrize("kink", [*SMOOTH, *KINKED])
def test_kinks_are_seen_and_weigh_with_the_root_of_drift(kink: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 12), kink(), nn.Linear(12, 6)) for _ in range(6)]
    model = use_adjoint(ResidualChain(blocks, step=0.2).double(), on_drift="ignore")
    (engine,) = engines(model)
    model(inputs(5, 6)).sum().backward()
    smooth = kink in SMOOTH
    assert engine.meter.kinked is not smooth
    assert engine.meter.error_bound(1e-4) == pytest.approx(2e-4 if smooth else 2.5e-2)
    assert engine.meter.error_bound(4.0) == 8.0


def test_a_backward_pass_that_ends_before_a_kept_state_says_so() -> None:
    model = use_adjoint(sequence(6), evaluations=2)
    loss = model(inputs(5, 6)).sum()
    with pytest.warns(DriftWarning, match="ended at 3, before a kept state"):
        torch.autograd.grad(loss, list(model[3:].parameters()))
    assert math.isnan(drift(model))


def test_switching_back_leaves_no_trace() -> None:
    model = sequence(4)
    before = [dict(m.__dict__) for m in model.modules()]
    keys = list(model.state_dict())
    use_adjoint(model, evaluations=1, on_drift="ignore")
    use_adjoint(model, evaluations=3, on_drift="ignore")  # again, with other settings
    assert {s.engine.settings.evaluations for s in switches(model)} == {3}
    model(inputs(5, 6)).sum().backward()
    assert list(model.state_dict()) == keys
    assert use_backprop(model) is model
    model.zero_grad()
    assert [m.__dict__.keys() for m in model.modules()] == [d.keys() for d in before]
    with pytest.raises(InputError, match="call use_adjoint"):
        drift(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluations": 0}, "evaluations is 0; expected a whole number ≥ 1"),
        ({"anchor_every": 0}, "anchor_every is 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"blocks": ["7"]}, "blocks names '7', which the model does not have"),
        ({"blocks": "0"}, "expected a list of names"),
        ({"blocks": ["0", "0.inner"]}, "give one"),
        ({"anchors": ["nine"]}, "anchors names 'nine', which is not one of the blocks"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    model = sequence(3)
    with pytest.raises(InputError, match=message):
        use_adjoint(model, **settings)  # type: ignore[arg-type]
    assert not switches(model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("on_drift", "shout", "on_drift is 'shout'; expected 'warn', 'raise' or"),
        ("evaluations", "two", "evaluations is 'two'; expected a whole number ≥ 1"),
        ("evaluations", 2.0, "evaluations is 2.0; expected a whole number ≥ 1"),
    ],
)
def test_what_annotations_do_not_allow(name: str, value: object, message: str) -> None:
    settings = Settings()
    vars(settings)[name] = value
    with pytest.raises(InputError, match=message):
        settings.__post_init__()


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(InputError, match="give their names to"):
        use_adjoint(nn.Linear(3, 3))
