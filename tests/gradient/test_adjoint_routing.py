"""Blocks that sort by numbers, blocks that never meet, and checkpoints around the blocks."""

from typing import Any

import pytest
import torch
from adjoint_references import exact_gradients, gradients, inputs, relative_error, tower
from torch import Tensor, nn

from deeplimit import InputError, use_adjoint
from deeplimit.gradient import AdjointError, DriftWarning, layout

WIDTH, EXPERTS = 8, 3


class Routed(nn.Module):
    """x + the expert that each sample's numbers choose; a sample near a border may change sides."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        choice = weights.argmax(-1)
        update = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            (rows,) = torch.where(choice == n)
            update.index_add_(0, rows, weights[rows, n, None] * torch.tanh(expert(x[rows])))
        return x + update


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("evaluations", [1, 3])
def test_a_block_that_sorts_by_numbers_keeps_its_input(seed: int, evaluations: int) -> None:
    model = tower(Routed, depth=8)
    x = torch.cat([inputs(10 * seed + k) for k in range(4)])
    _, exact = exact_gradients(model, x)
    _, found = gradients(use_adjoint(model, evaluations=evaluations, on_drift="raise"), x)
    assert relative_error(found, exact) < 1e-13
    assert layout(model).kept == tuple(f"blocks.{n}" for n in range(8))


@pytest.mark.slow
def test_mixtral_keeps_its_inputs_too() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, pad_token_id=0,
        experts_implementation="eager",
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).double().train()
    tokens = torch.randint(50, (2, 12))

    def loss_of(model: nn.Module, tokens: Any) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    _, exact = exact_gradients(model, tokens, loss_of)
    _, found = gradients(use_adjoint(model, on_drift="raise"), tokens, loss_of)
    assert relative_error(found, exact) < 1e-12


class Indexed(nn.Module):
    """Takes channels by their numbers in a list, which sorts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.linear(x))[:, torch.arange(WIDTH - 1, -1, -1)]


def test_an_index_that_is_no_mask_sorts_nothing() -> None:
    model = tower(Indexed)
    _, exact = exact_gradients(model, inputs())
    _, found = gradients(use_adjoint(model, on_drift="ignore"), inputs())
    assert 1e-12 < relative_error(found, exact) < 0.1  # states were rebuilt


class Apart(nn.Module):
    """Residual blocks with something between each two."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = tower().blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = 0.9 * block(x)
        return x


def test_blocks_that_never_meet_are_said_to_save_nothing() -> None:
    model = Apart()
    _, exact = exact_gradients(model, inputs())
    use_adjoint(model)
    gradients(model, inputs())  # in which the blocks are found
    with pytest.warns(DriftWarning, match=r"no state will be rebuilt: no block's input is"):
        _, found = gradients(model, inputs())
    assert relative_error(found, exact) < 1e-13
    assert layout(model).rebuilt == ()
    assert layout(model).alone == tuple(f"blocks.{n}" for n in range(5))
    assert "linked to no other block, their input kept: blocks.0" in str(layout(model))


def test_that_nothing_is_saved_is_not_all_that_is_ever_said() -> None:
    """Hooks between the blocks are taken away: from then on states are rebuilt, and far off."""
    model = tower()
    handles = [block.register_forward_hook(lambda _, __, y: 0.9 * y) for block in model.blocks]
    use_adjoint(model, evaluations=1, tolerance=1e-6)
    gradients(model, inputs())
    with pytest.warns(DriftWarning, match="no state will be rebuilt"):
        gradients(model, inputs())
    for handle in handles:
        handle.remove()
    with pytest.warns(DriftWarning, match="beyond the tolerance"):
        gradients(model, inputs())


def test_checkpoints_of_transformers_around_the_blocks_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")()
    with pytest.raises(InputError, match="activation_checkpointing_disable"):
        use_adjoint(model)
    getattr(model, f"{name}_checkpointing_disable")()
    use_adjoint(model)


class Seldom(nn.Module):
    """x + φ(x) with a buffer that moves in every third pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(()))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        y = x + 0.1 * self.scale * torch.tanh(self.linear(x))
        if torch.is_grad_enabled() and not torch._C._current_graph_task_id() + 1:
            self.passes += 1
            if self.passes % 3 == 0:
                self.scale.mul_(0.5)
        return y


def test_a_buffer_that_first_moves_later_is_said_and_then_remembered() -> None:
    model = use_adjoint(tower(Seldom), evaluations=9)
    for _ in range(2):
        gradients(model, inputs())
    for block in range(5):  # each of them is met for the first time once
        with pytest.raises(
            AdjointError, match=rf"blocks\.{block}: its buffer scale was changed by"
        ):
            model(inputs())
    reference = tower(Seldom)
    for mine, its in zip(model.blocks, reference.blocks, strict=True):
        its.passes = mine.passes = 2
        its.scale.copy_(mine.scale)
    _, exact = gradients(reference, inputs())
    _, found = gradients(model, inputs())
    assert relative_error(found, exact) < 1e-6
    assert all(
        torch.equal(a.scale, b.scale) for a, b in zip(model.blocks, reference.blocks, strict=True)
    )
