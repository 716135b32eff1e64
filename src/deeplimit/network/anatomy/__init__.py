"""A model read as stages of layers and a head: our own by family, any other by its own forward."""

from deeplimit.network.anatomy import cifar_resnet, residual_classifier
from deeplimit.network.anatomy.anatomy import Anatomy, Layer
from deeplimit.network.anatomy.charging import ReplayedBlock
from deeplimit.network.anatomy.read_model import ReadModel
from deeplimit.network.anatomy.rebuilding import check_rebuilt
from deeplimit.network.anatomy.registry import anatomy, of_family, register
from deeplimit.network.anatomy.stack import Stack, chain_stacks

__all__ = [
    "Anatomy",
    "Layer",
    "ReadModel",
    "ReplayedBlock",
    "Stack",
    "anatomy",
    "chain_stacks",
    "check_rebuilt",
    "cifar_resnet",
    "of_family",
    "register",
    "residual_classifier",
]
