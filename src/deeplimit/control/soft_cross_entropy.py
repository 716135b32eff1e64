"""The soft cross-entropy: it has minimisers, and a distance to them; its mean over tokens."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit._anatomy.anatomy import Head
from deeplimit._anatomy.checks import IGNORED, check_count, check_number, classes_of, fitted, shown
from deeplimit.errors import InputError

Logits = Float[Tensor, "*batch classes"]
Targets = Int[Tensor, "*batch"]
Values = Float[Tensor, "*batch"]

CHUNK = 2**25  # logits of tokens at a time: 128 MiB in float32


class SoftCrossEntropy(nn.Module):
    """ℓ(z, y) = −Σ_c q_c log softmax(z)_c with q_y = 1 − ε and q_c = ε/(C−1) for c ≠ y.

    Unlike the cross-entropy it attains its minimum H(q), on the line

        Z*_y = { log q^{(y)} + α·1 : α ∈ ℝ },   ℓ(z, y) − H(q) = KL(q ‖ softmax z) ≥ 0.

    It does not change under z ↦ z + α1. PyTorch's `label_smoothing=s` is the same loss with
    ε = s(C−1)/C. Source: [PF24] arXiv 2405.19013.

    All values are per sample, in nats: logits [..., C] and integer targets [...] give [...]. A
    sample is a token where there are logits for every token, [B, L, C] and [B, L]. Where the target
    is −100 all values are 0, and `mean` leaves them out.

        >>> loss = SoftCrossEntropy(4, softness=0.1)
        >>> bool(loss(torch.zeros(4), torch.tensor(2)) > loss.minimum)
        True

    Args:
        classes: C ≥ 2.
        softness: 0 < ε < 1 − 1/C. At ε = 0 there is no minimiser, at 1 − 1/C no class is preferred.

    Raises:
        InputError: C or ε out of range.
    """

    def __init__(self, classes: int, softness: float = 0.05):
        super().__init__()
        self.classes = check_count("the number of classes (it needs at least 2)", classes, 2)
        most = 1 - 1 / self.classes
        expected = (
            f"a number; with {self.classes} classes it must lie between 0 and "
            f"1 − 1/C = {most:.4g}, both excluded"
        )
        self.softness = check_number("softness", softness, expected, lambda s: 0 < s < most)

    @property
    def other(self) -> float:
        """The probability ε/(C−1) of each class that is not the target's."""
        return self.softness / (self.classes - 1)

    @property
    def minimum(self) -> float:
        """H(q) = −(1−ε) log(1−ε) − ε log(ε/(C−1))."""
        own, others = math.log1p(-self.softness), math.log(self.other)
        return -(1 - self.softness) * own - self.softness * others

    @property
    def contrast(self) -> float:
        """The height of the target's logit above the others on Z*_y: log((1−ε)(C−1)/ε)."""
        return math.log((1 - self.softness) / self.other)

    def forward(self, logits: Logits, targets: Targets) -> Values:
        """ℓ(z, y) for each sample."""
        targets = self.fitted(logits, targets)
        smoothing = self.softness * self.classes / (self.classes - 1)
        values: Tensor = F.cross_entropy(
            logits.reshape(-1, self.classes),
            targets.reshape(-1),
            reduction="none",
            label_smoothing=smoothing,
        )
        return values.reshape(targets.shape)

    def mean(self, logits: Logits, targets: Targets) -> Float[Tensor, ""]:
        """The mean of ℓ(z, y) over the samples that count; 0 where none does."""
        targets = classes_of(targets)
        values: Tensor = self(logits, targets)
        return values.sum() / (targets != IGNORED).sum().clamp(min=1)

    def excess(self, logits: Logits, targets: Targets) -> Values:
        """ℓ(z, y) − H(q) = KL(q ‖ softmax z) for each sample, without cancellation near 0.

        With g_c = log q_c − log softmax(z)_c and Σ q = Σ softmax = 1 it is
        Σ_c q_c (e^{−g_c} − 1 + g_c), a sum of terms that are each ≥ 0.
        """
        targets = self.fitted(logits, targets)
        log_q = self.minimiser(targets, logits.dtype)
        gap = log_q - logits.log_softmax(-1)
        values: Tensor = (log_q.exp() * (torch.expm1(-gap) + gap)).sum(-1)
        return values.masked_fill(targets == IGNORED, 0)

    def minimiser(self, targets: Targets, dtype: torch.dtype | None = None) -> Logits:
        """The point log q^{(y)} of Z*_y, whose exponentials sum to 1; some point for y = −100."""
        targets = classes_of(targets)
        targets = targets.masked_fill(targets == IGNORED, 0)
        own = F.one_hot(targets, self.classes).to(dtype or torch.get_default_dtype())
        point: Tensor = own * self.contrast + math.log(self.other)
        return point

    def distance(self, logits: Logits, targets: Targets) -> Values:
        """dist(z, Z*_y) = ‖P(z − log q^{(y)})‖ for each sample, P = I − 11ᵀ/C."""
        targets = self.fitted(logits, targets)
        apart = logits - self.minimiser(targets, logits.dtype)
        values: Tensor = torch.linalg.vector_norm(apart - apart.mean(-1, keepdim=True), dim=-1)
        return values.masked_fill(targets == IGNORED, 0)

    def fitted(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The targets as whole numbers of 64 bits.

        Raises:
            InputError: logits of other classes, or targets that do not fit them.
        """
        if logits.shape[-1:] != (self.classes,):
            raise InputError(
                f"logits of shape {tuple(logits.shape)} given; expected [..., {self.classes}], the "
                "classes last"
            )
        return fitted(logits, targets)

    def extra_repr(self) -> str:
        """Classes and softness."""
        return f"classes={self.classes}, softness={self.softness:g}"


def check_loss(loss: object) -> SoftCrossEntropy:
    """The loss; raises InputError unless it is one whose minimisers are known."""
    if not isinstance(loss, SoftCrossEntropy):
        raise InputError(
            f"{shown(loss)} given as the loss; expected a SoftCrossEntropy, which has minimisers: "
            "deeplimit.SoftCrossEntropy(classes, softness=0.05)"
        )
    return loss


class CountedTokens:
    """The tokens of a batch that count: those whose target in y [B, L] is not −100.

    Logits of layers, of C classes, meet the targets in chunks of tokens, of about `CHUNK` logits
    each, at least one token. Targets are aligned with the logits: for the next token the caller
    shifts them.
    """

    def __init__(self, y: Tensor, classes: int):
        if y.dim() != 2:
            raise InputError(
                f"targets of shape {tuple(y.shape)} given to a model with logits for every token; "
                f"expected [B, L], a class per token, or {IGNORED} where there is none"
            )
        self.shape, flat = y.shape, y.flatten()
        self.index = (flat != IGNORED).nonzero().squeeze(1)
        self.targets = flat[self.index]
        self._size = max(1, CHUNK // classes)
        # What is measured is measured in float64, and takes more arrays.
        self._measured_size = max(1, CHUNK // (4 * classes))

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
