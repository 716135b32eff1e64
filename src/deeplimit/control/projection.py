"""Trajectories of single samples in a plane, for looking at."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.evaluation import Inputs, device_of, evaluating, pairs
from deeplimit.control.batches import blame_inputs
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy, check_loss
from deeplimit.errors import InputError, several
from deeplimit.records import Record

Point = tuple[float, float]
NEED = "a picture needs at least one sample"


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
        for x, y in pairs(loader, device_of(structure.model), NEED):
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
