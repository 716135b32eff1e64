"""Random stacks of blocks, residual and not, as people might build them: for the hunt."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeplimit import gradient_error, use_adjoint
from deeplimit.gradient import layout
from deeplimit.gradient.stand_ins import engines

ACTIVATIONS = (nn.GELU, nn.Tanh, nn.ReLU, nn.SiLU, nn.LeakyReLU)
WAYS = ("norm before", "norm after", "activation after", "gated", "two branches", "nothing added")


class Mixing(nn.Module):
    """Attention of one head over the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.keys, self.values = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.keys(x).chunk(2, dim=-1)
        share = (queries @ keys.mT / x.shape[-1] ** 0.5).softmax(dim=-1)
        return share @ self.values(x)  # type: ignore[no-any-return]


class RandomBlock(nn.Module):
    """One block of states (batch, tokens, width), or (batch, width, 6, 6) where it convolves."""

    def __init__(self, draw: random.Random, width: int, way: str, convolves: bool):
        super().__init__()
        self.way, self.gain = way, 10 ** draw.uniform(-1.3, 0.4)
        self.activation = draw.choice(ACTIVATIONS)()
        self.dropout = nn.Dropout(draw.choice([0.0, 0.0, 0.1]))
        self.survival = draw.choice([1.0, 1.0, 1.0, 0.8])
        self.side, self.wrapped = draw.random() < 0.15, draw.random() < 0.2
        hidden = draw.choice([width, 2 * width])
        self.norm: nn.Module
        if convolves:
            self.norm = nn.BatchNorm2d(width) if draw.random() < 0.5 else nn.GroupNorm(2, width)
            ends = [nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, width, 1)]
        else:
            self.norm = nn.LayerNorm(width) if draw.random() < 0.7 else nn.RMSNorm(width)
            ends = [nn.Linear(width, hidden), nn.Linear(hidden, width)]
        self.branch = nn.Sequential(ends[0], self.activation, self.dropout, ends[1])
        second = way == "two branches" or draw.random() < 0.3
        self.mixing = Mixing(width) if second and not convolves else None
        self.register_buffer("shift", 0.1 * torch.randn(1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = self.changed(x)
        if self.side:
            return y, y.square().mean()
        return (y,) if self.wrapped else y

    def changed(self, x: Tensor) -> Tensor:
        if self.training and self.survival < 1 and torch.rand(()) > self.survival:
            return x * 1.0
        way, shift = self.way, self.shift
        added = self.gain * self.branch(self.norm(x) if way != "norm after" else x) + shift
        if self.mixing is not None:
            added = added + self.gain * self.mixing(self.norm(x))
        if way == "norm after":
            return self.norm(x + added)  # type: ignore[no-any-return]
        if way == "activation after":
            return self.activation(x + added)  # type: ignore[no-any-return]
        if way == "gated":
            share = self.norm(x).sigmoid()
            return share * x + (1 - share) * added  # type: ignore[no-any-return]
        return self.norm(added) if way == "nothing added" else x + added  # type: ignore[no-any-return]


class RandomStack(nn.Module):
    """A stem, the blocks, some of them shared or frozen, and a head."""

    def __init__(self, draw: random.Random):
        super().__init__()
        width, self.convolves = draw.choice([6, 16, 24, 64, 96]), draw.random() < 0.3
        width = min(width, 16) if self.convolves else width
        depth, way = draw.choice([3, 4, 6, 8, 12, 16, 24]), draw.choice(WAYS)
        mixed = draw.random() < 0.3
        self.way = "mixed" if mixed else way
        make = [
            RandomBlock(draw, width, draw.choice(WAYS) if mixed else way, self.convolves)
            for _ in range(depth)
        ]
        if draw.random() < 0.2:  # the same block at several layers
            make = [make[n % (depth // 2)] for n in range(depth)]
        self.blocks = nn.ModuleList(make)
        for block in make:
            block.requires_grad_(draw.random() > 0.15)
        batch, tokens = draw.choice([1, 2, 4, 8]), draw.choice([1, 3, 8])
        shape = (batch, width, 6, 6) if self.convolves else (batch, tokens, width)
        self.stem = nn.Conv2d(width, width, 1) if self.convolves else nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        self.input = draw.choice([0.3, 1.0, 3.0]) * torch.randn(shape)
        if draw.random() < 0.2:  # a channel far larger than others
            self.input[:, :1] *= 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        side = x.new_zeros(())
        for block in self.blocks:
            y = block(x)
            x, *more = y if isinstance(y, tuple) else (y,)
            side = side + sum(more)
        y = self.head(x.movedim(1, -1) if self.convolves else x)
        y = y.float() if y.itemsize < 4 else y
        return (y.sin() + y.square() / 2).mean() + 0.1 * side


@dataclass(frozen=True)
class Hunted:
    """The gradient of one stack with coded states, and what was said of it.

    Attributes:
        error: relative, against exact backpropagation in the same precision.
        bound: what it may be up to, by the meter.
        rounding: what is lost in the stack's own precision.
        coded: how many blocks were.
    """

    seed: int
    dtype: str
    way: str
    depth: int
    bits: int
    evaluations: int
    error: float
    bound: float
    rounding: float
    coded: int

    @property
    def silent(self) -> bool:
        """Wrong by more than what was said."""
        return not self.error <= max(self.bound, self.rounding)


def hunted(seed: int) -> Hunted:
    """The same stack each time for a seed, and its error."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, rounding = draw.choice(
        [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)]
    )
    model = RandomStack(draw)
    x = model.input.to(dtype)
    every, bits = draw.choice([None, None, None, 3]), draw.choice([2, 4, 8])
    evaluations = draw.choice([1, 1, 2])
    use_adjoint(
        model.to(dtype).train(),
        bits=bits,
        evaluations=evaluations,
        anchor_every=every,
        on_drift="ignore",
    )
    error = gradient_error(model, lambda model, x: model(x), x).error
    bound = max(engine.meter.bound for engine in engines(model))
    return Hunted(
        seed,
        str(dtype).removeprefix("torch."),
        model.way,
        len(model.blocks),
        bits,
        evaluations,
        error,
        bound,
        rounding,
        len(layout(model).coded),
    )
