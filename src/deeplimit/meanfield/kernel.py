"""The kernel of each layer's features on the data: a rate that is known before training."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, chain_stacks, model_of, of_family
from deeplimit._anatomy.evaluation import Inputs, device_of, evaluating, to_device
from deeplimit.errors import InputError
from deeplimit.meanfield.frame import check_batch
from deeplimit.meanfield.particles import ParticleLayer, particle_layers
from deeplimit.network.blocks import check_values
from deeplimit.records import Record
from deeplimit.tables import number, table


@dataclass(frozen=True)
class FeatureKernel(Record):
    """The kernels of a network's layers on data, and the rate that they give.

    Attributes:
        smallest: λ_min(K_n) for each layer n; 0 where it cannot be told from rounding.
        widths: M_n.
        samples: D.
        lipschitz: L_x = Σ_n h max_i ‖∂φ_n/∂x (x_n^i)‖, along the samples' states.
        attenuation: for each layer n the least factor, of any sample, by which the layers behind it
            multiply ‖∂L/∂x‖²: min_i Π_{l>n} s_min(I + h ∂φ_l/∂x (x_l^i))², 1 for the last; at least
            e^{−2L_x} in the limit.
        head: the least factor by which the head does: the square of its smallest singular value.
        m: at least head · mean_n(smallest · attenuation) / D.
        verdict: one line: whether the width was shown to suffice, and if not, why not. That a
            layer's kernel is positive definite is sufficient for a rate, and not necessary.
    """

    smallest: tuple[float, ...]
    widths: tuple[int, ...]
    samples: int
    lipschitz: float
    attenuation: tuple[float, ...]
    head: float
    m: float
    verdict: str

    def __str__(self) -> str:
        """The verdict, and a row for each layer."""
        columns = enumerate(zip(self.widths, self.smallest, self.attenuation, strict=True))
        rows = [(str(n), str(m), number(value), number(a)) for n, (m, value, a) in columns]
        return f"{self.verdict}\n{table(('layer', 'particles', 'λ_min', 'attenuation'), rows)}"


def feature_kernel(model: nn.Module | Anatomy, x: Inputs) -> FeatureKernel:
    """K_n(i, j) = (1/M) Σ_k σ(w_k·x_n^i + b_k) σ(w_k·x_n^j + b_k) on data, and the m it gives.

    With trained output weights and the squared error L = 1/(2D) Σ_i ‖z^i − y^i‖² on D samples the
    gradient in u = N·M·h·V alone has, with p_n^i = ∂L/∂x_n^i,

        ‖∇L‖²_μ ≥ (1/N) Σ_n Σ_ij K_n(i, j) p_{n+1}^i·p_{n+1}^j ≥ (1/N) Σ_n λ_n Σ_i ‖p_{n+1}^i‖².

    The layers behind layer n made p_{n+1} of p_N, ‖p_{n+1}^i‖² ≥ a_n^i ‖p_N^i‖², and the head made
    Σ_i ‖p_N^i‖² ≥ s_H² 2L/D, so that

        ‖∇L‖²_μ ≥ 2 m L,    m = s_H²/D · min_i (1/N) Σ_n λ_n a_n^i,
        a_n^i = Π_{l>n} s_min(I + h ∂φ_l/∂x (x_l^i))²,    a_{N−1}^i = 1,

    with λ_n = λ_min(K_n) and smallest singular values s, at the network as it is. Each a_n becomes
    e^{−2L_x} or more as h → 0, and m [BPV24]'s e^{−2L_x} min_n λ_n/D or more. For
    (1/D) Σ ‖z − y‖² m is twice that, for PyTorch's `mse_loss` 2/C times; for other losses K_n says
    whether the width suffices, not m. K_n has rank M_n at most: λ_n = 0 where M_n < D or two
    samples have the same state, and m = 0, which shows nothing, where that is so in every layer.
    In float32 an eigenvalue below D·10⁻⁷ of the largest counts as 0. What [BPV24] needs besides,
    that the risk at initialisation is small, the budget of `certify_convergence` says.

        >>> kernel = feature_kernel(model, x)
        >>> kernel.widths, kernel.m > 0, kernel.attenuation[-1]
        ((4, 4), True, 1.0)

    Args:
        model: a chain of two-layer residuals, or a classifier of one stage of them with a linear
            head or none.
        x: the D samples, as the model takes them; time goes as N·D·(D·(M + D) + d³), and D·d²
            numbers of one layer's Jacobians are in memory at a time.

    Raises:
        InputError: another network, one whose layers share their output weights, samples of another
            shape or precision, fewer than two of them, or numbers that are not finite.

    Source: [BPV24] arXiv 2403.12887; layer by layer, with the attenuation of finitely many layers
    in place of e^{−2L_x}.
    """
    model = model_of(model)
    check_values(model.named_parameters())
    read, chains = of_family(model), chain_stacks(model)
    if len(chains) != 1 or read is None:
        raise InputError(
            f"the kernel of {type(model).__name__} is not known here; expected a ResidualChain, or "
            "a ResidualClassifier of one stage"
        )
    layers, h = particle_layers(model, trained=True), chains[0].step
    for layer in layers:
        rows = [layer.block.get_submodule(path) for path in layer.neurons.rows]
        if len(rows) > 1 or not isinstance(rows[0], nn.Linear):
            raise InputError(
                f"the kernel of a {type(layer.block).__name__} is not known here; expected "
                "residuals V σ(W x + b), such as TwoLayerResidual"
            )
    outer = {layer.block.get_submodule(layer.neurons.columns).weight for layer in layers}
    if len(outer) < len(layers):
        raise InputError(
            "layers share their output weights, so that their gradients may cancel and the kernels "
            "bound nothing; expected layers with weights of their own"
        )
    head, example = _head_factor(read), read.example()
    size = dict(layers[0].reading.layout.parts)["w"]
    check_batch(read, x, example.shape[1:] if isinstance(example, Tensor) else size)
    with evaluating(model), torch.no_grad():
        states, _ = read.states(to_device(x, device_of(model)))
        _check_states(states)
        pairs = list(zip(layers, states, strict=False))
        found = [_smallest(_features(layer, state)) for layer, state in pairs]
        slopes = [_slopes(layer.block, state, h) for layer, state in pairs]
    samples, lipschitz = len(states[0]), sum(h * steepest for steepest, _ in slopes)
    # a_n^i = Π_{l>n} s_l^i²: of the layers that a gradient has passed at layer n.
    squares = torch.stack(
        [least.square() for _, least in slopes[1:]] + [torch.ones_like(slopes[0][1])]
    )
    factors = squares.flip(0).cumprod(0).flip(0)
    eigenvalues = torch.tensor(found, dtype=factors.dtype, device=factors.device)
    m = head * float((eigenvalues[:, None] * factors).mean(0).min()) / samples
    attenuation = tuple(factors.amin(1).tolist())
    widths = tuple(len(layer.reading.particles) for layer in layers)
    verdict = _verdict(found, widths, samples, head, m)
    return FeatureKernel(tuple(found), widths, samples, lipschitz, attenuation, head, m, verdict)


def _head_factor(read: Anatomy) -> float:
    """The least ‖∂z/∂xᵀ p‖² for ‖p‖ = 1."""
    _, head = read.stem_and_head or (None, None)
    if isinstance(head, nn.Identity):
        return 1.0
    if not isinstance(head, nn.Linear):
        raise InputError(f"the head is {type(head).__name__}; expected a linear head, or none")
    classes, width = head.weight.shape
    least = torch.linalg.svdvals(head.weight.detach().double())[-1]
    return 0.0 if classes > width else float(least) ** 2


def _check_states(states: list[Tensor]) -> None:
    shape = list(states[0].shape)
    if len(shape) != 2 or shape[0] < 2:
        what = (
            f"states of shape {shape} found; the kernel needs [samples, d], one vector per sample"
        )
        if len(shape) == 2:
            what = (
                f"a batch of {shape[0]} given; the kernel needs at least 2 samples, at best all "
                "that the risk is the mean of"
            )
        raise InputError(what)
    if not all(bool(torch.isfinite(state).all()) for state in states):
        raise InputError("the states are not finite; check the data, or take smaller weights")


def _features(layer: ParticleLayer, x: Float[Tensor, "samples d"]) -> Float[Tensor, "samples m"]:
    """σ(W x + b), as the block computes it: there may be a norm before W."""
    seen: list[Tensor] = []
    sigma = layer.block.get_submodule(layer.neurons.activation)
    handle = sigma.register_forward_hook(lambda _, __, features: seen.append(features))
    try:
        layer.block(x)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape[:1] != x.shape[:1]:
        raise InputError(
            f"{type(layer.block).__name__} computes its features {len(seen)} times; expected once, "
            "as V σ(W x + b) does"
        )
    return seen[0]


def _smallest(features: Float[Tensor, "samples m"]) -> float:
    """λ_min(F Fᵀ/M), 0 if it may be rounding."""
    samples, width = features.shape
    if width < samples:
        return 0.0
    own = features.double()
    values = torch.linalg.eigvalsh(own @ own.T / width)
    rounding = samples * torch.finfo(features.dtype).eps * float(values[-1])
    return float(values[0]) if float(values[0]) > rounding else 0.0


def _slopes(
    block: nn.Module, x: Float[Tensor, "samples d"], h: float
) -> tuple[float, Float[Tensor, " samples"]]:
    """max_i ‖∂φ/∂x (x^i)‖, and s_min(I + h ∂φ/∂x (x^i)) of each sample."""
    jacobian = torch.func.vmap(torch.func.jacrev(block))(x).double()
    identity = torch.eye(x.shape[1], dtype=jacobian.dtype, device=jacobian.device)
    least = torch.linalg.svdvals(identity + h * jacobian)[:, -1]
    return float(torch.linalg.matrix_norm(jacobian, 2).max()), least


def _verdict(
    smallest: list[float], widths: tuple[int, ...], samples: int, head: float, m: float
) -> str:
    if 0 < m < math.inf:
        worst = min(range(len(smallest)), key=smallest.__getitem__)
        singular = sum(value == 0 for value in smallest)
        besides = f"; {singular} of {len(smallest)} layers add nothing" if singular else ""
        return (
            f"the width suffices for {samples} samples at this start: m ≥ {m:.3g} "
            f"(λ_min = {smallest[worst]:.3g}, in layer {worst}{besides})"
        )
    why = "a layer does not let the gradient through (singular I + h ∂φ/∂x)"
    if max(widths) < samples:
        why = (
            f"no layer has more than {max(widths)} particles for {samples} samples, so that every "
            f"layer's kernel is singular; {samples} or more per layer are sufficient, not "
            "necessary: layers whose kernels are singular may have one between them that is not"
        )
    elif not any(smallest):
        why = (
            "every layer's kernel is singular to working precision; take more particles, samples "
            "that differ, or float64"
        )
    elif head == 0:
        why = "the head has more outputs than the state has numbers"
    return f"no rate is guaranteed: {why}"
