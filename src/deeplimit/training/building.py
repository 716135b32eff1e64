"""From a recipe to the objects of a run: data, network, loss, batches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.control import SoftCrossEntropy, StageCost, verify_crop
from deeplimit.control.verdict import check_rise, check_tolerance
from deeplimit.control.verifying import CropResult
from deeplimit.data import Augmentation, DataSet, Split, iter_batches, load_dataset
from deeplimit.errors import InputError
from deeplimit.memory import OBJECTS, require
from deeplimit.network import (
    Architecture,
    CifarArchitecture,
    CifarResNet,
    ResidualClassifier,
    initialise,
)
from deeplimit.network.initialisation import check_kernel
from deeplimit.network.storage import architecture_of
from deeplimit.network.storage import load as load_own
from deeplimit.training.given_model import check_model, given_model
from deeplimit.training.models import keeps_any_depth
from deeplimit.training.processes import fitting_threads
from deeplimit.training.recipe import OWN_STARTS, Recipe
from deeplimit.training.run_files import RunFiles, as_vouched
from deeplimit.training.run_folder import RunFolder, reader_of

EVALUATION_BATCH = 256
LOGITS = 2**25  # of a batch of texts: 128 MiB in 32 bits
RISE = 0.05  # nats a token by which a cut may raise the loss: a perplexity 5 % higher
CACHE = ".data"  # in the folder of the runs: decoded images, memory-mapped by later runs


@dataclass(frozen=True)
class Fade:
    """Layers that lose their step size while the network trains, as in `Fading`.

    It is 1 up to the part `begin` of the training, goes down in equal parts, and is 0 from `end`.
    """

    layers: tuple[int, ...]
    end: float
    begin: float = 0.0

    def step(self, done: float) -> float:
        """The step size after this part of the training."""
        return min(1.0, max(0.0, (self.end - done) / (self.end - self.begin)))


@dataclass(frozen=True)
class Start:
    """All that a training starts from: the model at its initial parameters.

    The recipe has the standardisation settled; the data are standardised, where the model does not
    do it itself. What is minimised is the stage cost, or another objective of its arguments.
    """

    recipe: Recipe
    data: DataSet
    model: nn.Module
    objective: Callable[..., StageCost] = StageCost
    fade: Fade | None = None


def load_data(recipe: Recipe, runs: Path, run: RunFiles | None = None) -> DataSet:
    """The recipe's data as they are; decoded images are kept next to the runs."""
    return load_dataset(
        recipe.data,
        data_dir=recipe.data_dir,
        cache_dir=runs / CACHE,
        seed=recipe.seed,
        model=reader_of(recipe, run),
        length=recipe.length,
    )


def run_data(folder: RunFolder) -> DataSet:
    """The data of a run as its network sees them; a process loads them once."""
    if folder.data is None:
        data = load_data(folder.recipe, folder.path.parent, folder.files)
        scale = folder.standardisation
        data = data if scale is None else data.standardised(scale)
        object.__setattr__(folder, "data", data)  # remembered; nothing else of it changes
        return data
    return folder.data


def prepare(recipe: Recipe, data: DataSet) -> Start:
    """Makes all that a recipe trains on its data; nothing is written.

    Raises:
        InputError: recipe and data do not go together, or there is no such model.
    """
    loss_of(recipe, data)
    if recipe.model is None:
        start = Start(recipe, data, build_model(recipe, data))
    else:
        model, scale = given_model(recipe, data)
        if scale is not None:
            recipe = replace(recipe, mean=scale.mean, std=scale.std)
            data = data.standardised(scale)
        start = Start(recipe, data, model)
        sample = next(iter(evaluation_batches(data.train.take(1))))[0]
        check_model(model, sample, data, recipe.model or "", recipe)
    training_batches(recipe, data, 0, 0, recipe.devices)
    if recipe.cut_while_training:
        _check_one_stage(start)
    return start


def _check_one_stage(start: Start) -> None:
    """Raises InputError for a network whose last layers cannot go while it trains."""
    structure, model = anatomy(start.model), start.model
    why = ""
    if start.data.vocabulary is not None:
        why = "is a language model, of which layers of any place are cut"
    elif structure.stages > 1:
        why = f"has {structure.stages} stages, of which layers of any place are cut"
    elif not keeps_any_depth(model):
        why = "is one of which a run folder cannot store another depth"
    if why:
        raise InputError(
            f"cut_while_training is {start.recipe.cut_while_training}, but the "
            f"{type(model).__name__} {why}; leave it at 0"
        )


def build_model(recipe: Recipe, data: DataSet) -> ResidualClassifier | CifarResNet:
    """The network of the recipe's kind with the data's standardisation stored in it.

    It is the one in the file that the recipe starts from. Without one its initial parameters are a
    function of the recipe's seed; torch's global random state is left as it was. Stem and head are
    those of the recipe's frame, if it has one.

    Raises:
        InputError: the kind of network does not go with the data, or a file not with the recipe.
    """
    architecture = _architecture(recipe, data)
    if recipe.start is None:
        model = _initial(recipe, architecture, data)
    else:
        model = _begun(recipe.start, architecture)
        if recipe.start.name in OWN_STARTS:  # a run's own has the frame already
            return model
    if recipe.frame is not None:
        _take_frame(model, recipe.frame)
    return model


def _initial(
    recipe: Recipe, architecture: Architecture | CifarArchitecture, data: DataSet
) -> ResidualClassifier | CifarResNet:
    """With parameters of the recipe's seed."""
    what = f"a network of width {recipe.width}, hidden {recipe.hidden} and {recipe.horizon} layers"
    try:
        size = _size(architecture)
    except (OverflowError, RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise InputError(f"{what} does not fit into any memory; give smaller numbers") from error
    require(size, f"{what} does not fit into memory", "give smaller numbers")
    if recipe.initialisation == "smooth":
        check_kernel(max(recipe.depth))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = architecture.build()
    initialise(model, recipe.initialisation, recipe.length_scale)
    flat = recipe.kind in ("logit", "vector")
    return model.standardise(*data.standardisation(pixelwise=flat))


def _size(architecture: Architecture | CifarArchitecture) -> int:
    """Bytes of the two networks that a training holds, the one that learns and its copy.

    That is the least that it needs: gradients, the optimiser's state and the states come on top.
    Nothing is built but, without memory, a network with one or two layers in each stage.
    """

    def weights(depths: tuple[int, ...]) -> int:
        with torch.device("meta"):
            small = replace(architecture, depths=depths).build()
        return sum(p.numel() * p.element_size() for p in small.parameters())

    stages = len(architecture.depths)
    least = weights((1,) * stages)
    size = least
    for m, depth in enumerate(architecture.depths):
        more = tuple(1 + (n == m) for n in range(stages))
        size += (depth - 1) * (weights(more) - least + OBJECTS)
    return 2 * size


def _begun(
    path: Path, architecture: Architecture | CifarArchitecture
) -> ResidualClassifier | CifarResNet:
    """The network in a file, with its own standardisation, if it is of this architecture."""
    model = load_own(as_vouched(path))
    found, wanted = model.architecture.to_dict(), architecture.to_dict()
    for name, value in wanted.items():
        if name not in ("mean", "std") and found.get(name) != value:
            raise InputError(
                f"{path}: its {name} is {found.get(name)}, the recipe's {value}; a network starts "
                "from one of its own shape"
            )
    return model


def _take_frame(model: nn.Module, path: Path) -> None:
    """Copies what is outside the layers from the network in a file or a run."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"frame is {path}: there is no network; give a finished run or a .safetensors file, or "
            "put back the one that the recipe names"
        )
    source = load_own(as_vouched(file))
    mine, theirs = outside(model.state_dict()), outside(source.state_dict())
    for name in sorted({*mine, *theirs}):
        here, there = _shape(mine.get(name)), _shape(theirs.get(name))
        if here != there:
            raise InputError(
                f"{path}: its {name} is {there}, that of the network to train {here}; a frame is "
                "taken from a network of the same kind and width, on data of the same shape"
            )
    model.load_state_dict(theirs, strict=False)


def freeze_frame(recipe: Recipe, model: nn.Module) -> None:
    """Freezes all that is in no stage, where the recipe has a frame."""
    if recipe.frame is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("stages."))


def outside(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the values that are in no stage."""
    return {name: value for name, value in values.items() if not name.startswith("stages.")}


def _shape(value: Tensor | None) -> str:
    return "not there" if value is None else "×".join(map(str, value.shape)) or "a number"


def stage_cost(
    recipe: Recipe,
    data: DataSet,
    model: nn.Module,
    objective: Callable[..., StageCost] = StageCost,
) -> StageCost:
    """The recipe's stage cost, or another objective, around a model as it is."""
    return objective(
        model,
        loss_of(recipe, data),
        weight=recipe.stage_cost,
        control_cost=recipe.control_cost,
        control_cost_kind=recipe.control_cost_kind or "squared",
        layers=recipe.stage_cost_layers,
    )


def loss_of(recipe: Recipe, data: DataSet) -> SoftCrossEntropy:
    """The recipe's loss for the data's classes; InputError where the softness does not fit them."""
    return SoftCrossEntropy(data.classes, recipe.softness)


class WindowLoss(nn.Module):
    """The mean cross-entropy of each window's next tokens, in nats: [B, L, C] and [B, L] give [B].

    A sample is a window then: its tokens are not independent of each other.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the tokens of a window whose target is not −100."""
        values = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        counts = (targets != IGNORED).sum(1).clamp(min=1)
        return values.view_as(targets).sum(1) / counts


def measure_of(recipe: Recipe, data: DataSet) -> SoftCrossEntropy | WindowLoss:
    """Returns the loss reported: the recipe's, or of a language model that of each window."""
    return loss_of(recipe, data) if data.vocabulary is None else WindowLoss()


def compared(
    recipe: Recipe,
    data: DataSet,
    before: nn.Module,
    after: nn.Module,
    *,
    most: float | None = None,
    loss: nn.Module | None = None,
    split: Split | None = None,
) -> CropResult:
    """Two networks on a split, by default test data; judged by what may be lost.

    That is what the recipe says if not given.
    """
    most = tolerance_of(recipe, data) if most is None else most
    loss, held_out = loss or measure_of(recipe, data), evaluation_batches(split or data.test)
    with fitting_threads(recipe), torch.no_grad():
        return verify_crop(before, after, held_out, loss, tolerance=most)


def tolerance_of(recipe: Recipe, data: DataSet, asked: float | None = None) -> float:
    """Returns the loss allowed, asked for or the recipe's: a fraction of the accuracy, or nats."""
    if data.vocabulary is None:
        return check_tolerance(recipe.points / 100 if asked is None else asked)
    usual = RISE if recipe.rise is None else recipe.rise
    return check_rise(usual if asked is None else asked)


def training_batches(
    recipe: Recipe, data: DataSet, epoch: int, rank: int = 0, world: int = 1
) -> DataLoader[tuple[Inputs, Tensor]]:
    """One epoch's batches for one of `world` processes: a function of (seed, epoch) alone."""
    changes = Augmentation(recipe.crop, recipe.flip) if recipe.crop or recipe.flip else None
    return iter_batches(
        data.train,
        recipe.batch_size,
        seed=recipe.seed,
        epoch=epoch,
        rank=rank,
        world=world,
        augmentation=changes,
    )


def evaluation_batches(split: Split) -> DataLoader[tuple[Inputs, Tensor]]:
    """All samples of a split, in order; of texts so many that a batch's logits fit."""
    vocabulary = getattr(split, "vocabulary", None)
    most = EVALUATION_BATCH if vocabulary is None else LOGITS // (vocabulary * split.x.shape[1])
    return iter_batches(split, max(1, min(most, EVALUATION_BATCH)))


def _architecture(recipe: Recipe, data: DataSet) -> Architecture | CifarArchitecture:
    if data.is_text:
        raise InputError(
            f"{recipe.data} is text, which a {recipe.kind} network does not read; give a model"
        )
    if recipe.kind == "cifar-resnet":
        if len(data.shape) != 3 or data.shape[0] != 3:
            raise InputError(
                f"a cifar-resnet needs images of three colours, {recipe.data} has samples of shape "
                f"{data.shape}; give the kind convolutional or vector"
            )
        return CifarArchitecture(depths=recipe.depth, classes=data.classes)
    if data.train.x.dtype == torch.float64 and recipe.precision == "bf16-mixed":
        raise InputError(
            f"precision is bf16-mixed, but {recipe.data} has features so far from 0 that 32 bits "
            "are too coarse before they are standardised; give the precision 32-true or 64-true, "
            "or take away the features' means"
        )
    names = ("hidden", "activation", "norm", "step", "scheme", "reduction")
    return Architecture(
        recipe.kind,
        data.shape,
        data.classes,
        depths=recipe.depth,
        width=data.classes if recipe.kind == "logit" else recipe.width,
        **{name: getattr(recipe, name) for name in names},
    )


def reshaped(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with the depth, width and step of another network, where it says them."""
    architecture = None if recipe.model is not None else architecture_of(model)
    if architecture is None:
        return recipe
    said = architecture.to_dict()
    own = {name: said[name] for name in ("hidden", "step") if name in said}
    return replace(recipe, depth=architecture.depths, **own)
