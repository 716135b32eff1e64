"""Blocks with masks, keyword arguments, tuple outputs and key-value caches."""

from typing import Any

import pytest
import torch
from adjoint_references import (
    Block,
    Tower,
    exact_gradients,
    gradients,
    inputs,
    relative_error,
)
from torch import Tensor, nn

from deeplimit import drift, use_adjoint
from deeplimit.gradient import layout

transformers = pytest.importorskip("transformers")

MASK = torch.ones(2, 7, dtype=torch.long)
MASK[0, :3] = 0


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """A language model whose residual branches contract, and a batch."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=4, n_head=2, bos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.mul_(0.3)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's own loss."""
    return model(**batch).loss


def loss_on_the_cache(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """A loss that depends on keys and values too."""
    output = model(**batch)
    layers = output.past_key_values.layers
    return output.loss + sum(c.keys.square().mean() + c.values.sin().mean() for c in layers)


def all_states(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """A loss that depends on every layer's state."""
    states = model(**batch, output_hidden_states=True).hidden_states
    return sum(state.square().mean() for state in states)


@pytest.mark.parametrize("loss", [loss_of, all_states, loss_on_the_cache])
@pytest.mark.parametrize("more", [{}, {"attention_mask": MASK}], ids=["no mask", "mask"])
def test_masks_caches_and_losses_on_other_outputs(more: dict[str, Tensor], loss: Any) -> None:
    model, batch = gpt2()
    batch |= more | {"use_cache": loss is loss_on_the_cache}
    _, exact = exact_gradients(model, batch, loss)
    use_adjoint(model, evaluations=6, on_drift="ignore")
    _, found = gradients(model, batch, loss)
    assert len(layout(model).rebuilt) == 4
    assert 0 < relative_error(found, exact) < 1e-6
    assert 0 < drift(model) < 1e-5


def test_an_empty_cache_does_not_grow_in_the_replay() -> None:
    model, batch = gpt2()
    _, exact = exact_gradients(model, batch, loss_of)
    use_adjoint(model, evaluations=6, on_drift="ignore")
    for _ in range(2):
        cache = transformers.DynamicCache(config=model.config)
        _, found = gradients(model, batch | {"past_key_values": cache, "use_cache": True}, loss_of)
        assert cache.get_seq_length() == 7
        assert [layer.keys.shape[-2] for layer in cache.layers] == [7] * 4
        assert 0 < relative_error(found, exact) < 1e-6


def test_a_filled_cache_runs_plain_and_is_right() -> None:
    model, batch = gpt2()

    def filled() -> dict[str, Any]:
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model.eval()(batch["input_ids"], past_key_values=cache, use_cache=True)
        model.train()
        return batch | {"past_key_values": cache, "use_cache": True}

    _, exact = gradients(model, filled(), loss_of)
    _, without = gradients(model, batch, loss_of)
    assert relative_error(without, exact) > 0.01  # the cache matters
    use_adjoint(model, evaluations=1, on_drift="raise", tolerance=1e-9)
    for _ in range(2):
        now = filled()
        _, found = gradients(model, now, loss_of)
        assert relative_error(found, exact) == 0.0
        assert now["past_key_values"].get_seq_length() == 14


class Masked(Block):
    """Keyword arguments, one of them a tensor with a gradient, and a tuple for output."""

    def forward(self, hidden: Tensor, *, mask: Tensor, shift: tuple[Tensor, Tensor]) -> Any:
        y = self.residual(hidden + shift[0]) * mask + shift[1]
        return hidden + y, y.square().mean()


class MaskedTower(Tower):
    """Calls its blocks with keywords only, and uses the second output too."""

    shifts: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        x, penalty = self.stem(x), 0.0
        mask = (torch.arange(x.shape[-1]) % 3 != 0).double()
        shift = (self.shifts[0], self.shifts[1].tanh())
        for block in self.blocks:
            x, more = block(hidden=x, mask=mask, shift=shift)
            penalty = penalty + more
        return self.head(x) + penalty


def masked_tower() -> MaskedTower:
    """Five such blocks."""
    torch.manual_seed(0)
    model = MaskedTower(Masked).double()
    generator = torch.Generator().manual_seed(7)
    model.shifts = nn.Parameter(0.1 * torch.randn(2, 8, dtype=torch.float64, generator=generator))
    return model


def test_keywords_tuples_and_gradients_of_other_arguments() -> None:
    model, x = masked_tower(), inputs()
    _, exact = exact_gradients(model, x)
    assert exact["shifts"].abs().min() > 0
    use_adjoint(model, evaluations=8, on_drift="ignore")
    for _ in range(2):
        _, found = gradients(model, x)
        assert len(layout(model).rebuilt) == 5
        assert 0 < relative_error(found, exact) < 1e-6
        assert relative_error({"s": found["shifts"]}, {"s": exact["shifts"]}) < 1e-6


class Shifted(Tower):
    """Hands every block a tensor that a caller may change before the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.mask = torch.ones(8, dtype=x.dtype)
        for block in self.blocks:
            x, _ = block(hidden=x, mask=self.mask, shift=(x.new_zeros(8), x.new_zeros(8)))
        return self.head(x)


def test_an_argument_changed_before_the_backward_pass_is_an_error() -> None:
    torch.manual_seed(0)
    model = use_adjoint(Shifted(Masked).double(), on_drift="ignore")
    loss = model(inputs()).sum()
    model.mask.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


class Routed(Block):
    """Gives its state second."""

    def forward(self, x: Tensor) -> Any:
        return {"state": x + self.residual(x)}


class RoutedTower(Tower):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)["state"]
        return self.head(x)


def test_an_output_that_is_no_tensor_is_left_plain() -> None:
    torch.manual_seed(0)
    model = RoutedTower(Routed).double()
    x = inputs()
    _, exact = exact_gradients(model, x)
    use_adjoint(model, on_drift="ignore")
    _, found = gradients(model, x)
    assert relative_error(found, exact) == 0.0
    assert layout(model).rebuilt == ()
    assert "into no tensor" in layout(model).plain["blocks.0"]
