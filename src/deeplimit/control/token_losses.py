"""Losses of models with logits for every token: layer by layer, in chunks of tokens."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deeplimit._anatomy.anatomy import Head
from deeplimit._anatomy.checks import IGNORED
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.errors import InputError

CHUNK = 2**25  # logits at a time: 128 MiB in float32


class CountedTokens:
    """The tokens of a batch that count: those whose target in y [B, L] is not −100.

    Logits of layers, of C classes, meet the targets in chunks of tokens, of about `numbers` logits
    each, at least one token. Targets are aligned with the logits: for the next token the caller
    shifts them.
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

    def of(self, values: Tensor) -> Tensor:
        """Those of values [B, L, …], as [T, …]."""
        return self._flat(values)[self.index]

    def chunks(self, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows [t, …] of each of the values [B, L, …] and their targets [t], chunk by chunk."""
        flat = [self._flat(value) for value in values]
        for index, targets in self._split(self._measured_size):
            yield (*(value[index] for value in flat), targets)

    def measured(
        self,
        values: Tensor,
        measure: Callable[[Tensor, Tensor], dict[str, Tensor]],
        head: Head | None = None,
    ) -> dict[str, Tensor]:
        """Figures [T] of values [B, L, …]: measure(head(rows) in float64, targets), joined."""
        parts = [
            measure((rows if head is None else head(rows)).double(), targets)
            for rows, targets in self.chunks(values)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def mean_loss(
        self, loss: SoftCrossEntropy, head: Head, *states: Tensor, kept: bool = False
    ) -> Tensor:
        """mean_t ℓ(head(x_t), y_t) of each of n states x [B, L, d], [n]; 0 where no token counts.

        As many states as fit into a chunk meet the head together. Every chunk is a checkpoint: its
        logits are made again in the backward pass. Besides the states themselves, which are kept, a
        few arrays of one chunk's logits are in memory at a time (the logits, their log-softmax,
        their gradients), whatever the numbers of layers and tokens. Where there is one chunk in all
        its logits may be `kept` instead, which takes no more at a time.
        """
        flat = [self._flat(x) for x in states]
        together = max(1, self._size // max(1, len(self.index)))

        def part(index: Tensor, targets: Tensor, *some: Tensor) -> Tensor:
            rows = torch.cat([x[index] for x in some])
            values: Tensor = loss(widened(head(rows)), targets.repeat(len(some)))
            return values.view(len(some), len(targets)).sum(1)

        groups = [flat[n : n + together] for n in range(0, len(flat), together)]
        chunks = list(self._split(self._size))
        single = kept and len(groups) == len(chunks) == 1
        run = part if single else partial(checkpoint, part, use_reentrant=False)
        sums = [torch.stack([run(*chunk, *some) for chunk in chunks]).sum(0) for some in groups]
        return torch.cat(sums) / max(len(self.index), 1)

    def _split(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        # Of no tokens one chunk, which is empty: the sum over it has its place in the graph.
        return zip(torch.split(self.index, size), torch.split(self.targets, size), strict=True)

    def _flat(self, values: Tensor) -> Tensor:
        if values.shape[:2] != self.shape:
            raise InputError(
                f"targets of shape {tuple(self.shape)} given for tokens "
                f"{tuple(values.shape[:2])}; expected one for each"
            )
        return values.flatten(0, 1)


def widened(logits: Tensor) -> Tensor:
    """Logits of half precision in float32: sums over a vocabulary, or a batch, need it."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
