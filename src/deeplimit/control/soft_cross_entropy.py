"""The soft cross-entropy: a cross-entropy that has minimisers, and the distance to them."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deeplimit._anatomy.checks import IGNORED, check_count, check_number, classes_of, fitted, shown
from deeplimit.errors import InputError

Logits = Float[Tensor, "*batch classes"]
Targets = Int[Tensor, "*batch"]
Values = Float[Tensor, "*batch"]


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
