"""Arguments of another type, in a process where nothing checks annotations, as at a user's."""

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import torch
from deeplimit import ResidualChain, coarsen, discretization_gap, refine, smoothness, tie, untie
from deeplimit.network import smooth_start
from deeplimit.network.blocks import TwoLayerResidual
from deeplimit.ode import solver_accuracies, with_solver

chain = ResidualChain([TwoLayerResidual(3, 4) for _ in range(4)], step=0.25)
x = torch.randn(5, 3)
calls = [lambda f=f, m=m: f(m) for f in (smoothness, untie) for m in (None, "runs/a")]
calls += [lambda f=f, m=m: f(m, 2) for f in (refine, coarsen, tie) for m in (None, "runs/a")]
calls += [lambda k=k: refine(chain, k) for k in (1.5, "2", True, None)]
calls += [lambda m=m: discretization_gap(m, x) for m in (None, "runs/a")]
calls += [lambda x=x: discretization_gap(chain, x) for x in ([1, 2], None, "x")]
calls += [lambda k=k: with_solver(chain, "rk4", k) for k in ("3", 2.5, True)]
calls += [lambda t=t: with_solver(chain, "dopri5", tolerance=t) for t in ("x", None, 0, -1.0)]
calls += [lambda: discretization_gap(chain, x, interpolation="cubic")]
calls += [lambda: with_solver(chain, "rk5", 3), lambda: with_solver(None, "rk4", 2)]
calls += [lambda: with_solver(chain, 4, 2)]
calls += [lambda: solver_accuracies(torch.nn.Linear(3, 2), [(x, x[:, 0].long())], [])]
calls += [lambda: solver_accuracies(chain, iter([(x, x[:, 0].long())]), [("rk4", 2)])]
calls += [lambda b=b: smooth_start(b, 0.5) for b in (torch.nn.Linear(2, 2), None)]
calls += [lambda: smooth_start(chain, "a")]
"""


def test_every_one_is_an_input_error_of_one_line(refused_calls: Callable[[str], None]) -> None:
    refused_calls(SCRIPT)
