"""Losses: what a stage cost adds up, and what a loss says of single samples."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.checks import IGNORED, fitted, shown
from deeplimit._anatomy.inputs import FAILS, told
from deeplimit.control.batches import aligned_batches, any_batches, part
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.control.token_losses import CountedTokens, drop_ignored, widened
from deeplimit.errors import InputError, several

Loss = SoftCrossEntropy | Callable[[Any, Any], Tensor]

MANY = 2**26  # numbers of targets that are kept, to find the best constant answer to them
ROUNDING = 1000  # times the precision: what adding up in another order may change


class AnyLoss(nn.Module):
    """ℓ(z, y), a number: what a stage cost adds up of a loss whose minimisers are not known.

    Args:
        function: called with what the model answers to a state, of the form of its own answer, and
            with the batch's targets as they were given; it returns a scalar tensor, the mean over
            the batch.

    Raises:
        InputError: no function, or a class of losses; when it is called: what it returns is no
            scalar.
    """

    def __init__(self, function: Callable[[Any, Any], Tensor]):
        super().__init__()
        check_callable(function)
        self.function = function

    def mean(self, z: Tensor, y: Any) -> Tensor:
        """ℓ(z, y)."""
        value = self.function(z, y)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise InputError(
                f"the loss returned {shape} for outputs of shape {list(z.shape)}; expected one "
                "number, the mean over the batch (reduction='mean')"
            )
        return value


def as_loss(loss: Loss) -> SoftCrossEntropy | AnyLoss:
    """The loss of a stage cost.

    Raises:
        InputError: as `AnyLoss`.
    """
    return loss if isinstance(loss, SoftCrossEntropy) else AnyLoss(loss)


def check_losses(values: Tensor) -> None:
    """Raises InputError where a sample's loss of the network itself is not finite.

    Means with it decide nothing: NaN compares as false, and infinity hides all other samples.
    """
    bad = int((~values.isfinite()).sum())
    if bad:
        raise InputError(
            f"the loss of {several(bad, 'sample')} of {len(values)} is not finite with the network "
            "as it is; leave these samples out, or look at their targets and at the loss"
        )


def check_callable(loss: object) -> None:
    """Raises InputError unless it can be called with outputs and targets."""
    if isinstance(loss, type) or not callable(loss):
        raise InputError(
            f"{shown(loss)} given as the loss; expected SoftCrossEntropy(classes), or a "
            "function or module ℓ(outputs, targets) that returns the mean over the batch"
        )


class ClassLoss:
    """What is measured of classifiers, whose samples have a class each, tokens too.

    Args:
        loss: a soft cross-entropy, `nn.CrossEntropyLoss`, or None for the plain cross-entropy.
    """

    of_classes = True

    def __init__(self, loss: SoftCrossEntropy | nn.CrossEntropyLoss | None):
        self.soft = loss if isinstance(loss, SoftCrossEntropy) else None
        self._plain = nn.CrossEntropyLoss() if loss is None or self.soft else _single(loss)
        self._ignored = getattr(self._plain, "ignore_index", IGNORED)

    def batches(
        self, structure: Anatomy, loader: Iterable[Any], need: str, *, shift: bool
    ) -> Iterator[tuple[Any, Tensor]]:
        """The batches (x, y) of a loader, as `aligned_batches`."""
        return aligned_batches(structure, loader, need, shift=shift, ignored=self._ignored)

    def fitted(self, z: Tensor, y: Tensor) -> Tensor:
        """The targets; raises InputError where they are none of these logits."""
        return fitted(z, y) if self.soft is None else self.soft.fitted(z, y)

    def rows(self, structure: Anatomy, y: Tensor, *outputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Logits [S, C] of each of the outputs, and targets [S], of samples that count.

        Where there are logits for every token they come in chunks.
        """
        if structure.tokens:
            return CountedTokens(y, outputs[0].shape[-1]).chunks(*outputs)
        return iter([drop_ignored(y, *outputs)])

    def each(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample, for logits [..., S, C] and targets [..., S], in float64."""
        z = z.double()
        if self.soft is not None:
            return cast(Tensor, self.soft(z, y))
        weight, smoothing = self._plain.weight, self._plain.label_smoothing
        values: Tensor = F.cross_entropy(
            z.flatten(0, -2),
            y.flatten(),
            weight=None if weight is None else weight.double(),
            reduction="none",
            label_smoothing=smoothing,
        )
        return values.reshape(y.shape)

    def apart(self, z: Tensor, w: Tensor) -> Tensor:
        """Σ KL(softmax z ‖ softmax w) over samples."""
        own, other = z.double().log_softmax(-1), w.double().log_softmax(-1)
        return F.kl_div(other, own, reduction="sum", log_target=True)

    def softness_and_minimum(self, classes: int) -> tuple[float, float]:
        """The loss's ε, 0 of one without, and the least value that it can take."""
        smoothing = self._plain.label_smoothing
        if self.soft is None and (smoothing == 0 or self._plain.weight is not None):
            return 0.0, 0.0
        soft = self.soft or SoftCrossEntropy(classes, smoothing * (classes - 1) / classes)
        return (soft.softness if self.soft else 0.0), soft.minimum


class OtherLoss:
    """What is measured with a loss of which nothing is known but the values it returns.

    Args:
        loss: ℓ(outputs, targets), or ℓ(outputs, batch) where the loader gives mappings. It returns
            a value per sample (its mean over what comes behind the first dimension counts), or the
            mean over the batch: a loss with a `reduction` is asked for "none" then, any other is
            called sample by sample.
    """

    of_classes = False
    soft = None

    def __init__(self, loss: Callable[[Any, Any], Tensor]):
        check_callable(loss)
        self._function = _single(loss)

    def batches(
        self, structure: Anatomy, loader: Iterable[Any], need: str, *, shift: bool
    ) -> Iterator[tuple[Any, Any]]:
        """The batches (x, y) of a loader, y as it is, as `any_batches`."""
        if shift:
            raise InputError(
                "shift=True given with a loss that knows no classes; leave it out, and shift the "
                "targets in the loss"
            )
        return any_batches(structure, loader, need)

    def fitted(self, _: Tensor, y: Any) -> Any:
        """The targets as they are."""
        return y

    def rows(self, _: Anatomy, y: Any, *outputs: Tensor) -> Iterator[tuple[Any, ...]]:
        """The outputs and the targets as they are."""
        return iter([(*outputs, y)])

    def each(self, z: Tensor, y: Any) -> Tensor:
        """The loss of each sample of a batch, in float64.

        Raises:
            InputError: what it returns is no value per sample, and no mean of such values.
        """
        z = widened(z)
        value = self._value(z, y)
        if value.dim():
            return value.reshape(len(value), -1).mean(1).double()
        count = len(z)
        singles = (slice(i, i + 1) for i in range(count))
        values = [self._value(z[i], part(y, i, count)).double() for i in singles]
        if any(v.numel() != 1 for v in values):
            raise InputError(_no_samples("does not take single samples"))
        alone = torch.stack([v.reshape(()) for v in values])
        limit = ROUNDING * torch.finfo(value.dtype).eps * float(alone.abs().max())
        if bool((alone.mean() - value).abs() > limit):
            means = f"{float(value):.4g}, their mean is {float(alone.mean()):.4g}"
            raise InputError(_no_samples(f"of a batch is no mean of its samples' ({means})"))
        return alone

    def apart(self, z: Tensor, w: Tensor) -> Tensor:
        """Σ_i mean ‖z_i − w_i‖² over samples, the mean over an answer's numbers."""
        return (z.double() - w.double()).square().flatten(1).mean(1).sum()

    def _value(self, z: Tensor, y: Any) -> Tensor:
        try:
            value = self._function(z, y)
        except FAILS as error:
            raise InputError(
                f"the loss fails on outputs of shape {list(z.shape)}: {told(error)}"
            ) from error
        if isinstance(value, Tensor) and value.numel() > z.numel():
            raise InputError(
                f"the loss returned shape {list(value.shape)} for outputs of shape "
                f"{list(z.shape)}: it broadcast targets of another shape; give targets of theirs"
            )
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(
                f"the loss returned {shown(value)}; expected a tensor with a value per sample "
                "(reduction='none')"
            )
        return value


SampleLoss = ClassLoss | OtherLoss


def sample_loss(loss: Loss | None) -> SampleLoss:
    """What a loss says of single samples; None is the plain cross-entropy.

    Raises:
        InputError: it is none.
    """
    if loss is F.cross_entropy:
        loss = None
    if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None:
        raise InputError(
            "the cross-entropy weighs classes: its mean is none of its samples'; give "
            "nn.CrossEntropyLoss() without weight, or a function that returns w[y] · ℓ of each "
            "sample"
        )
    if loss is None or isinstance(loss, SoftCrossEntropy | nn.CrossEntropyLoss):
        return ClassLoss(loss)
    return OtherLoss(loss)


class ConstantAnswer:
    """The best constant answer to targets that have the form of the outputs.

    Tried are the mean of the targets, their median, and of targets from 0 to 1 the logit of the
    mean: what is best for squared and absolute errors, and for the binary cross-entropy of logits.
    """

    def __init__(self, loss: SampleLoss):
        self._loss = loss
        self._targets: list[Tensor] | None = None if loss.of_classes else []
        self._dtype = torch.float64

    def add(self, z: Tensor, y: Any) -> None:
        """Remembers the targets of a batch, up to `MANY` numbers in all."""
        if self._targets is None:
            return
        if not isinstance(y, Tensor) or y.shape != z.shape:
            self._targets = None
            return
        self._targets.append(y)
        self._dtype = widened(z).dtype
        if sum(map(torch.numel, self._targets)) > MANY:
            self._targets = None

    def losses(self) -> Tensor | None:
        """The loss of the best of these on each sample; None where no answer is one."""
        if not self._targets:
            return None
        every = torch.cat(self._targets).double()
        mean = every.mean(0)
        answers = [mean, every.median(0).values]
        if bool(((every >= 0) & (every <= 1)).all()):
            answers.append(mean.logit(eps=1e-6))
        tried = []
        for answer in answers:
            z = answer.to(self._dtype)
            values = [self._loss.each(z.expand(y.shape), y).cpu() for y in self._targets]
            tried.append(torch.cat(values))
        return min(tried, key=lambda values: float(values.mean()))


def _single(loss: Any) -> Any:
    """The loss with a value per sample, where it can be asked for that."""
    if getattr(loss, "reduction", None) != "mean":
        return loss
    loss = copy.copy(loss)
    loss.reduction = "none"
    return loss


def _no_samples(what: str) -> str:
    return f"the loss {what}; return a value per sample instead (reduction='none')"
