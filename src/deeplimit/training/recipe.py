"""A recipe: everything that one training run is made from, typed and checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_type_hints

from deeplimit.errors import InputError
from deeplimit.training.recipe_file import read_recipe_file, recipe_text
from deeplimit.training.typed_values import conform, from_plain, to_plain

LARGEST_SEED = 2**31 - 1  # what every random generator in use takes
BEFORE_THE_ADJOINT = {"gradient": "backprop", "evaluations": 2}  # what older files do not say
PUBLISHED = {"activation": "relu", "norm": "batch", "step": 1.0, "scheme": "euler"}


@dataclass(frozen=True)
class Recipe:
    """Everything needed to repeat a training run; the defaults are those for `digits`.

    Raises:
        InputError: a field of another type, out of range, or that does not go with the others.
    """

    data: str = "digits"
    """Name of the data set: digits, spirals, mnist, cifar10, hub:OWNER/NAME, npz:FILE, a folder."""
    data_dir: Path | None = None
    """Folder that holds the data sets' folders; without it DEEPLIMIT_DATA says where."""

    kind: Literal["logit", "vector", "convolutional", "cifar-resnet"] = "vector"
    """logit: the state is the logits; cifar-resnet: He et al., with a ReLU after every addition."""
    depth: tuple[int, ...] = (20,)
    """Residual steps in each stage; one number is one stage."""
    width: int = 64
    """Numbers in a vector state, or channels of a first stage; logit, cifar-resnet: not read."""
    hidden: int = 64
    """Particles, or hidden channels; 0: linear, or as many as channels; cifar-resnet: not read."""
    activation: Literal["relu", "gelu", "tanh", "silu"] = "relu"
    """Activation inside a residual function."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Norm layers of a convolutional network; logit, vector: not read."""
    reduction: int = 4
    """How much the stem of a convolutional network shrinks the image: 1, 2, 4, …; else not read."""
    step: float = 1.0
    """Step size h: 1 is a standard residual network, T/N discretises a Neural ODE on [0, T]."""
    scheme: Literal["euler", "heun"] = "euler"
    """How a residual function moves the state."""

    gradient: Literal["backprop", "adjoint"] = "backprop"
    """adjoint: states rebuilt, not kept: memory flat in depth, a small gradient error, measured."""
    evaluations: int = 2
    """Evaluations of a layer for each state that the adjoint rebuilds; backprop: not read."""

    softness: float = 0.05
    """Softness ε of the cross-entropy: what the target leaves for the other classes together."""
    stage_cost: float = 0.1
    """Weight γ of the loss at every layer; 0 trains an ordinary residual network."""
    control_cost: float = 0.0
    """Weight r of the squared norm of every layer's control."""

    epochs: int = 60
    """Passes over the training data."""
    batch_size: int = 64
    """Samples in a batch, over all processes together."""
    learning_rate: float = 4e-3
    """Largest learning rate of the one-cycle schedule of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW."""
    crop: int = 0
    """Pixels of padding from which training images are cut at random; 0: none."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    seed: int = 0
    """Seed of the initial parameters, the order of the samples and the augmentation."""

    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    """Numbers to compute with; bf16-mixed keeps the parameters in 32 bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on CUDA where there is any."""
    devices: int = 1
    """Processes, one per device, that share every batch."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work: ddp copies the network, fsdp divides it. auto: ddp."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = conform(hints[field.name], getattr(self, field.name), field.name)
            object.__setattr__(self, field.name, value)
        self._check_network()
        self._check_gradient()
        self._check_cost()
        self._check_training()

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """The recipe in a recipe.toml.

        Raises:
            InputError: the file is not one, is of another version, or has a field that is unknown,
                missing, ill-typed or out of range; the message names the file and the field.
        """
        path = Path(path)
        settings = read_recipe_file(path)["recipe"]
        try:
            if isinstance(settings, dict):
                settings = BEFORE_THE_ADJOINT | settings
            return from_plain(cls, settings)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_toml(self, class_names: Sequence[str] = ()) -> str:
        """The text of recipe.toml: the fields, and the versions of what is used here."""
        return recipe_text(to_plain(self), class_names)

    @property
    def horizon(self) -> int:
        """N: the residual steps of all stages."""
        return sum(self.depth)

    def _check_network(self) -> None:
        if not self.depth or min(self.depth) < 1:
            raise InputError(
                f"depth is {_listed(self.depth)}; expected at least 1 residual step in every stage"
            )
        if self.kind in ("logit", "vector") and len(self.depth) != 1:
            raise InputError(
                f"depth is {_listed(self.depth)}: a {self.kind} network has one stage; give one "
                "number, or the kind convolutional"
            )
        _at_least("width", self.width, 1)
        _at_least("hidden", self.hidden, 0)
        _at_least("reduction", self.reduction, 1)
        if self.reduction & (self.reduction - 1):
            raise InputError(f"reduction is {self.reduction}; expected a power of 2: 1, 2, 4, …")
        _positive("step", self.step)
        if self.kind == "cifar-resnet":
            self._check_published()

    def _check_published(self) -> None:
        """The published architecture leaves no choice; a field must not be silently ignored."""
        if len(self.depth) != 3:
            raise InputError(
                f"depth is {_listed(self.depth)}: a cifar-resnet has three stages; give three "
                "numbers, 9 9 9 for ResNet-56"
            )
        for name, fixed in PUBLISHED.items():
            if getattr(self, name) != fixed:
                raise InputError(
                    f"{name} is {getattr(self, name)}; a cifar-resnet has {name} {fixed}. Leave it "
                    "out, or give the kind convolutional"
                )

    def _check_gradient(self) -> None:
        _at_least("evaluations", self.evaluations, 1)
        if self.gradient == "backprop" and self.evaluations != Recipe.evaluations:
            raise InputError(
                f"evaluations is {self.evaluations}, but the gradient backprop rebuilds no state; "
                f"give the gradient adjoint, or leave evaluations at {Recipe.evaluations}"
            )
        if self.gradient == "adjoint" and self.kind == "cifar-resnet":
            raise InputError(
                "gradient is adjoint: the states of a cifar-resnet cannot be rebuilt, because of "
                "the ReLU after every addition; give the gradient backprop, or the kind "
                "convolutional"
            )

    def _check_cost(self) -> None:
        if not 0 < self.softness < 1:
            raise InputError(
                f"softness is {self.softness:g}; expected a number above 0 and below 1 − 1/C for C "
                "classes, such as 0.05"
            )
        for name in ("stage_cost", "control_cost", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value:g}; expected a number ≥ 0")

    def _check_training(self) -> None:
        if not self.data:
            raise InputError("data is empty; expected the name of a data set, such as digits")
        for name in ("epochs", "batch_size", "devices"):
            _at_least(name, getattr(self, name), 1)
        _positive("learning_rate", self.learning_rate)
        _at_least("crop", self.crop, 0)
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed is {self.seed}; expected a number from 0 to {LARGEST_SEED}")
        if self.batch_size % self.devices:
            raise InputError(
                f"batch_size is {self.batch_size}, which {self.devices} devices cannot share "
                f"equally; give a multiple of {self.devices}"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} is {value}; expected at least {least}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value:g}; expected a number above 0")


def _listed(depth: tuple[int, ...]) -> str:
    return " ".join(map(str, depth)) or "empty"
