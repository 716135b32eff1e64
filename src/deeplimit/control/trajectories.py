"""Trajectories that a network really takes: strict dissipativity along them, and their picture."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import Inputs, device_of, evaluating, pairs
from deeplimit.control.batches import blame_inputs
from deeplimit.control.losses import ClassLoss
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy, check_loss
from deeplimit.control.stage_cost import StageCost
from deeplimit.errors import InputError, several
from deeplimit.records import Record
from deeplimit.tables import number, table

ROUNDING = 1e-12
CHECK = "the check needs at least one sample that counts"
PICTURE = "a picture needs at least one sample"

Point = tuple[float, float]


@dataclass(frozen=True)
class DissipativityReport(Record):
    """The dissipation inequality per layer n = 0 … N−1; positive margins hold.

        >>> report = dissipativity(StageCost(model, SoftCrossEntropy(4)), loader)
        >>> report.margins[report.layer] >= report.margin
        True

    Attributes:
        samples: number of samples.
        supply: the running cost above its minimum, s_n = γ_n(mean ℓ(z_n, y) − H) + (r/2)‖θ_n‖².
            A control that several layers share is divided evenly among them.
        lower_bound: γ_n α(mean dist(z_n, Z*_y)) + (|r|/2)‖θ_n‖², the class-K∞ function that strict
            dissipativity asks the supply to stay above.
        sample_margin: smallest γ_n(ℓ − H − α(dist)) of a single sample, per layer.
    """

    samples: int
    supply: tuple[float, ...]
    lower_bound: tuple[float, ...]
    sample_margin: tuple[float, ...]

    def __str__(self) -> str:
        """Says whether it holds, with a row per layer; of many layers some."""
        word = "holds" if self.holds else f"does not hold at layer {self.layer}"
        columns = (self.supply, self.lower_bound, self.sample_margin)
        rows = [
            (str(n), *(number(v) for v in row)) for n, row in enumerate(zip(*columns, strict=True))
        ]
        header = ("layer", "supply", "lower bound", "sample margin")
        return f"{several(self.samples, 'sample')}; {word}\n{table(header, rows)}"

    @property
    def margins(self) -> tuple[float, ...]:
        """s_n − lower bound, per layer."""
        return tuple(s - b for s, b in zip(self.supply, self.lower_bound, strict=True))

    @property
    def margin(self) -> float:
        """The smallest margin of all layers, of the means and of single samples."""
        return min((*self.margins, *self.sample_margin))

    @property
    def layer(self) -> int:
        """The layer at which the smallest margin occurs."""
        worst = [min(pair) for pair in zip(self.margins, self.sample_margin, strict=True)]
        return worst.index(min(worst))

    @property
    def holds(self) -> bool:
        """The inequality holds at every layer, up to float64's rounding.

        On the minimisers both sides are 0, and their difference is rounding of either sign.
        """
        return self.margin >= -ROUNDING * max(1.0, *map(abs, self.supply))


def class_k_bound(loss: SoftCrossEntropy, distance: Tensor) -> Tensor:
    """α(d) = (λ/2)(e^{−√2 d} − 1 + √2 d), a class-K∞ function below the excess: KL ≥ α(dist).

    λ = ε/(C−1) for C ≥ 3 and 2ε(1−ε) for C = 2. α is convex, so that it bounds the mean excess from
    below at the mean distance too.
    """
    curvature = 2 * loss.softness * (1 - loss.softness) if loss.classes == 2 else loss.other
    scaled = 2**0.5 * distance
    return curvature / 2 * (torch.expm1(-scaled) + scaled)


@torch.no_grad()
def dissipativity(
    stage_cost: StageCost,
    loader: Iterable[tuple[Inputs, Tensor]],
    *,
    minimum: float | None = None,
    control_cost: float | None = None,
) -> DissipativityReport:
    """Checks strict dissipativity with zero storage function on the trajectories of real data.

        >>> report = dissipativity(StageCost(model, SoftCrossEntropy(4), 0.1), loader)
        >>> report.holds, report.margin > 0
        (True, True)

    Strictly dissipative with respect to {z ∈ Z*_y} × {θ = 0} means, at every layer, a running cost
    above its minimum by at least a class-K∞ function of the distances:

        γ_n(mean_i ℓ(z_n^i, y^i) − H) + (r/2)‖θ_n‖²  ≥  γ_n α(mean_i dist_n^i) + (|r|/2)‖θ_n‖²,

    dist_n^i = dist(z_n^i, Z*_{y^i}). Where γ_n is 0 it asks nothing of the state.

    It is computed in float64 from the model's states, in evaluation mode. Source: [PF24]
    arXiv 2405.19013.

    Args:
        stage_cost: the objective, with the model, γ and r.
        loader: batches (x, y) as the stage cost takes them; of tokens [B, L] those count whose
            target is not −100.
        minimum: H, the claimed minimum of ℓ; the soft cross-entropy's own by default.
        control_cost: r; the stage cost's own by default. A negative one is no dissipative cost, and
            is found not to be.

    Raises:
        InputError: an empty loader, targets that are no classes or not aligned, inputs that are
            not finite, no stage cost, or one whose control cost is no squared norm.
    """
    if not isinstance(stage_cost, StageCost):
        raise InputError(
            f"{shown(stage_cost)} given as the objective; expected a StageCost(model, loss, weight)"
        )
    kind = stage_cost.control_cost_kind
    if control_cost is None and kind != "squared":
        raise InputError(
            f"the control cost is {kind}; the inequality is known of the squared one: give "
            "control_cost=0 for that of the loss alone"
        )
    loss, structure = check_loss(stage_cost.loss), stage_cost.anatomy
    gamma = torch.tensor(stage_cost.weight, dtype=torch.float64)
    r = stage_cost.control_cost if control_cost is None else control_cost
    misstated = 0.0 if minimum is None else minimum - loss.minimum

    def measure(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
        above = loss.excess(z, targets) - misstated
        return {"excess": above, "distance": loss.distance(z, targets)}

    of, rows, count = ClassLoss(loss), [], 0
    with evaluating(stage_cost):
        for x, y in of.batches(structure, loader, CHECK, shift=stage_cost.shift):
            states, output = structure.states(x)
            figures = of.measured(structure, x, y, [output], *states[:-1], measure=measure)
            above, apart = figures["excess"][:-1], figures["distance"][:-1]
            blame_inputs(x, above)
            if above.shape[1]:  # of a batch in which no token counts there is no margin
                margin = (above - class_k_bound(loss, apart)).amin(1)
                rows.append((above.sum(1), apart.sum(1), margin))
                count += above.shape[1]
    excesses, distances, least = (torch.stack(column) for column in zip(*rows, strict=True))
    excess, distance = excesses.sum(0) / count, distances.sum(0) / count
    control = torch.tensor(_control_squares(structure), dtype=torch.float64)
    supply = gamma * excess + r / 2 * control
    bound = gamma * class_k_bound(loss, distance) + abs(r) / 2 * control
    return DissipativityReport(
        samples=count,
        supply=tuple(supply.tolist()),
        lower_bound=tuple(bound.tolist()),
        sample_margin=tuple((gamma * least.amin(0)).tolist()),
    )


def _control_squares(structure: Anatomy) -> list[float]:
    """‖θ_n‖² per layer; shared controls are divided, so that the sum counts each once."""
    thetas = [structure.control(n) for n in range(structure.horizon)]
    shared = Counter(id(theta) for own in thetas for theta in own)
    return [
        sum(float(theta.double().square().sum()) / shared[id(theta)] for theta in own)
        for own in thetas
    ]


@dataclass(frozen=True)
class TrajectoryPicture(Record):
    """Points in a plane, layer by layer: [N + 1][P][2].

        >>> picture_trajectories(model, loader, SoftCrossEntropy(4)).plane
        'logits'

    Attributes:
        points: for layer n and sample i, its two coordinates.
        labels: the class of each of the P samples.
        plane: "state" when the state is the plane itself (d = C = 2), else "logits": the two
            leading principal axes of the centred logits z − mean(z).
        explained: fraction of the variance of the centred logits that the two axes carry (1 for
            "state").
        minimisers: per class the ends ((x, y), (x, y)) of the piece of the line Z*_y to be
            drawn; among centred logits the line is seen end on and both ends agree.
    """

    points: tuple[tuple[Point, ...], ...]
    labels: tuple[int, ...]
    plane: str
    explained: float
    minimisers: tuple[tuple[Point, Point], ...]

    def __str__(self) -> str:
        """A line: its samples, layers and plane."""
        layers, samples = (
            several(len(self.points) - 1, "layer"),
            several(len(self.labels), "sample"),
        )
        shown = f"{self.explained:.0%} shown"
        return f"{samples} through {layers} in the plane of {self.plane}, {shown}"


@torch.no_grad()
def picture_trajectories(
    model: nn.Module,
    loader: Iterable[tuple[Inputs, Tensor]],
    loss: SoftCrossEntropy,
    *,
    samples: int = 300,
) -> TrajectoryPicture:
    """Projects the logits of the first `samples` samples, at every layer, to a plane.

    For C = 2 and states that are logits the plane is the state space itself and Z*_y are lines.
    Otherwise the logits are centred (what the loss sees of them) and the plane is spanned by their
    two leading principal axes over all layers and samples: one plane for the whole trajectory, in
    which each Z*_y is a point.

        >>> picture = picture_trajectories(model, loader, SoftCrossEntropy(4), samples=5)
        >>> len(picture.points), len(picture.labels)
        (5, 5)

    Raises:
        InputError: an empty loader, targets that are no classes, inputs that are not finite,
            another loss, or a model with logits for every token.
    """
    check_loss(loss)
    structure = anatomy(model)
    if structure.tokens:
        raise InputError(
            f"{type(structure.model).__name__} has logits for every token; the picture is of "
            "classifiers"
        )
    rows: list[tuple[Tensor, Tensor]] = []
    with evaluating(structure.model):
        for x, y in pairs(loader, device_of(structure.model), PICTURE):
            states, _ = structure.states(x)
            logits = structure.logits(states, x=x)
            blame_inputs(x, logits)
            rows.append((logits.double().cpu(), loss.fitted(logits[-1], y).cpu()))
            plane = loss.classes == 2 and torch.equal(logits[0], states[0])
            if sum(len(own) for _, own in rows) >= samples:
                break
    layers, labels = zip(*rows, strict=True)
    z = torch.cat(layers, dim=1)[:, :samples]
    goal, explained = loss.minimiser(torch.arange(loss.classes), torch.float64), 1.0
    if plane:
        reach = float(z.abs().max())
        ends = goal[:, None] + torch.tensor([[-reach], [reach]], dtype=torch.float64)
    else:
        centred = z - z.mean(-1, keepdim=True)
        flat = centred.reshape(-1, loss.classes)
        centre = flat.mean(0)
        _, spread, axes = torch.linalg.svd(flat - centre, full_matrices=False)
        axes = axes[:2] if len(axes) > 1 else torch.cat([axes, torch.zeros_like(axes)])
        explained = float(spread[:2].square().sum() / spread.square().sum().clamp(min=1e-300))
        z = (centred - centre) @ axes.T
        goal = (goal - goal.mean(-1, keepdim=True) - centre) @ axes.T
        ends = goal[:, None].expand(-1, 2, -1)
    return TrajectoryPicture(
        points=tuple(tuple((round(a, 4), round(b, 4)) for a, b in layer) for layer in z.tolist()),
        labels=tuple(torch.cat(labels)[:samples].tolist()),
        plane="state" if plane else "logits",
        explained=explained,
        minimisers=tuple(((a, b), (c, d)) for (a, b), (c, d) in ends.tolist()),
    )
