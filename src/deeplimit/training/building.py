"""From a recipe to the objects of a run: data, network, loss, batches."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deeplimit.control import SoftCrossEntropy, StageCost
from deeplimit.data import Augmentation, DataSet, Split, batches, load
from deeplimit.errors import InputError
from deeplimit.gradient import use_adjoint
from deeplimit.network import Architecture, CifarArchitecture, CifarResNet, ResidualClassifier
from deeplimit.training.recipe import Recipe

Network = ResidualClassifier | CifarResNet

EVALUATION_BATCH = 256
CACHE = ".data"  # in the folder of the runs: decoded images, memory-mapped by later runs


def load_data(recipe: Recipe, runs: Path) -> DataSet:
    """The recipe's data; decoded images are kept next to the runs."""
    return load(recipe.data, data_dir=recipe.data_dir, cache_dir=runs / CACHE, seed=recipe.seed)


def build_model(recipe: Recipe, data: DataSet) -> Network:
    """The recipe's network with the data's standardisation stored in it.

    Its initial parameters are a function of the recipe's seed; torch's global random state is left
    as it was.

    Raises:
        InputError: the kind of network does not go with the data.
    """
    architecture = _architecture(recipe, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = architecture.build()
    flat = recipe.kind in ("logit", "vector")
    return model.standardise(*data.standardisation(pixelwise=flat))


def build_objective(recipe: Recipe, data: DataSet) -> StageCost:
    """What is minimised: the stage cost around a new network, switched to the recipe's gradient.

    Of how far rebuilt states are off the training itself tells: for all processes together.
    """
    model = build_model(recipe, data)
    if recipe.gradient == "adjoint":
        use_adjoint(model, evaluations=recipe.evaluations, on_drift="ignore")
    return StageCost(model, loss_of(recipe, data), recipe.stage_cost, recipe.control_cost)


def loss_of(recipe: Recipe, data: DataSet) -> SoftCrossEntropy:
    """The recipe's loss for the data's classes; InputError where the softness does not fit them."""
    return SoftCrossEntropy(data.classes, recipe.softness)


def training_batches(
    recipe: Recipe, data: DataSet, epoch: int, rank: int = 0, world: int = 1
) -> DataLoader[tuple[Tensor, Tensor]]:
    """One epoch's batches for one of `world` processes: a function of (seed, epoch) alone."""
    changes = Augmentation(recipe.crop, recipe.flip) if recipe.crop or recipe.flip else None
    return batches(
        data.train,
        recipe.batch_size,
        seed=recipe.seed,
        epoch=epoch,
        rank=rank,
        world=world,
        augmentation=changes,
    )


def evaluation_batches(split: Split) -> DataLoader[tuple[Tensor, Tensor]]:
    """All samples of a split, in order."""
    return batches(split, EVALUATION_BATCH)


def check_fit(recipe: Recipe, data: DataSet) -> None:
    """Raises InputError if recipe and data do not go together; nothing is written."""
    loss_of(recipe, data)
    _architecture(recipe, data)
    training_batches(recipe, data, 0, 0, recipe.devices)


def _architecture(recipe: Recipe, data: DataSet) -> Architecture | CifarArchitecture:
    if recipe.kind == "cifar-resnet":
        if len(data.shape) != 3 or data.shape[0] != 3:
            raise InputError(
                f"a cifar-resnet needs images of three colours, {recipe.data} has samples of shape "
                f"{data.shape}; give the kind convolutional or vector"
            )
        return CifarArchitecture(depths=recipe.depth, classes=data.classes)
    return Architecture(
        kind=recipe.kind,
        shape=data.shape,
        classes=data.classes,
        depths=recipe.depth,
        width=data.classes if recipe.kind == "logit" else recipe.width,
        hidden=recipe.hidden,
        activation=recipe.activation,
        norm=recipe.norm,
        step=recipe.step,
        scheme=recipe.scheme,
        reduction=recipe.reduction,
    )
