"""Cuts that leave chosen layers alone, or take out one run of layers."""

from itertools import pairwise

import pytest
import torch
from model_families import CLASSES, shaken
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, choose_cut, crop, turnpike_profile
from deeplimit.network import ResidualChain, TwoLayerResidual

LOSS = SoftCrossEntropy(CLASSES, 0.05)
DEPTH = 7


def network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Layers 1, 4 and 5 hardly do anything."""
    blocks = [TwoLayerResidual(CLASSES, 7, "tanh") for _ in range(DEPTH)]
    model = shaken(ResidualChain(blocks, step=0.3)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for n, block in enumerate(model):
            for p in block.parameters():
                p.mul_(1e-4 if n in (1, 4, 5) else 1.0)
        x = torch.randn(60, CLASSES, dtype=torch.float64)
        y = model(x).argmax(1)
    return model, list(zip(x.split(20), y.split(20), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("with_loader", [True, False])
@pytest.mark.parametrize(
    ("blocks", "options", "allowed"),
    [
        (4, {}, {1, 4, 5}),
        (5, {"protect": [4, -2]}, {1} | {0, 2, 3, 6}),
        (5, {"contiguous": True}, {4, 5}),
        (4, {"protect": [4], "contiguous": True}, {0, 1, 2, 3, 5, 6}),
    ],
)
def test_what_may_go(blocks, options, allowed, with_loader) -> None:
    model, loader = network()
    profile = turnpike_profile(model, loader, LOSS)
    choice = choose_cut(model, profile, loader if with_loader else None, blocks=blocks, **options)
    assert len(choice.removed) == DEPTH - blocks
    kept = {n % DEPTH for n in options.get("protect", [])}
    assert not kept & set(choice.removed)
    if options.get("contiguous"):
        assert all(b == a + 1 for a, b in pairwise(choice.removed))
    if with_loader or choice.score != "tail":
        assert set(choice.removed) <= allowed
    smaller = crop(model, choice)
    x = loader[0][0]
    assert torch.equal(smaller(x), crop(model, remove=choice.removed)(x))


def test_all_that_is_left_is_protected() -> None:
    model, loader = network()
    profile = turnpike_profile(model, loader, LOSS)
    with pytest.raises(InputError, match="cannot reach by removing layers"):
        choose_cut(model, profile, loader, blocks=3, protect=range(4))
    with pytest.raises(InputError, match=r"layer 7 to be protected; the model has layers 0 … 6"):
        choose_cut(model, profile, loader, blocks=3, protect=[7])


def test_a_choice_is_of_the_model_that_is_cut() -> None:
    model, loader = network()
    choice = choose_cut(model, turnpike_profile(model, loader, LOSS), loader, blocks=5)
    with pytest.raises(
        InputError, match="the choice is of a network with 7 layers, the model has 5"
    ):
        crop(crop(model, choice), choice)
