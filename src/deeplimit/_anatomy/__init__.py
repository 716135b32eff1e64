"""A model read as stages of layers and a head: our own by family, any other by its own forward."""

from deeplimit._anatomy.anatomy import Anatomy, Layer
from deeplimit._anatomy.chain import Stack, chain_stacks
from deeplimit._anatomy.other_depths import check_rebuilt
from deeplimit._anatomy.read_model import ReadModel, anatomy, model_of, of_family, register
from deeplimit._anatomy.stand_ins import ReplayedBlock

__all__ = [
    "Anatomy",
    "Layer",
    "ReadModel",
    "ReplayedBlock",
    "Stack",
    "anatomy",
    "chain_stacks",
    "check_rebuilt",
    "model_of",
    "of_family",
    "register",
]
