"""Plausible results of runs, made from moving logits: every number follows from the same states."""

import math
from dataclasses import replace

import numpy as np

from deeplimit.control.depth_table import DepthCosts, DepthTable
from deeplimit.control.trajectories import TrajectoryPicture
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.control.verdict import Verdict, judge
from deeplimit.control.verifying import CropResult
from deeplimit.training.results import Cut, Parts, Profiles, Reference, RunResults

SOFTNESS = 0.05


def targets(classes: int) -> np.ndarray:
    q = np.full((classes, classes), SOFTNESS / (classes - 1))
    np.fill_diagonal(q, 1 - SOFTNESS)
    return q


def moving_logits(
    seed: int, samples: int, classes: int, horizon: int, rate: float, late: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N + 1, P, C] that go from noise to their minimiser, early or only at the end."""
    generator = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    goal = np.log(targets(classes))[labels]
    goal = goal - goal.mean(1, keepdims=True)
    start = generator.normal(0, 0.9, (samples, classes)) + 0.05 * goal
    end = goal * generator.normal(1.0, 0.05, (samples, 1))
    end = end + generator.normal(0, 0.12, (samples, classes))
    wrong = generator.random(samples) < 0.02
    end[wrong] = end[np.roll(np.arange(samples), 1)][wrong]
    speed = generator.uniform(0.25, 1.75, (samples, 1)) * (1 - 0.04 * labels[:, None])
    states = []
    for n in range(horizon + 1):
        share = (n / horizon) ** 6 * np.ones_like(speed) if late else 1 - np.exp(-rate * n * speed)
        states.append((1 - share) * start + share * end)
    return np.stack(states), labels


def profile(logits: np.ndarray, labels: np.ndarray) -> TurnpikeProfile:
    horizon, samples, classes = logits.shape[0] - 1, logits.shape[1], logits.shape[2]
    q = targets(classes)[labels]
    norm = np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -(q * (logits - norm)).sum(-1)
    right = (logits.argmax(-1) == labels).astype(float)
    goal = np.log(q) - np.log(q).mean(1, keepdims=True)
    distance = np.linalg.norm(logits - logits.mean(-1, keepdims=True) - goal, axis=-1)
    update = np.linalg.norm(np.diff(logits, axis=0), axis=-1) / np.linalg.norm(logits[:-1], axis=-1)

    def error(values: np.ndarray) -> tuple[float, ...]:
        return tuple(map(float, (values - values[-1]).std(1) / math.sqrt(samples)))

    return TurnpikeProfile(
        samples=samples,
        classes=classes,
        softness=SOFTNESS,
        minimum=float(-(targets(classes)[0] * np.log(targets(classes)[0])).sum()),
        loss=tuple(map(float, loss.mean(1))),
        accuracy=tuple(map(float, right.mean(1))),
        distance=tuple(map(float, distance.mean(1))),
        class_distance=tuple(
            tuple(
                float(distance[n, labels == c].mean()) if (labels == c).any() else math.nan
                for c in range(classes)
            )
            for n in range(horizon + 1)
        ),
        relative_update=tuple(map(float, update.mean(1))),
        loss_error=error(loss),
        accuracy_error=error(right),
    )


def logit_picture(logits: np.ndarray, labels: np.ndarray) -> TrajectoryPicture:
    centred = logits - logits.mean(-1, keepdims=True)
    flat = centred.reshape(-1, centred.shape[-1])
    _, singular, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    plane = axes[:2].T
    points = centred @ plane
    goals = np.log(targets(logits.shape[-1]))
    ends = (goals - goals.mean(1, keepdims=True)) @ plane
    return TrajectoryPicture(
        points=nested(points),
        labels=tuple(int(y) for y in labels),
        plane="logits",
        explained=float((singular[:2] ** 2).sum() / (singular**2).sum()),
        minimisers=tuple(((float(x), float(y)), (float(x), float(y))) for x, y in ends),
    )


def spiral_states(samples: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Two spirals [N + 1, P, 2] that unroll onto the two minimiser lines."""
    generator = np.random.default_rng(5)
    labels = np.arange(samples) % 2
    turn = generator.uniform(0.4, 2.6, samples) * math.pi
    angle = turn + math.pi * labels
    start = (turn / 4)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    contrast = math.log((1 - SOFTNESS) / SOFTNESS) / 2
    side = np.where(labels == 0, 1.0, -1.0)[:, None] * np.array([contrast, -contrast])
    end = side + (turn - 1.5 * math.pi)[:, None] / 4 * np.ones(2)
    end = end + generator.normal(0, 0.04, end.shape)
    states = []
    for n in range(horizon + 1):
        share = 1 - math.exp(-0.4 * n)
        bend = 0.9 * share * (1 - share)
        mixed = (1 - share) * start + share * end
        states.append(mixed + bend * np.stack([-mixed[:, 1], mixed[:, 0]], 1))
    return np.stack(states), labels


def state_picture(states: np.ndarray, labels: np.ndarray) -> TrajectoryPicture:
    contrast = math.log((1 - SOFTNESS) / SOFTNESS) / 2
    reach = 2.2
    lines = tuple(((-reach + c, -reach - c), (reach + c, reach - c)) for c in (contrast, -contrast))
    return TrajectoryPicture(nested(states), tuple(int(y) for y in labels), "state", 1.0, lines)


def nested(points: np.ndarray) -> tuple[tuple[tuple[float, float], ...], ...]:
    return tuple(tuple((float(x), float(y)) for x, y in layer) for layer in points)


def crop_report(test: TurnpikeProfile, depth: int) -> CropResult:
    horizon = test.horizon
    return CropResult(
        samples=test.samples,
        horizon_before=horizon,
        horizon_after=depth,
        accuracy_before=test.accuracy[-1],
        accuracy_after=test.accuracy[depth],
        accuracy_error=test.accuracy_error[depth],
        loss_before=test.loss[-1],
        loss_after=test.loss[depth],
        agreement=1 - abs(test.accuracy[-1] - test.accuracy[depth]) - 0.003,
        parameters_before=8320 * horizon + 4810,
        parameters_after=8320 * depth + 4810,
        multiply_adds_before=8192 * horizon + 4736,
        multiply_adds_after=8192 * depth + 4736,
        latency_before=5.1e-5 * horizon + 6e-5,
        latency_after=5.1e-5 * depth + 6e-5,
        latency_batch=64,
        device="cpu",
    )


def depth_table(test: TurnpikeProfile, recommended: int) -> DepthTable:
    """The profile with what each depth costs, as `crop_report` has it."""
    every = [crop_report(test, depth) for depth in range(test.horizon + 1)]
    costs = DepthCosts(
        parameters=tuple(one.parameters_after for one in every),
        multiply_adds=tuple(one.multiply_adds_after for one in every),
        latency=tuple(one.latency_after for one in every),
        latency_batch=64,
        device="cpu",
        least=0,
    )
    return DepthTable(**vars(test), costs=costs, recommended=recommended)


def verdict(lost: int, gained: int, right: int = 350, tolerance: float = 0.005) -> Verdict:
    """On 360 samples of ten classes, of which so many are right before."""
    return judge(
        tolerance=tolerance,
        samples=360,
        lost=lost,
        gained=gained,
        right=right,
        largest=36,
        right_in_largest=min(right, 35),
    )


def training_metrics(epochs: int) -> tuple[dict[str, float | None], ...]:
    generator = np.random.default_rng(1)
    rows: list[dict[str, float | None]] = []
    for epoch in range(1, epochs + 1):
        fall, noise = math.exp(-epoch / 6), float(generator.normal(0, 0.004))
        rows.append(
            {
                "epoch": float(epoch),
                "loss": 0.31 + 1.9 * fall,
                "accuracy": 0.995 - 0.6 * fall,
                "validation_loss": 0.35 + 1.9 * fall + noise,
                "validation_accuracy": 0.978 - 0.62 * fall - noise,
                "entry": None if epoch < 5 else float(max(3, 14 - epoch // 2)),
                "learning_rate": 0.001,
                "seconds": 0.42,
            }
        )
    return tuple(rows)


def recipe(data: str, depth: int) -> dict[str, object]:
    return {
        "data": data,
        "depth": depth,
        "width": 64,
        "step": 1.0,
        "stage_cost": 0.1,
        "control_cost": 0.0001,
        "softness": SOFTNESS,
        "epochs": 40,
        "seed": 0,
        "versions": {"deeplimit": "0.1.0", "torch": "2.13.0"},
    }


def digits_results() -> RunResults:
    """Ten classes, N = 20, P = 300, with a cut and the control network."""
    train = profile(*moving_logits(0, 1000, 10, 20, 0.9))
    validation = profile(*moving_logits(1, 400, 10, 20, 0.85))
    logits, labels = moving_logits(2, 360, 10, 20, 0.85)
    test = profile(logits, labels)
    depth = validation.recommended_depth
    plain = profile(*moving_logits(3, 360, 10, 20, 0.85, late=True))
    return RunResults(
        name="digits",
        recipe=recipe("digits", 20),
        class_names=tuple("0123456789"),
        metrics=training_metrics(40),
        profiles=Profiles(train, validation, depth_table(test, depth)),
        picture=logit_picture(logits[:, :300], labels[:300]),
        cut=Cut(
            tuple(range(depth, 20)),
            0.005,
            replace(crop_report(test, depth), verdict=verdict(0, 0)),
            parts=Parts(1000, 400, 360),
        ),
        reference=Reference(
            plain,
            crop_report(plain, depth),
            replace(
                crop_report(test, depth),
                horizon_before=depth,
                accuracy_before=test.accuracy[depth] - 0.02,
                accuracy_error=0.004,
                verdict=verdict(1, 8),
            ),
            tuple(range(depth, 20)),
        ),
    )


def spirals_results() -> RunResults:
    """Two classes, N = 40, states in the plane, the depth given by the user, no control."""
    states, labels = spiral_states(300, 40)
    test = profile(states, labels)
    return RunResults(
        name="spirals",
        recipe=recipe("spirals", 40),
        class_names=("inner", "outer"),
        metrics=training_metrics(60),
        profiles=Profiles(test, test, depth_table(test, test.recommended_depth)),
        picture=state_picture(states, labels),
        cut=Cut(tuple(range(10, 40)), None, crop_report(test, 10)),
    )
