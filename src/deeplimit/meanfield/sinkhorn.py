"""Entropic couplings, rounded to true ones, with a bound on how far from optimal they are."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeplimit.meanfield.exact import dual_value

Array = np.ndarray[Any, np.dtype[Any]]

ITERATIONS, TOLERANCE = 2000, 1e-6


def sinkhorn_plan(
    costs: Array, p: Array, q: Array, epsilon: float, keep: bool
) -> tuple[tuple[Array, Array, Array] | None, float, float]:
    """A coupling near the optimal one, its cost, and a lower bound of the optimal cost.

    POT's Sinkhorn in the logarithmic domain with regularisation ε · mean cost, in float64, on the
    GPU where there is one. Its plan is rounded onto the marginals (Altschuler, Weed, Rigollet 2017,
    arXiv 1705.09634, algorithm 2); its potentials (f, g), made feasible by two c-transforms, give
    Σ_i p_i f_i + Σ_j q_j g_j ≤ the optimal cost, less its rounding.

    Args:
        costs: [M, M'], not negative.
        p: weights [M], positive, of sum 1.
        q: weights [M'], likewise.
        epsilon: the relative regularisation.
        keep: whether the coupling is wanted: it is dense, M M' numbers.

    Returns:
        Rows, columns and masses of the coupling's support, or None; its cost; the lower bound.
    """
    import ot  # a second or two, which only this and exact transport need

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cost, ps, qs = (torch.as_tensor(v, device=device) for v in (costs, p, q))
    plan, f = ps[:, None] * qs[None, :], torch.zeros_like(ps)
    strength = epsilon * float(cost.mean())
    if strength > 0:  # otherwise all atoms are in one place
        plan, log = ot.sinkhorn(
            ps,
            qs,
            cost,
            strength,
            method="sinkhorn_log",
            numItermax=ITERATIONS,
            stopThr=TOLERANCE,
            warn=False,
            log=True,
        )
        plan, f = _rounded(plan, ps, qs), strength * log["log_u"]
    g = (cost - f[:, None]).amin(dim=0)
    f = (cost - g[None, :]).amin(dim=1)
    value, rounding = dual_value(p, q, f.cpu().numpy(), g.cpu().numpy())
    lower = max(value - rounding, 0.0)
    total = float((plan * cost).sum())
    if not keep:
        return None, total, lower
    i, j = torch.nonzero(plan, as_tuple=True)
    return (i.cpu().numpy(), j.cpu().numpy(), plan[i, j].cpu().numpy()), total, lower


def _rounded(plan: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The nearest coupling with marginals p and q, up to a constant."""
    plan = plan * (p / plan.sum(1)).clamp(max=1)[:, None]
    plan = plan * (q / plan.sum(0)).clamp(max=1)[None, :]
    missing, lacking = p - plan.sum(1), q - plan.sum(0)
    missing, lacking = missing.clamp(min=0), lacking.clamp(min=0)
    total = missing.sum()
    return plan + missing[:, None] * lacking[None, :] / total if total > 0 else plan
