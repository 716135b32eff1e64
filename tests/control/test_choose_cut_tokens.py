"""Cuts of language models chosen under a budget, against counting token by token."""

import pytest
import torch
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, choose_cut, crop, turnpike_profile

pytest.importorskip("transformers")
from text_families import VOCABULARY, text_model, words

pytestmark = pytest.mark.slow

Batches = list[tuple[Tensor, Tensor]]
ENDS = {  # of the residual branches of a layer
    "GPT2LMHeadModel": ("attn.c_proj", "mlp.c_proj"),
    "LlamaForCausalLM": ("self_attn.o_proj", "mlp.down_proj"),
}
IGNORED = -100


@torch.no_grad()
def silenced(name: str, places: set[int]) -> nn.Module:
    """A decoder of five layers of which these do exactly nothing."""
    model = text_model(name, num_hidden_layers=5)
    layers = model.transformer.h if name.startswith("GPT2") else model.model.layers
    for n in places:
        for path in ENDS[name]:
            for parameter in layers[n].get_submodule(path).parameters():
                parameter.zero_()
    return model


def self_labelled(model: nn.Module) -> Batches:
    """Targets are the model's own next tokens; the first of every text counts nowhere."""
    found = []
    for seed in (1, 2):
        x = words(4, 9, seed)
        with torch.no_grad():
            y = model(x).logits.argmax(-1)
        y[:, 0] = IGNORED
        found.append((x, y))
    return found


def counted(model: nn.Module, removed: tuple[int, ...], loader: Batches) -> tuple[float, int]:
    """The fraction of the tokens that is right after a cut, and how many there are."""
    cropped = crop(model, remove=removed).eval()
    right = total = 0
    for x, y in loader:
        for text, targets in zip(x, y, strict=True):
            with torch.no_grad():
                said = cropped(text[None]).logits[0].argmax(-1)
            for token, target in zip(said.tolist(), targets.tolist(), strict=True):
                if target != IGNORED:
                    right, total = right + (token == target), total + 1
    return right / total, total


@pytest.mark.parametrize("name", ENDS)
def test_layers_that_do_nothing_go_first_and_tokens_are_counted(name: str) -> None:
    places = {1, 3}
    model = silenced(name, places)
    loader = self_labelled(model)
    made = turnpike_profile(model, loader, SoftCrossEntropy(VOCABULARY, 0.05))
    assert {n for n, influence in enumerate(made.influence) if influence < 1e-12} == places
    chosen = choose_cut(model, made, loader, accuracy=0.0)
    assert set(chosen.removed) >= places
    # The first batch puts the layers in order, the second judges.
    assert (chosen.accuracy_before, chosen.samples) == (1.0, 4 * 8)
    assert chosen.accuracy_after == counted(model, chosen.removed, loader)[0] == 1.0
    for blocks in (3, 2, 1):
        cut = choose_cut(model, made, loader, blocks=blocks)
        assert len(cut.removed) == 5 - blocks
        assert set(cut.removed) >= places
        share, tokens = counted(model, cut.removed, loader[1:])
        assert (cut.accuracy_after, cut.samples) == (pytest.approx(share), tokens)
    assert choose_cut(model, made, blocks=3).removed == (1, 3)
    # Tokens of one text are no independent samples: no test has its level on them.
    with pytest.raises(InputError, match="tokens of one text are no independent samples"):
        choose_cut(model, made, loader, accuracy=0.1, confidence=0.95)
