"""Second derivatives of a vector field's trajectories, and the norms of its Jacobians."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp

from deeplimit.ode.field import Control, PlainBatchNorm, VectorField

RESIDUAL = 1e-4
KRYLOV = 64  # products with JᵀJ at most
NUMBERS = 2**24  # held at a time: 128 MiB
Place = tuple[int, float]


class Derivatives:
    """∂_xφ and ∂_sφ + ∂_xφ·φ of a vector field at many places (n, c), s = s_n + c h, at once.

    Samples are independent of each other. Small layers are put together with `torch.vmap`, if that
    gives what the layers give one by one on an example [samples, …].
    """

    def __init__(self, field: VectorField, example: Tensor):
        self._field = field
        self._together = self._maps(example)

    def accelerations(self, places: Sequence[Place], states: Tensor) -> Tensor:
        """‖x″‖ = ‖∂_sφ + ∂_xφ·φ‖ [places, samples] where x(s) is states [places, samples, …].

        By a Jacobian-vector product in (θ, x). At a node ∂_sφ is the one inside interval n.
        """
        field, found = self._field, []
        for some in self._chunks(places, states[0].numel()):
            theta = _stacked([field.control(*place) for place in places[some]])
            change = _stacked([field.change(n) for n, _ in places[some]])
            slope = {name: value / field.step for name, value in change.items()}
            x = states[some]
            phi = self._each(len(x))
            with PlainBatchNorm():
                bend = jvp(phi, (theta, x), (slope, phi(theta, x)))[1]
            found.append(torch.linalg.vector_norm(bend.flatten(2), dim=2))
        return torch.cat(found)

    def jacobian_norms(
        self, places: Sequence[Place], states: Tensor, seed: int, tell: Callable[[int], None]
    ) -> tuple[Tensor, Tensor]:
        """σ_max of ∂_xφ [places, samples], and the residuals ‖JᵀJv − σ²v‖/σ² of its vectors v.

        Lanczos: v is the best vector in the span of the iterates of the power iteration on JᵀJ,
        whose convergence it speeds up. σ is reached from below. `tell` is told how many places are
        done.
        """
        generator = torch.Generator().manual_seed(seed)
        norms, residuals = [], []
        for some in self._chunks(places, states[0].numel() * KRYLOV):
            tell(some.start)
            theta = _stacked([self._field.control(*place) for place in places[some]])
            x = states[some]
            start = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            value, residual = _largest_eigenvalue(_normal(self._each(len(x)), theta, x), start)
            norms.append(value.sqrt())
            residuals.append(residual)
        return torch.cat(norms), torch.cat(residuals)

    def _each(self, count: int) -> Callable[[Control, Tensor], Tensor]:
        """φ for stacked controls and states, place by place."""
        if count > 1:
            return torch.vmap(self._field)
        return lambda theta, x: self._field({k: v[0] for k, v in theta.items()}, x[0])[None]

    def _chunks(self, places: Sequence[Place], numbers: int) -> Iterator[slice]:
        """Parts of the places, as many at a time as there is room for."""
        room = NUMBERS // (self._field.size + numbers) if self._together else 1
        size = max(1, room)
        return (slice(i, i + size) for i in range(0, len(places), size))

    def _maps(self, x: Tensor) -> bool:
        """True where layers can be put together; foreign code may branch on what it computes."""
        controls = [self._field.control(n) for n in (0, 1)]
        try:
            both = torch.vmap(self._field)(_stacked(controls), torch.stack([x, x]))
        except (RuntimeError, TypeError, ValueError):
            return False
        return torch.allclose(both, torch.stack([self._field(c, x) for c in controls]), rtol=1e-9)


def _stacked(controls: Sequence[Control]) -> Control:
    return {name: torch.stack([c[name] for c in controls]) for name in controls[0]}


def _normal(
    phi: Callable[[Control, Tensor], Tensor], theta: Control, x: Tensor
) -> Callable[[Tensor], Tensor]:
    """The map v ↦ JᵀJv, J = ∂_xφ."""

    def of_state(y: Tensor) -> Tensor:
        return phi(theta, y)

    pull = vjp(of_state, x)[1]
    return lambda v: pull(jvp(of_state, (x,), (v,))[1])[0]


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of a symmetric positive operator, and its relative residual.

    Lanczos with full reorthogonalisation, for each [p, b] of start [p, b, …] by itself: after k
    products the residual of the Ritz pair (λ, Qs) is β_k |s_k|.
    """
    shape = start.shape
    q = start.flatten(2)
    q = q / torch.linalg.vector_norm(q, dim=2, keepdim=True)
    last = min(KRYLOV, q.shape[2])
    basis = q.new_zeros(*q.shape[:2], last, q.shape[2])
    tridiagonal = q.new_zeros(*q.shape[:2], last, last)
    for k in range(last):
        basis[:, :, k] = q
        w = apply(q.view(shape)).flatten(2)
        rounding = 1e-12 * torch.linalg.vector_norm(w, dim=2)
        tridiagonal[:, :, k, k] = (q * w).sum(2)
        known = basis[:, :, : k + 1]
        for _ in range(2):
            w = w - ((known @ w[..., None]).mT @ known)[:, :, 0]
        beta = torch.linalg.vector_norm(w, dim=2)
        # Nothing left of w: the span is invariant, and holds a part of every eigenspace.
        beta = torch.where(beta > rounding, beta, 0.0)
        if k + 1 in (8, 16, 32, last):
            values, vectors = torch.linalg.eigh(tridiagonal[:, :, : k + 1, : k + 1])
            value = values[..., -1].clamp(min=0)
            residual = torch.where(value > 0, beta * vectors[..., -1, -1].abs() / value, 0.0)
            if k + 1 == last or residual.max() <= RESIDUAL:
                break
        tridiagonal[:, :, k, k + 1] = tridiagonal[:, :, k + 1, k] = beta
        q = torch.where(beta[..., None] > 0, w / beta[..., None], 0.0)
    return value, residual
