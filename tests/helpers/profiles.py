"""Hand-made turnpike profiles."""

import math

from deeplimit.control import TurnpikeProfile


def profile(
    distance: list[float] | None = None,
    *,
    accuracy: list[float] | None = None,
    loss: list[float] | None = None,
    accuracy_error: list[float] | None = None,
    loss_error: list[float] | None = None,
    classes: int = 10,
    samples: int = 10_000,
) -> TurnpikeProfile:
    """A profile that is perfect but for what is given."""
    given = next(v for v in (distance, accuracy, loss, accuracy_error, loss_error) if v is not None)
    layers, softness = len(given), 0.05
    other = softness / (classes - 1)
    minimum = -(1 - softness) * math.log(1 - softness) - softness * math.log(other)
    zeros, distance = [0.0] * layers, distance or [0.0] * layers
    return TurnpikeProfile(
        samples=samples,
        classes=classes,
        softness=softness,
        minimum=minimum,
        loss=tuple(loss or [minimum] * layers),
        accuracy=tuple(accuracy or [1.0] * layers),
        distance=tuple(distance),
        class_distance=tuple((d,) * classes for d in distance),
        relative_update=tuple(zeros[1:]),
        loss_error=tuple(loss_error or zeros),
        accuracy_error=tuple(accuracy_error or zeros),
    )
