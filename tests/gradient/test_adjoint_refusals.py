"""What comes after `use_adjoint` and does not go with it: a line each, or it works."""

import copy
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_references import Block, exact_gradients, gradients, inputs, relative_error, tower
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit import InputError, drift, use_adjoint, use_backprop
from deeplimit.gradient import AdjointError, layout
from deeplimit.gradient.stand_ins import switches

NAMES = tuple(f"blocks.{n}" for n in range(5))


def around_each(block: nn.Module, reentrant: bool = False) -> None:
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)


def checkpointing(model: Any, way: str) -> None:
    """Transformers' own, by the name that it has since 5.23 where it has it."""
    old = getattr(model, f"gradient_checkpointing_{way}")
    getattr(model, f"activation_checkpointing_{way}", old)()


def test_transformers_checkpoints_are_refused_before_and_after_in_the_same_words() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model, x = transformers.GPT2LMHeadModel(config), torch.arange(8)[None]
    use_adjoint(model, on_drift="ignore")
    model(x, labels=x).loss.backward()
    checkpointing(model, "enable")
    words = "has gradient checkpointing on, .*gradient_checkpointing_disable"
    with pytest.raises(InputError, match=f"transformer.h.0 {words}"):
        model(x, labels=x)
    with torch.no_grad():
        model(x, labels=x)
    with pytest.raises(InputError, match=f"GPT2LMHeadModel {words}"):
        use_adjoint(model)
    checkpointing(model, "disable")
    model(x, labels=x).loss.backward()
    assert len(layout(model).rebuilt) == 2


def test_a_checkpoint_around_each_block_is_refused_one_around_several_is_not() -> None:
    model, x = use_adjoint(tower(), evaluations=9), inputs()
    _, exact = exact_gradients(use_backprop(tower()), x)

    def in_parts(model: nn.Module, x: Tensor) -> Tensor:
        first, last = nn.Sequential(*model.blocks[:2]), nn.Sequential(*model.blocks[2:])
        x = checkpoint(first, model.stem(x), use_reentrant=False)
        y = model.head(checkpoint(last, x, use_reentrant=False))
        return (y.sin() + y.square() / 2).mean()

    for _ in range(2):
        _, found = gradients(model, x, in_parts)
        assert relative_error(found, exact) < 1e-6
    for block in model.blocks:
        around_each(block)
    with pytest.raises(InputError, match=r"blocks\.1 and the block before it run in a checkpoint"):
        model(x)


class Lazy(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.LazyLinear(16)


def test_parameters_without_a_shape_want_a_batch_first() -> None:
    model, x = use_adjoint(tower(Lazy), evaluations=9), inputs()
    with pytest.raises(AdjointError, match=r"blocks\.0: .*no shape yet.*run one batch first"):
        model(x)
    with torch.no_grad():
        model(x)
    for _ in range(2):
        _, found = gradients(model, x)
    _, exact = exact_gradients(use_backprop(copy.deepcopy(model)), x)
    assert 0 < relative_error(found, exact) < 1e-6


class Masked(Block):
    def forward(self, x: Tensor, mask: Any) -> Tensor:
        while not isinstance(mask, Tensor):
            (mask,) = mask.values() if isinstance(mask, dict) else mask
        return x + self.residual(x) * mask


@pytest.mark.parametrize("pack", [lambda m: m, lambda m: [m], lambda m: {"a": ([m],)}])
def test_an_edited_argument_is_an_adjoint_error_however_deep_it_lies(
    pack: Callable[[Tensor], Any],
) -> None:
    blocks = use_adjoint(nn.ModuleList(Masked() for _ in range(4)).double())
    mask = torch.ones(4, 8).double()

    def forward() -> Tensor:
        x = inputs()
        for block in blocks:
            x = block(x, pack(mask))
        return x.sum()

    forward().backward()
    loss = forward()
    mask.mul_(0.5)
    with pytest.raises(AdjointError, match=r"3: one of its other arguments .* change a copy"):
        loss.backward()


def test_in_an_empty_batch_nothing_drifts_and_nothing_is_proven() -> None:
    class Random(Block):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(len(drawn)))
            drawn.append(1)
            return x + self.residual(x) * noise

    drawn: list[int] = []
    model = use_adjoint(tower(), evaluations=9, on_drift="raise")
    for _ in range(2):
        model(inputs()[:0]).sum().backward()
        assert drift(model) == 0
    model(inputs()).sum().backward()
    assert 0 < drift(model) < 1e-6
    model = use_adjoint(tower(Random))
    model(inputs()[:0]).sum().backward()
    with pytest.raises(AdjointError, match="gives another output when it is run again"):
        model(inputs()).sum().backward()


def wrapped(block: nn.Module) -> None:
    """As accelerate's hooks do it."""
    inner = block.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    block.forward = forward


def hooked(block: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(block, hooks.AlignDevicesHook(execution_device="cpu"))


@pytest.mark.parametrize("wrap", [wrapped, hooked])
def test_blocks_that_are_wrapped_later_stay_switched_and_can_be_switched_back(
    wrap: Callable[[nn.Module], None],
) -> None:
    model, x = tower(), inputs()
    _, exact = exact_gradients(model, x)
    use_adjoint(model, evaluations=9)
    for block in model.blocks:
        wrap(block)
    for _ in range(2):
        _, found = gradients(model, x)
        assert 0 < relative_error(found, exact) < 1e-6
    assert layout(model).rebuilt == NAMES
    assert 0 < drift(model) < 1e-6
    use_backprop(model)
    assert switches(model) == []
    _, found = gradients(model, x)
    assert relative_error(found, exact) == 0
    use_adjoint(model, evaluations=9)
    for _ in range(2):
        _, found = gradients(model, x)
    assert 0 < relative_error(found, exact) < 1e-6
    assert layout(model).rebuilt == NAMES


@pytest.mark.parametrize("first", [True, False])
def test_offloaded_parameters_are_said(first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tower()
    if first:
        accelerate.cpu_offload(model, "cpu")
    use_adjoint(model)
    if not first:
        accelerate.cpu_offload(model, "cpu")
    with torch.no_grad():
        model(inputs())
    with pytest.raises(AdjointError, match=r"blocks\.0: .*offloaded.*remove_hook_from_submodules"):
        model(inputs())


def test_parameters_taken_away_after_the_forward_pass_are_said() -> None:
    model = use_adjoint(tower(), on_drift="ignore")
    gradients(model, inputs())
    loss = model(inputs()).sum()
    model.blocks[3].to("meta")
    with pytest.raises(AdjointError, match=r"blocks\.3: .*offloaded"):
        loss.backward()


def in_thread(run: Callable[[], Any]) -> Exception | None:
    """What a thread of its own raised."""
    raised: list[Exception] = []

    def work() -> None:
        try:
            run()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_second_thread_is_told_while_the_first_has_a_backward_pass_to_come() -> None:
    model, x = use_adjoint(tower(), evaluations=9), inputs()
    for _ in range(2):
        assert in_thread(lambda: gradients(model, x)) is None  # one after the other
    loss = model(x).sum()
    refused = in_thread(lambda: model(x))
    assert isinstance(refused, AdjointError)
    assert "used in two threads" in str(refused)
    assert "copy.deepcopy" in str(refused)
    assert in_thread(lambda: copy.deepcopy(model)(x)) is None
    assert in_thread(loss.backward) is None  # a backward pass may run anywhere
    assert in_thread(lambda: model(x)) is None


def test_a_second_thread_in_the_middle_of_a_backward_pass() -> None:
    """It waits inside the replay of one block while the other begins."""
    met: list[Exception | None] = []

    class Meeting(Block):
        def forward(self, x: Tensor) -> Tensor:
            if waiting and torch._C._current_graph_task_id() != -1:
                met.append(in_thread(waiting.pop()))
            return x + self.residual(x)

    waiting: list[Callable[[], Any]] = []
    model, x = use_adjoint(tower(Meeting), evaluations=9), inputs()
    gradients(model, x)
    first, second = model(x).sum(), model(inputs(1)).sum()
    waiting.append(second.backward)
    first.backward()
    (refused,) = met
    assert isinstance(refused, AdjointError)
    assert "used in two threads" in str(refused)
    assert 0 < drift(model) < 1e-6


def test_backward_passes_that_take_turns_measure_their_own_drift() -> None:
    """The second runs as a whole while the first is between two of its blocks."""
    model, x = use_adjoint(tower(), evaluations=2, on_drift="ignore"), inputs()
    gradients(model, x)
    alone = []
    for seed in (0, 1):
        model(inputs(seed)).sum().backward()
        alone.append(drift(model))
    assert alone[0] != alone[1]
    states, found = [], []
    hook = model.blocks[2].register_forward_hook(lambda _, __, y: states.append(y))
    first = model(x).sum()
    hook.remove()
    second = model(inputs(1)).sum()

    def meanwhile(_: Tensor) -> None:
        assert in_thread(second.backward) is None
        found.append(drift(model))

    states.pop().register_hook(meanwhile)
    first.backward()
    assert [drift(model), *found] == alone
    assert not math.isnan(drift(model))
