"""Arguments of another type, in a process where nothing checks annotations, as at a user's."""

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import torch
from deeplimit import ResidualChain
from deeplimit.meanfield import (
    LayerwiseMeasure, align_streams, certify_convergence, cot_distance, cot_geodesic,
    feature_kernel, merge, narrow, particle_flow, slope, widen,
)
from deeplimit.network import Architecture
from deeplimit.network.blocks import TwoLayerResidual

chain = ResidualChain([TwoLayerResidual(3, 6) for _ in range(2)], step=0.5)
vector = Architecture("vector", (5,), 2, (2,), 3, hidden=4).build()
measure, x = LayerwiseMeasure.of(chain), torch.randn(5, 3)
plans = cot_distance(chain, chain, plans=True)
recorder = certify_convergence(chain)
calls = []
for m in (None, "runs/a", 3):
    calls += [
        lambda m=m: LayerwiseMeasure.of(m),
        lambda m=m: LayerwiseMeasure(measure.particles, frame=m or "none"),
        lambda m=m: cot_distance(m, chain),
        lambda m=m: cot_distance(chain, m),
        lambda m=m: cot_geodesic(m, chain, 0.5),
        lambda m=m: cot_geodesic(chain, m, 0.5),
        lambda m=m: merge([chain, m]),
        lambda m=m: widen(m, 2),
        lambda m=m: narrow(m, 2),
        lambda m=m: particle_flow(m, 0.1),
        lambda m=m: certify_convergence(m),
        lambda m=m: feature_kernel(m, x),
        lambda m=m: align_streams(m, vector, x),
        lambda m=m: align_streams(vector, m, x),
        lambda m=m: slope(m),
        lambda m=m: feature_kernel(chain, m),
        lambda m=m: align_streams(vector, vector, m),
    ]
calls += [lambda f=f: f(measure) for f in (slope, certify_convergence)]
calls += [lambda: particle_flow(measure, 0.1), lambda: feature_kernel(measure, x)]
for n in ("x", None, [0.5], 1j, torch.ones(2), True):
    calls += [
        lambda n=n: cot_geodesic(chain, chain, n),
        lambda n=n: cot_distance(chain, chain, sinkhorn=n or "none"),
        lambda n=n: merge([chain, chain], [n, 0.5]),
        lambda n=n: merge([chain, chain], tolerance=n),
        lambda n=n: particle_flow(chain, n),
        lambda n=n: particle_flow(chain, 0.1, momentum=n),
        lambda n=n: particle_flow(chain, 0.1, eps=n),
        lambda n=n: particle_flow(chain, 0.1, others=n),
        lambda n=n: slope(chain, others=n),
        lambda n=n: certify_convergence(chain, infimum=n),
        lambda n=n: certify_convergence(chain, m=n or "none"),
        lambda n=n: recorder.record(n, 1.0),
        lambda n=n: recorder.record(0.0, n),
    ] if not isinstance(n, torch.Tensor) else [lambda n=n: cot_geodesic(chain, chain, n)]
for n in ("x", None, 1.5, -1):
    calls += [
        lambda n=n: merge([chain, chain], start=n),
        lambda n=n: merge([chain, chain], iterations=n),
        lambda n=n: widen(chain, n),
        lambda n=n: narrow(chain, n),
        lambda n=n: narrow(chain, 2, seed=n),
    ]
calls += [lambda w=w: merge([chain, chain], w) for w in ("ab", [1.0], ["a", "b"])]
calls += [lambda b=b: particle_flow(chain, 0.1, betas=b) for b in ((0.9,), 0.9, "ab", (0.9, "b"))]
calls += [lambda b=b: particle_flow(chain, 0.1, betas=b) for b in ((), (0.9, 0.99, 0.999))]
calls += [lambda: cot_geodesic(chain, chain, 0.5, frame="mean")]
calls += [lambda: merge([chain, chain], frame="mean")]
calls += [lambda: feature_kernel(chain, x.int()), lambda: narrow(chain, 2, seed=2**32)]
"""


def test_every_one_is_an_input_error_of_one_line(refused_calls: Callable[[str], None]) -> None:
    refused_calls(SCRIPT)
