"""Losses of models with logits for every token: layer by layer, in chunks of tokens."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.anatomy import Head
from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.errors import InputError

CHUNK = 2**25  # logits at a time: 128 MiB in float32

Measure = Callable[[Tensor, Tensor], Sequence[Tensor]]


class CountedTokens:
    """The tokens of a batch that count: those whose target is not −100.

    Logits of layers meet the targets in chunks of tokens, of about `numbers` logits each. Targets
    are aligned with the logits: for the next token the caller shifts them.

    Args:
        y: targets [B, L]; −100 is ignored.
        classes: C, the size of the vocabulary.
        numbers: logits in a chunk, tokens × C; at least one token goes into each. By default
            `CHUNK`.

    Raises:
        InputError: targets that are not [B, L].
    """

    def __init__(self, y: Tensor, classes: int, numbers: int | None = None):
        if y.dim() != 2:
            raise InputError(
                f"targets of shape {tuple(y.shape)} given to a model with logits for every token; "
                f"expected [B, L], a class per token, or {IGNORED} where there is none"
            )
        self.shape, flat = y.shape, y.flatten()
        self.index = (flat != IGNORED).nonzero().squeeze(1)
        self.targets = flat[self.index]
        numbers = CHUNK if numbers is None else numbers
        self._size = max(1, numbers // classes)
        # What is measured is measured in float64, and takes more arrays.
        self._measured_size = max(1, numbers // (4 * classes))

    def __len__(self) -> int:
        """How many they are."""
        return len(self.index)

    def of(self, values: Tensor) -> Tensor:
        """What belongs to them in [B, L, …], as [T, …].

        Raises:
            InputError: another B or L than the targets'.
        """
        self._check(values)
        return values.flatten(0, 1)[self.index]

    def chunks(self, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows [t, …] of each of the values [B, L, …] and their targets [t], chunk by chunk."""
        for value in values:
            self._check(value)
        for index, targets in self._split(self._measured_size):
            yield (*(value.flatten(0, 1)[index] for value in values), targets)

    def mean_loss(
        self, loss: SoftCrossEntropy, head: Head, *states: Tensor, kept: bool = False
    ) -> Tensor:
        """mean_t ℓ(head(x_t), y_t), summed over states x [B, L, d]; 0 where no token counts.

        As many states as fit into a chunk meet the head together. Every chunk is a checkpoint: its
        logits are made again in the backward pass. Besides the states themselves, which are kept, a
        few arrays of one chunk's logits are in memory at a time (the logits, their log-softmax,
        their gradients), whatever the numbers of layers and tokens. Where there is one chunk in all
        its logits may be `kept` instead, which takes no more at a time.
        """
        for x in states:
            self._check(x)
        together = max(1, self._size // max(1, len(self)))

        def part(index: Tensor, targets: Tensor, *some: Tensor) -> Tensor:
            rows = torch.cat([x.flatten(0, 1)[index] for x in some])
            values: Tensor = loss(widened(head(rows)), targets.repeat(len(some)))
            return values.sum()

        work = [
            (index, targets, *states[n : n + together])
            for n in range(0, len(states), together)
            for index, targets in self._split(self._size)
        ]
        run = part if kept and len(work) == 1 else partial(checkpoint, part, use_reentrant=False)
        parts = [run(*given) for given in work]
        return torch.stack(parts).sum() / max(len(self), 1)

    def measured(
        self,
        structure: Anatomy,
        inputs: Inputs,
        states: Sequence[Tensor],
        logits: Tensor | None,
        measure: Measure,
    ) -> tuple[Tensor, ...]:
        """Figures of all layers and of all tokens that count, [n, T] each.

        Args:
            structure: of the model.
            inputs: the batch that the states are of.
            states: the states x_0, x_1, ….
            logits: those of the last state of all, [B, L, C], to be a last row; None: no such row.
            measure: (z [t, C] in float64, targets [t]) ↦ figures [t].
        """
        rows = []
        for x in states:
            rows.append(
                [measure(structure.head(p, inputs).double(), to) for p, to in self.chunks(x)]
            )
        if logits is not None:
            rows.append([measure(z.double(), targets) for z, targets in self.chunks(logits)])
        by_layer = [[torch.cat(column) for column in zip(*row, strict=True)] for row in rows]
        return tuple(torch.stack(figure) for figure in zip(*by_layer, strict=True))

    def _split(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Of no tokens one chunk, which is empty: the sum over it has its place in the graph.
        return zip(torch.split(self.index, size), torch.split(self.targets, size), strict=True)

    def _check(self, values: Tensor) -> None:
        if values.shape[:2] != self.shape:
            raise InputError(
                f"targets of shape {tuple(self.shape)} given for tokens "
                f"{tuple(values.shape[:2])}; expected one for each"
            )


def drop_ignored(y: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Of the values of samples, [B, …] each, and then their targets: where it is not −100."""
    counts = y != IGNORED
    return (*values, y) if bool(counts.all()) else tuple(v[counts] for v in (*values, y))


def widened(logits: Tensor) -> Tensor:
    """Logits of half precision in float32: sums over a vocabulary, or a batch, need it."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
