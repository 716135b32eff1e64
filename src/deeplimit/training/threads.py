"""How many threads a network is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deeplimit.training.recipe import Recipe

SMALL = 2**14  # entries of a residual function's matrix that one thread multiplies in microseconds


@contextmanager
def fitting_threads(recipe: Recipe) -> Iterator[None]:
    """One thread for networks of vectors with small layers, torch's own number for others.

    Sharing such small products gains nothing on a free machine; on a busy one the threads wait for
    each other (20 times slower on two busy cores). Afterwards the number is what it was.
    """
    before = torch.get_num_threads()
    small = recipe.kind in ("logit", "vector") and recipe.width * max(recipe.hidden, 1) <= SMALL
    torch.set_num_threads(1 if small and recipe.model is None else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
