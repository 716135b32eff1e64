"""A recipe: everything that one training run is made from; one for each named data set."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tomli_w

from deeplimit.errors import InputError
from deeplimit.reading import read_toml
from deeplimit.records import coerce, field_types, from_plain, newer, to_plain
from deeplimit.training.specification import NETWORK, TEXTS, Named, check_ranges, conflicts

FORMAT = 1
TABLES = ("format", "versions", "recipe", "data")
OWN_STARTS = ("start", "start.safetensors")  # in a run folder


@dataclass(frozen=True)
class Recipe:
    """Everything needed to repeat a training run; the defaults are those for `digits`.

    Raises:
        InputError: a field of another type, out of range, or that does not go with the others.
    """

    data: str = "digits"
    """Name of the data set: digits, mazes, spirals, mnist, cifar10, hub:OWNER/NAME, npz:FILE, a
    folder; for a model of text text:FILE, or table:FILE with columns text and label."""
    data_dir: Path | None = None
    """Folder that holds the data sets' folders; without it DEEPLIMIT_DATA says where."""
    length: int | None = None
    """Tokens of a window of text, or the most of a text in a table; by default 256, or as many as
    the model reads."""

    model: str | None = None
    """A model instead of kind, depth, …: module:function, transformers:NAME, torchvision:NAME,
    timm:NAME, a run folder, or a .safetensors file of a network. Nothing is downloaded: those of
    libraries start at random, but for a transformers folder with weights."""
    weights: Path | None = None
    """Weights to start from, .safetensors or a state_dict (.pt), where the model brings none."""
    stack: str | None = None
    """Of a model with several lists of blocks the one that is meant, such as model.decoder.layers;
    by default the longest."""
    new_head: bool = False
    """Give a trained model of transformers a new head where it has other classes than the data."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, pixels in [0, 1], that a model's images are standardised with; by
    default what its preprocessor_config.json says, else the data's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""

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
    """Factor by which the stem of a convolutional network shrinks the image: 1, 2, 4, …."""
    step: float = 1.0
    """Step size h: 1 is a standard residual network, T/N discretises a Neural ODE on [0, T]."""
    scheme: Literal["euler", "heun"] = "euler"
    """Scheme by which a residual function moves the state."""
    initialisation: Literal["independent", "smooth", "identical"] = "independent"
    """Start of the layers of a stage: each drawn by itself, as one smooth curve in depth (a
    Gaussian process), or all alike. Last layers start at zero with each."""
    length_scale: float = 0.5
    """Depth over which layers of a smooth start stay alike, in units of the whole stage; for a
    smooth start only."""
    start: Path | None = None
    """A .safetensors network of this very shape to start from, such as deeplimit refine writes."""
    frame: Path | None = None
    """A run, or .safetensors network, whose stem and head this one takes and does not train:
    between networks of one frame every point of the geodesic is a network (deeplimit interpolate,
    merge). Depth and hidden may differ, kind and width not."""

    gradient: Literal["backprop", "adjoint"] = "backprop"
    """adjoint: states rebuilt, not kept: memory flat in depth, a small gradient error, measured."""
    evaluations: int = 2
    """Evaluations of a layer for each state that the adjoint rebuilds; for the adjoint only."""
    bits: Literal[0, 2, 4, 8, "auto"] = newer(0)
    """Bits of a layer's update that the adjoint keeps instead of rebuilding; then any layer may be
    used that keeps the shape of a state. auto: each state kept, coded or rebuilt so that the
    gradient's error is within 1 %, where it is measured: after 1, 2, 4, … steps, in each epoch."""

    softness: float = 0.05
    """Softness ε of the cross-entropy: what the target leaves for the other classes together."""
    stage_cost: float = 0.1
    """Weight γ of the loss at every layer; 0 trains an ordinary residual network."""
    stage_cost_grows: bool = newer(False)  # noqa: FBT003
    """Let the weight grow from 0 to γ, with the square of the steps done: the answer at the end is
    learnt first, where only many layers together find it."""
    stage_cost_layers: int | None = None
    """Layers K whose loss a step takes, drawn anew for each; without it, and where the network has
    no more, all. The gradient's mean is that of all layers; a step costs less where the head is
    large."""
    control_cost: float = 0.0
    """Weight r of every layer's control cost."""
    control_cost_kind: Literal["squared", "kinetic", "group"] | None = None
    """What the control cost is, by default squared: half the squared norm of the control. kinetic:
    half the squared length of a state's update. group: the norm of the last parameters of each
    residual branch, by a proximal step: layers become exactly the identity and are cut for
    nothing."""
    points: float = 0.5
    """Points of accuracy (percent of the samples) that a cut may lose: by them the automatic cut is
    chosen on validation data and judged on test data."""
    rise: float | None = None
    """The same for a language model: by how many nats a token a cut may raise the loss; 0.05, a
    perplexity 5 % higher, if not given."""
    cut_while_training: int = newer(0)
    """Cut the last layers as soon as so many evaluations in a row say that the first ones are as
    good as all (the rule of the automatic cut, on validation data after every epoch, from 30 % of
    the epochs on): the epochs that follow are cheaper. What goes is gone, even if training on would
    have found a use for it. Of networks of one stage, of deeplimit's own or of transformers; 0:
    never."""
    confidence: float | None = None
    """Choose the automatic cut so that with this probability no more is lost than points, or rise,
    allows, whatever the network; 0.95 needs 311 validation samples for one point, 623 for half a
    one. By default more layers go, without that guarantee."""
    control: Literal["none", "plain"] = "none"
    """plain: train two networks without stage cost besides, by this recipe: one of this depth, cut
    alike, and one of the cut's depth from scratch. Both stand beside the cut, on test data."""

    epochs: int = 60
    """Passes over the training data; 0 takes a trained model as it is."""
    batch_size: int = 64
    """Samples in a batch, over all processes together."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with Nesterov momentum, with which most CIFAR networks were trained."""
    learning_rate: float = 4e-3
    """Largest learning rate of the one-cycle schedule."""
    weight_decay: float = 0.1
    """Weight decay: decoupled with adamw, added to the gradient with sgd."""
    crop: int = 0
    """Pixels of padding from which training images are cut at random; 0: none."""
    flip: bool = False
    """Mirror half of the training images left to right, or with --no-flip none."""
    seed: int = 0
    """Seed of the initial parameters, the order of the samples and the augmentation."""

    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    """Numbers to compute with; bf16-mixed keeps the parameters in 32 bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on CUDA where there is any."""
    devices: int = 1
    """Processes, one per device, that share every batch; a batch norm sees its process's part. One
    that gives no sign of life for 120 s (DEEPLIMIT_TIMEOUT) counts as lost: the others end."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Way in which processes share the work: ddp copies the network, fsdp divides it. auto: ddp."""

    def __post_init__(self) -> None:
        for name, kind in field_types(Recipe).items():
            object.__setattr__(self, name, coerce(kind, getattr(self, name), name))
        if self.model is not None:
            object.__setattr__(self, "model", Named.typed(self.model))
        if self.frame is not None:  # wherever the recipe is read again
            object.__setattr__(self, "frame", self.frame.absolute())
        check_ranges(self)
        for name, what in conflicts(self):
            value = getattr(self, name, None)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"{name} is {shown}{what}" if name else what)

    @classmethod
    def from_toml(cls, path: str | Path, *, trust: bool = False) -> "Recipe":
        """The recipe in a recipe.toml; whose code, a model module:function, runs only with trust.

        Raises:
            InputError: the file is not one, is of another version, or has a field that is unknown,
                missing, ill-typed or out of range; the message names the file and the field.
        """
        return read_recipe(Path(path), trust=trust)[0]

    def to_toml(self, class_names: Sequence[str] = ()) -> str:
        """Returns the text of recipe.toml: the fields, and the versions of what is used here."""
        fields = self.settings().items()
        return tomli_w.dumps(
            {
                "format": FORMAT,
                "versions": _versions(),
                "recipe": {name: value for name, value in fields if value is not None},
                "data": {"class_names": list(class_names)},
            }
        )

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, less those that are not read because a model is given."""
        settings: dict[str, Any] = to_plain(self)
        unread = NETWORK if self.model is not None else ()
        return {name: value for name, value in settings.items() if name not in unread}

    def of_model(self, model: str) -> "Recipe":
        """The same recipe for a given model, which has no control."""
        shape = {name: getattr(Recipe, name) for name in NETWORK}
        return replace(self, model=model, control="none", **shape)

    def with_absolute_paths(self) -> "Recipe":
        """The same recipe, to be read in any folder: the paths of what is there are absolute."""
        paths = {name: getattr(self, name) for name in ("data_dir", "weights", "start")}
        changed: dict[str, Any] = {name: p.absolute() for name, p in paths.items() if p is not None}
        for name in ("data", "model"):
            kind, colon, path = (getattr(self, name) or "").rpartition(":")
            # Else it is a name: of a data set, a function, a model that a library knows.
            known = kind not in ("", "npz", "text", "table", "transformers")
            if known or (name == "data" and not colon) or not path or not Path(path).exists():
                continue
            changed[name] = f"{kind}{colon}{Path(path).absolute()}"
        if isinstance(self.model, Named) and "model" in changed:
            changed["model"] = Named(changed["model"], self.model.file, trust=self.model.trust)
        return replace(self, **changed)

    @property
    def horizon(self) -> int:
        """N: the residual steps of all stages of a network that is built from kind and depth."""
        return sum(self.depth)


def read_recipe(path: Path, *, trust: bool = False) -> tuple[Recipe, tuple[str, ...]]:
    """Reads a recipe.toml: the recipe, and the names of the classes that it was run on."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a recipe.toml: give {path / 'recipe.toml'}")
    tables = read_toml(path, "correct or replace it")
    try:
        if tables.get("format") != FORMAT:
            raise InputError(
                f"format {tables.get('format')!r}, this deeplimit reads {FORMAT}; it is of "
                "another version: use that version, or train again"
            )
        for name in tables:
            if name not in TABLES:
                raise InputError(f"unknown field {name}; expected {', '.join(TABLES)}")
        if "recipe" not in tables:
            raise InputError("the table [recipe] is missing; correct or replace the file")
        settings: Any = tables["recipe"]
        if isinstance(settings, dict):
            if "model" in settings:  # which no field of a network of ours goes with
                settings = {name: getattr(Recipe, name) for name in NETWORK} | settings
            settings = _beside(settings, path.parent)
            if isinstance(model := settings.get("model"), str):
                settings["model"] = Named(model, path, trust=trust)
        names = coerce(dict, tables.get("data", {}), "data").get("class_names", [])
        class_names = coerce(tuple[str, ...], names, "data.class_names")
        return from_plain(Recipe, settings), class_names
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _beside(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Finds a start in the recipe's own folder, wherever that was moved."""
    found = dict(settings)
    kind, colon, model = str(settings.get("model", "")).rpartition(":")
    for name, value in (("start", str(settings.get("start", ""))), ("model", model)):
        if value in OWN_STARTS and (folder / value).exists():
            place = (folder / value).resolve()
            found[name] = f"{kind}{colon}{place}" if name == "model" else str(place)
    return found


@cache
def _versions() -> dict[str, str]:
    named = {name: version(name) for name in ("deeplimit", "torch")}
    return named | {"python": platform.python_version()}


# The figures that benchmarks/results report were reached with these.
RECIPES: dict[str, Recipe] = {
    "digits": Recipe(points=1.0),  # with 359 and 200 test samples less cannot be told
    "spirals": Recipe(
        data="spirals",
        kind="logit",
        depth=(40,),
        width=2,
        hidden=32,
        activation="tanh",
        step=0.25,
        stage_cost=0.25,
        epochs=200,
        weight_decay=1e-2,
        batch_size=50,
        learning_rate=1e-2,
        points=1.5,
    ),
    "mazes": Recipe(
        data="mazes",
        kind="convolutional",
        depth=(8,),
        width=16,
        hidden=16,
        reduction=1,
        stage_cost=1.0,
        stage_cost_grows=True,
        points=1.0,
        epochs=5,
        weight_decay=1e-2,
        learning_rate=1e-2,
    ),
    "mnist": Recipe(
        data="mnist",
        kind="convolutional",
        depth=(24,),
        width=16,
        hidden=16,
        reduction=4,
        stage_cost=0.2,
        epochs=14,
        weight_decay=1e-2,
        batch_size=128,
        learning_rate=5e-3,
        crop=2,
    ),
    "cifar10": Recipe(
        data="cifar10",
        kind="convolutional",
        depth=(9, 9, 9),
        width=16,
        hidden=16,
        reduction=1,
        epochs=100,
        batch_size=128,
        learning_rate=5e-3,
        weight_decay=5e-4,
        crop=4,
        flip=True,
    ),
}
IMAGES = replace(RECIPES["cifar10"], depth=(8, 8, 8), reduction=2, epochs=30)
# The stage cost that is best of vectors in benchmarks/results/every_depth.json.
VECTORS = Recipe(stage_cost=1.0, stage_cost_grows=True)
# Perplexity is that of the plain cross-entropy, which this softness changes in the sixth digit.
TEXT = Recipe(softness=1e-6, stage_cost=0.0, batch_size=8)
TABLE = Recipe(batch_size=16)
BY_PREFIX = {"npz": VECTORS, "text": TEXT, "table": TABLE}


def recipe_for(data: str, model: str | None = None, optimizer: str = "adamw") -> Recipe:
    """The default recipe of a data set, with a model of the user's or without.

    A name without an entry of its own gets the one for vectors (`npz:FILE`), for texts
    (`text:FILE`, `table:FILE`) or for images.
    """
    recipe = RECIPES.get(data)
    if recipe is None:
        recipe = replace(BY_PREFIX.get(data.partition(":")[0], IMAGES), data=data)
    if model is not None:  # usually trained already: few epochs, small steps
        recipe = replace(recipe.of_model(model), epochs=5, learning_rate=3e-4, weight_decay=0.05)
        if not data.startswith(TEXTS):
            recipe = replace(recipe, batch_size=64)
    if optimizer == "sgd":  # whose figures are of another size
        rate = 0.1 if model is None else 0.01
        recipe = replace(recipe, optimizer="sgd", learning_rate=rate, weight_decay=5e-4)
    return recipe
