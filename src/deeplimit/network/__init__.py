"""Residual networks: chains, schemes, residual functions, classifiers, anatomy."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit._anatomy import Anatomy, anatomy, register
    from deeplimit._anatomy.chain import Euler, Heun, ResidualChain, Scheme
    from deeplimit.network.blocks import ConvolutionalResidual, LinearResidual, TwoLayerResidual
    from deeplimit.network.cifar_resnet import CifarArchitecture, CifarResNet
    from deeplimit.network.classifiers import Architecture, ResidualClassifier
    from deeplimit.network.initialisation import identical_start, initialise, smooth_start
    from deeplimit.network.storage import load, save

__all__ = [
    "Anatomy",
    "Architecture",
    "CifarArchitecture",
    "CifarResNet",
    "ConvolutionalResidual",
    "Euler",
    "Heun",
    "LinearResidual",
    "ResidualChain",
    "ResidualClassifier",
    "Scheme",
    "TwoLayerResidual",
    "anatomy",
    "identical_start",
    "initialise",
    "load",
    "register",
    "save",
    "smooth_start",
]

__getattr__, __dir__ = lazy(__name__)
