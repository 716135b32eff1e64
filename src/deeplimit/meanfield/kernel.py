"""The kernel of each layer's features on the data: whether the width suffices, before training."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.meanfield.coordinates import particle_layers
from deeplimit.meanfield.neurons import find_neurons
from deeplimit.network import ResidualChain, ResidualClassifier, anatomy
from deeplimit.network.modes import Inputs, device_of, evaluating, to_device
from deeplimit.network.parameter_groups import check_values


@dataclass(frozen=True)
class FeatureKernel:
    """What `feature_kernel` finds.

    Attributes:
        smallest: λ_min(K_n) for each layer n; 0 where it cannot be told from rounding.
        widths: M_n.
        samples: D.
        lipschitz: L_x = Σ_n h max_i ‖∂φ_n/∂x (x_n^i)‖, along the samples' states.
        attenuation: the least factor by which the layers multiply ‖∂L/∂x‖², of any sample; at least
            e^{−2L_x} in the limit.
        head: the least factor by which the head does: the square of its smallest singular value.
        m: head · attenuation · min_n λ_min(K_n) / D.
        verdict: one line: whether the width suffices, and if not, which layer's does not.
    """

    smallest: tuple[float, ...]
    widths: tuple[int, ...]
    samples: int
    lipschitz: float
    attenuation: float
    head: float
    m: float
    verdict: str


def feature_kernel(model: nn.Module, x: Inputs) -> FeatureKernel:
    """K_n(i, j) = (1/M) Σ_k σ(w_k·x_n^i + b_k) σ(w_k·x_n^j + b_k) on data, and the m it gives.

    With trained output weights and the squared error L = 1/(2D) Σ_i ‖z^i − y^i‖² on D samples the
    gradient in u = N·M·h·V alone has, with p_n^i = ∂L/∂x_n^i,

        ‖∇L‖²_μ ≥ (1/N) Σ_n Σ_ij K_n(i, j) p_{n+1}^i·p_{n+1}^j ≥ min_n λ_min(K_n) Σ_i ‖p_{n+1}^i‖²,

    and ‖p_N‖² is at most a head's and the later layers' factor above ‖p_{n+1}‖², so that

        ‖∇L‖²_μ ≥ 2 m L,    m = s_H² · min_i Π_{n≥1} s_min(I + h ∂φ_n/∂x (x_n^i))² · min_n λ_n / D

    with smallest singular values s, at the network as it is. The product is what becomes e^{−2L_x}
    or more as h → 0. For (1/D) Σ ‖z − y‖² m is twice that, for PyTorch's `mse_loss` 2/C times; for
    other losses, the soft cross-entropy say, K_n says whether the width suffices, not m. K_n has
    rank M at most: m = 0 whenever M < D, or where two samples have the same state. In float32 an
    eigenvalue below D·10⁻⁷ of the largest counts as 0.

    The output weights V do not enter K_n but do enter the product, by layers of large slope.
    What [BPV24] needs besides, that the risk at initialisation is small, the budget of
    `convergence_certificate` says.

    Args:
        model: a chain of two-layer residuals, or a classifier of one stage of them with a linear
            head or none.
        x: the D samples, as the model takes them; time goes as N·D²·(M + D).

    Raises:
        InputError: another network, fewer than two samples, or numbers that are not finite.

    Source: [BPV24] arXiv 2403.12887; with the attenuation of finitely many layers in place of
    e^{−2L_x}.
    """
    check_values(model.named_parameters())
    layers = particle_layers(model)
    chain = _chain(model)
    head = _head_factor(model)
    with evaluating(model), torch.no_grad():
        states, _ = anatomy(model).states(to_device(x, device_of(model)))
        samples = _samples(states)
        found = [
            _smallest(_features(block, state)) for block, state in zip(chain, states, strict=False)
        ]
        jacobians = [_jacobian(b, state) for b, state in zip(chain, states, strict=False)]
    lipschitz = sum(chain.step * float(torch.linalg.matrix_norm(j, 2).max()) for j in jacobians)
    attenuation = _attenuation(jacobians, chain.step)
    m = head * attenuation * min(found) / samples
    widths = tuple(layer.width for layer in layers)
    verdict = _verdict(found, widths, samples, head, m)
    return FeatureKernel(tuple(found), widths, samples, lipschitz, attenuation, head, m, verdict)


def _chain(model: nn.Module) -> ResidualChain:
    """The one chain, of residuals with one linear first layer.

    Raises:
        InputError: there is not just one, or it is of other blocks.
    """
    chains = [module for module in model.modules() if isinstance(module, ResidualChain)]
    if len(chains) != 1 or not isinstance(model, ResidualChain | ResidualClassifier):
        raise InputError(
            f"the kernel of {type(model).__name__} is not known here; expected a ResidualChain, or "
            "a ResidualClassifier of one stage"
        )
    for block in chains[0]:
        rows = find_neurons(block).rows
        if len(rows) > 1 or not isinstance(block.get_submodule(rows[0]), nn.Linear):
            raise InputError(
                f"the kernel of a {type(block).__name__} is not known here; expected residuals "
                "V σ(W x + b), such as TwoLayerResidual"
            )
    return chains[0]


def _head_factor(model: nn.Module) -> float:
    """The least ‖∂z/∂xᵀ p‖² for ‖p‖ = 1."""
    head = model.head if isinstance(model, ResidualClassifier) else nn.Identity()
    if isinstance(head, nn.Identity):
        return 1.0
    if not isinstance(head, nn.Linear):
        raise InputError(f"the head is {type(head).__name__}; expected a linear head, or none")
    classes, width = head.weight.shape
    if classes > width:
        return 0.0
    return float(torch.linalg.svdvals(head.weight.detach().double())[-1]) ** 2


def _samples(states: list[Tensor]) -> int:
    first = states[0]
    if first.dim() != 2:
        raise InputError(
            f"states of shape {list(first.shape)} found; the kernel needs [samples, d], one vector "
            "per sample"
        )
    if len(first) < 2:
        raise InputError(
            f"a batch of {len(first)} given; the kernel needs at least 2 samples, at best all that "
            "the risk is the mean of"
        )
    if not all(bool(torch.isfinite(state).all()) for state in states):
        raise InputError("the states are not finite; check the data, or take smaller weights")
    return len(first)


def _features(block: nn.Module, x: Float[Tensor, "samples d"]) -> Float[Tensor, "samples m"]:
    """σ(W x + b)."""
    neurons = find_neurons(block)
    sigma = block.get_submodule(neurons.activation)
    features: Tensor = sigma(block.get_submodule(neurons.rows[0])(x))
    return features


def _smallest(features: Float[Tensor, "samples m"]) -> float:
    """λ_min(F Fᵀ/M), 0 if it may be rounding."""
    samples, width = features.shape
    if width < samples:
        return 0.0
    own = features.double()
    values = torch.linalg.eigvalsh(own @ own.T / width)
    rounding = samples * torch.finfo(features.dtype).eps * float(values[-1])
    return float(values[0]) if float(values[0]) > rounding else 0.0


def _jacobian(block: nn.Module, x: Float[Tensor, "samples d"]) -> Float[Tensor, "samples d d"]:
    """∂φ/∂x at each sample."""
    jacobian: Tensor = torch.func.vmap(torch.func.jacrev(block))(x)
    return jacobian.double()


def _attenuation(jacobians: list[Tensor], h: float) -> float:
    """min_i Π_{n≥1} s_min(I + h J_n^i)²: from behind layer 0, the first that has a kernel."""
    size = jacobians[0].shape[-1]
    identity = torch.eye(size, dtype=torch.float64, device=jacobians[0].device)
    product = torch.ones(len(jacobians[0]), dtype=torch.float64, device=identity.device)
    for jacobian in jacobians[1:]:
        product *= torch.linalg.svdvals(identity + h * jacobian)[:, -1].square()
    return float(product.min())


def _verdict(
    smallest: list[float], widths: tuple[int, ...], samples: int, head: float, m: float
) -> str:
    worst = min(range(len(smallest)), key=smallest.__getitem__)
    if m > 0 and math.isfinite(m):
        return (
            f"the width suffices for {samples} samples at this start: m ≥ {m:.3g} "
            f"(λ_min = {smallest[worst]:.3g}, in layer {worst})"
        )
    narrow = min(range(len(widths)), key=widths.__getitem__)
    if widths[narrow] < samples:
        return (
            f"the width does not suffice: layer {narrow} has {widths[narrow]} particles for "
            f"{samples} samples, so its kernel is singular; take at least {samples}"
        )
    if smallest[worst] == 0:
        return (
            f"no rate is guaranteed: the kernel of layer {worst} is singular to working precision; "
            "take more particles, samples that differ, or float64"
        )
    if head == 0:
        return "no rate is guaranteed: the head has more outputs than the state has numbers"
    return "no rate is guaranteed: a layer does not let the gradient through (singular I + h ∂φ/∂x)"
