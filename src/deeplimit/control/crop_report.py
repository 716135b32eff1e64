"""What a cut changed, measured on held-out data."""

from dataclasses import dataclass

from deeplimit.control.verdict import Verdict


@dataclass(frozen=True)
class CropReport:
    """A network before and after a cut, on the same held-out samples.

    Where there are logits for every token the samples of `samples`, accuracy, loss and agreement
    are tokens (exp(loss) is the perplexity, if the loss is the plain cross-entropy), those of
    multiply-adds and latency whole texts.

    Attributes:
        samples: number of samples compared.
        horizon_before, horizon_after: residual steps (blocks) of the network.
        accuracy_before, accuracy_after: fractions in [0, 1].
        accuracy_error: standard error of accuracy_after − accuracy_before, paired by sample.
        loss_before, loss_after: mean loss in nats.
        agreement: fraction of samples for which both predict the same class.
        parameters_before, parameters_after: numbers of parameters.
        multiply_adds_before, multiply_adds_after: for one sample.
        latency_before, latency_after: median seconds of a forward pass of `latency_batch` samples,
            the two networks timed in turns; one number where they are alike but for their weights.
        latency_batch: samples in a timed batch.
        device: where the latency was measured, as torch names it.
        verdict: what the samples say of the accuracy lost; of tokens it rests on texts. None in a
            report saved before there was one.
    """

    samples: int
    horizon_before: int
    horizon_after: int
    accuracy_before: float
    accuracy_after: float
    accuracy_error: float
    loss_before: float
    loss_after: float
    agreement: float
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int
    latency_before: float
    latency_after: float
    latency_batch: int
    device: str
    verdict: Verdict | None = None
