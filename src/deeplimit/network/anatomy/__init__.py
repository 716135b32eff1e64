"""A model read as stem, stages of layers, transitions and head; one file per family of models."""

from deeplimit.network.anatomy import (
    cifar_resnet,
    residual_classifier,
    timm_models,
    torchvision_models,
    transformers_bert,
    transformers_convnext,
    transformers_decoders,
    transformers_resnet,
    transformers_vit,
)
from deeplimit.network.anatomy.anatomy import Anatomy, Layer
from deeplimit.network.anatomy.block_anatomy import BlockAnatomy
from deeplimit.network.anatomy.rebuilding import check_rebuilt
from deeplimit.network.anatomy.registry import anatomy, register

__all__ = [
    "Anatomy",
    "BlockAnatomy",
    "Layer",
    "anatomy",
    "check_rebuilt",
    "cifar_resnet",
    "register",
    "residual_classifier",
    "timm_models",
    "torchvision_models",
    "transformers_bert",
    "transformers_convnext",
    "transformers_decoders",
    "transformers_resnet",
    "transformers_vit",
]
