"""A few networks as people write them, for the zoo."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH, CLASSES, WORDS = 16, 5, 60


class Residual(nn.Module):
    """x + W₂ tanh(W₁ norm(x))."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return x + self.outer(self.inner(self.norm(x)).tanh())


class Convolved(nn.Module):
    """x + conv(relu(norm(x)))."""

    def __init__(self, channels: int = WIDTH):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return x + self.conv(self.norm(x).relu())


class Listed(nn.Module):
    """Blocks in a ModuleList between two linear maps."""

    def __init__(self, depth: int = 5):
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Residual() for _ in range(depth))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Remembering(nn.Module):
    """Blocks that also take the input: the head reads it too."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Residual() for _ in range(depth))
        self.head = nn.Linear(WIDTH + 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        y = self.stem(x)
        for block in self.blocks:
            y = block(y)
        return self.head(torch.cat([y, x], -1))


class Staged(nn.Module):
    """Two stages of convolutions with a strided one between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.first = nn.Sequential(*(Convolved() for _ in range(3)))
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.second = nn.Sequential(*(Convolved(2 * WIDTH) for _ in range(3)))
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        x = self.second(self.down(self.first(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """An embedding, nn.TransformerEncoder, the mean over tokens and a linear map."""

    def __init__(self, norm_first: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 2 * WIDTH, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """The output."""
        return self.head(self.encoder(self.embedding(ids)).mean(1))


class Tagger(Encoder):
    """The same for every token."""

    def forward(self, ids: Tensor) -> Tensor:
        """The output."""
        return self.head(self.encoder(self.embedding(ids)))


def _sequential() -> nn.Module:
    blocks = (Residual() for _ in range(4))
    return nn.Sequential(nn.Linear(8, WIDTH), *blocks, nn.Linear(WIDTH, CLASSES))


def _numbers() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


def _images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def _words() -> Tensor:
    return torch.randint(WORDS, (3, 7), generator=torch.Generator().manual_seed(2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ModuleList": (Listed, _numbers),
    "head reads the input": (Remembering, _numbers),
    "Sequential": (_sequential, _numbers),
    "two stages": (Staged, _images),
    "TransformerEncoder": (Encoder, _words),
    "TransformerEncoder, norm last": (lambda: Encoder(False), _words),
    "TransformerEncoder, tokens": (Tagger, _words),
}
