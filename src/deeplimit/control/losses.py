"""What a loss says of a batch, and of each of its samples, whatever the loss knows."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.checks import IGNORED, fitted, shown
from deeplimit._anatomy.evaluation import device_of, pairs
from deeplimit._anatomy.inputs import FAILS, told
from deeplimit.control.batches import aligned, any_batches, labelled, part
from deeplimit.control.soft_cross_entropy import CountedTokens, SoftCrossEntropy, widened
from deeplimit.errors import InputError, several

Loss = SoftCrossEntropy | Callable[[Any, Any], Tensor]
Figures = dict[str, Tensor]

MANY = 2**26  # numbers of targets that are kept, to find the best constant answer to them
ROUNDING = 1000  # times the precision: what adding up in another order may change


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
    """Measures classifiers, whose samples, or tokens, have a class each, by a cross-entropy.

    It is `soft` where its minimisers are known.
    """

    of_classes = True

    def __init__(self, loss: SoftCrossEntropy | nn.CrossEntropyLoss | None):
        self.soft = loss if isinstance(loss, SoftCrossEntropy) else None
        self._smoothing = float(getattr(loss, "label_smoothing", 0.0))
        self._ignored = int(getattr(loss, "ignore_index", IGNORED))

    def batches(
        self, structure: Anatomy, loader: Iterable[Any], need: str, *, shift: bool
    ) -> Iterator[tuple[Any, Tensor]]:
        """The batches (x, y) of a loader on the model's device; y as `aligned` makes it.

        Of a batch that is a mapping y is what it calls "labels". Targets of another number that is
        ignored become −100. What `need`s samples needs one that counts.
        """
        counts = False
        for x, y in pairs(labelled(structure, loader), device_of(structure.model), need):
            y = aligned(structure, x, y.masked_fill(y == self._ignored, IGNORED), shift=shift)
            counts = counts or bool((y != IGNORED).any())
            yield x, y
        if not counts:
            raise InputError(f"every target is −100; {need}")

    def measured(
        self,
        structure: Anatomy,
        x: Any,
        y: Tensor,
        outputs: Sequence[Tensor],
        *states: Tensor,
        measure: Callable[[Tensor, Tensor], Figures] | None = None,
    ) -> Figures:
        """Figures [n, S] of the samples of a batch that count, by their names, and "targets" [S].

        Of states through the head, and of outputs behind them, of which there is one at least.
        They are the "loss" and the "guess", or what measure(z [S, C] in float64, targets [S]) says;
        where there are logits for every token it is asked in chunks of these.
        """
        measure = measure or self.figures
        if structure.tokens:
            counted = CountedTokens(y, outputs[0].shape[-1])
            head = partial(structure.head, inputs=x)
            rows = [counted.measured(s, measure, head) for s in states]
            rows += [counted.measured(z, measure) for z in outputs]
            targets = counted.targets
        else:
            y = (fitted if self.soft is None else self.soft.fitted)(outputs[0], y)
            counts, below = y != IGNORED, structure.logits(states, x=x) if states else ()
            targets = y[counts]
            rows = [measure(z[counts].double(), targets) for z in chain(below, outputs)]
        return _stacked(rows) | {"targets": targets.cpu()}

    def figures(self, z: Tensor, y: Tensor) -> Figures:
        """The "loss" of logits z [S, C], the largest as "guess", and whether that is "right"."""
        if self.soft is None:
            loss = F.cross_entropy(z, y, reduction="none", label_smoothing=self._smoothing)
        else:
            loss = self.soft(z, y)
        guess = z.argmax(-1)
        return {"loss": loss, "guess": guess, "right": guess == y}

    def apart(self, structure: Anatomy, y: Tensor, z: Tensor, w: Tensor) -> float:
        """The mean of KL(softmax z ‖ softmax w) over the samples that count."""
        counts, total = y != IGNORED, 0.0
        if structure.tokens:
            rows = CountedTokens(y, z.shape[-1]).chunks(z, w)
        else:
            rows = iter([(z[counts], w[counts], y)])
        for own, other, _ in rows:
            p, q = own.double().log_softmax(-1), other.double().log_softmax(-1)
            total += float(F.kl_div(q, p, reduction="sum", log_target=True))
        return total / max(int(counts.sum()), 1)

    def softness_and_minimum(self, classes: int) -> tuple[float, float]:
        """The loss's ε, 0 of one without minimisers, and the least value that it can take."""
        if self.soft is None and self._smoothing == 0:
            return 0.0, 0.0
        soft = self.soft or SoftCrossEntropy(classes, self._smoothing * (classes - 1) / classes)
        return (soft.softness if self.soft else 0.0), soft.minimum


class OtherLoss(nn.Module):
    """A loss ℓ(outputs, targets) of which nothing is known but the values it returns.

    A stage cost adds up its means over the batch. Samples are measured by a value of each (its mean
    over what comes behind the first dimension counts), or by that mean: a loss with a `reduction`
    is asked for "none" then, any other is called sample by sample. Where the loader gives mappings
    it is ℓ(outputs, batch).
    """

    of_classes, soft = False, None

    def __init__(self, function: Callable[[Any, Any], Tensor], tokens: bool = False):  # noqa: FBT001, FBT002
        """Made of the function; `tokens`: outputs are logits for every token, [B, L, C]."""
        super().__init__()
        check_callable(function)
        self.function, self.tokens = function, tokens

    def targets(self, structure: Anatomy, x: Any, y: Any, *, shift: bool, look: bool = True) -> Any:
        """What `mean` takes for y: of PyTorch's cross-entropy classes, as `aligned`."""
        classes = isinstance(y, Tensor) and not y.is_floating_point()
        if not (is_cross_entropy(self.function) and classes):
            check_unshifted(shift=shift)
            return y
        ignored = int(getattr(self.function, "ignore_index", IGNORED))
        y = aligned(structure, x, y.masked_fill(y == ignored, IGNORED), shift=shift, look=look)
        return y.masked_fill(y == IGNORED, ignored)

    def mean(self, z: Tensor, y: Any) -> Tensor:
        """ℓ(z, y); raises InputError unless it is one number.

        To PyTorch's cross-entropy, which takes classes as [B, C, L], logits [B, L, C] of targets
        [B, L] are given so.
        """
        last = z.dim() == 3 and isinstance(y, Tensor) and y.shape == z.shape[:2]
        if last and is_cross_entropy(self.function) and (self.tokens or y.shape[1] != z.shape[2]):
            z = z.movedim(-1, 1)
        value = self.function(z, y)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise InputError(
                f"the loss returned {shape} for outputs of shape {list(z.shape)}; expected one "
                "number, the mean over the batch (reduction='mean')"
            )
        return value

    def batches(
        self, structure: Anatomy, loader: Iterable[Any], need: str, *, shift: bool
    ) -> Iterator[tuple[Any, Any]]:
        """The batches (x, y) of a loader, as `any_batches`."""
        check_unshifted(shift=shift)
        return any_batches(structure, loader, need)

    def measured(
        self,
        structure: Anatomy,
        x: Any,
        y: Any,
        outputs: Sequence[Tensor],
        *states: Tensor,
        measure: Callable[[Tensor, Any], Figures] | None = None,
    ) -> Figures:
        """Figures [n, S] of the samples of a batch, of states through the head, and of outputs.

        Of tokens layer by layer: the outputs of all of them may not fit.
        """
        if structure.tokens:
            below: Iterable[Tensor] = (structure.logits([s], x=x)[0] for s in states)
        else:
            below = structure.logits(states, x=x) if states else ()
        return _stacked([(measure or self.figures)(z, y) for z in chain(below, outputs)])

    def figures(self, z: Tensor, y: Any) -> Figures:
        """The "loss" of each sample."""
        return {"loss": self.each(z, y)}

    def softness_and_minimum(self, _: int) -> tuple[float, float]:
        """Neither is known."""
        return math.nan, math.nan

    def each(self, z: Tensor, y: Any) -> Tensor:
        """The loss of each sample of a batch, in float64, if it is that or the mean of such."""
        z = widened(z)
        value = self._value(z, y)
        if value.dim():
            return value.reshape(len(value), -1).mean(1).double()
        count = len(z)
        singles = (slice(i, i + 1) for i in range(count))
        alone = torch.cat(
            [self._value(z[i], part(y, i, count)).double().flatten() for i in singles]
        )
        limit = ROUNDING * torch.finfo(value.dtype).eps * float(alone.abs().max())
        if len(alone) != count or bool((alone.mean() - value).abs() > limit):
            raise InputError(
                f"the loss of a batch is no mean of its samples' ({float(value):.4g}, their mean "
                f"is {float(alone.mean()):.4g}); return a value per sample instead "
                "(reduction='none')"
            )
        return alone

    def apart(self, _: Anatomy, _y: Any, z: Tensor, w: Tensor) -> float:
        """The mean of (z − w)²."""
        return float((z.double() - w.double()).square().mean())

    def _value(self, z: Tensor, y: Any) -> Tensor:
        function: Any = self.function
        if getattr(function, "reduction", None) == "mean":
            function = copy.copy(function)
            function.reduction = "none"
        try:
            value = function(z, y)
        except FAILS as error:
            raise InputError(
                f"the loss fails on outputs of shape {list(z.shape)}: {told(error)}"
            ) from error
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(
                f"the loss returned {shown(value)}; expected a tensor with a value per sample "
                "(reduction='none')"
            )
        if value.numel() > z.numel():
            raise InputError(
                f"the loss returned shape {list(value.shape)} for outputs of shape "
                f"{list(z.shape)}: it broadcast targets of another shape; give targets of theirs"
            )
        return value


def is_cross_entropy(loss: object) -> bool:
    """Tells whether it is PyTorch's cross-entropy."""
    return isinstance(loss, nn.CrossEntropyLoss) or loss is F.cross_entropy


def check_unshifted(*, shift: bool) -> None:
    """Raises InputError where targets are to be shifted of which nothing is known."""
    if shift:
        raise InputError(
            "shift=True given with a loss that knows no classes; leave it out, and shift the "
            "targets in the loss"
        )


SampleLoss = ClassLoss | OtherLoss


def sample_loss(loss: Loss | None) -> SampleLoss:
    """The loss of single samples, if it has such; None is the plain cross-entropy."""
    if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None:
        raise InputError(
            "the cross-entropy weighs classes: its mean is none of its samples'; give "
            "nn.CrossEntropyLoss() without weight, or a function that returns w[y] · ℓ of each "
            "sample"
        )
    if loss is F.cross_entropy:
        loss = None
    if loss is None or isinstance(loss, SoftCrossEntropy | nn.CrossEntropyLoss):
        return ClassLoss(loss)
    return OtherLoss(loss)


def _stacked(rows: Sequence[Figures]) -> Figures:
    return {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}


def joined(batches: Sequence[Figures]) -> Figures:
    """The figures of the samples of several batches."""
    return {name: torch.cat([batch[name] for batch in batches], -1) for name in batches[0]}


class ConstantAnswer:
    """The best constant answer to targets that have the form of the outputs.

    Tried are the mean of the targets, their median, and of targets from 0 to 1 the logit of the
    mean: what is best for squared and absolute errors, and for the binary cross-entropy of logits.
    """

    def __init__(self, loss: SampleLoss):
        self._loss = loss
        self._targets: list[Tensor] | None = []
        self._dtype = torch.float64

    def add(self, z: Tensor, y: Any) -> None:
        """Remembers the targets of a batch, up to `MANY` numbers in all."""
        fits = isinstance(y, Tensor) and y.shape == z.shape
        if self._targets is None or not fits:
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
        loss, every = cast(OtherLoss, self._loss), torch.cat(self._targets).double()
        mean = every.mean(0)
        answers = [mean, every.median(0).values]
        if bool(((every >= 0) & (every <= 1)).all()):
            answers.append(mean.logit(eps=1e-6))
        tried = [
            torch.cat([loss.each(z.expand(y.shape), y).cpu() for y in self._targets])
            for z in (answer.to(self._dtype) for answer in answers)
        ]
        return min(tried, key=lambda values: float(values.mean()))
