"""What a residual network is: chains, schemes, residual functions, classifiers, anatomy."""

from deeplimit.network.anatomy import Anatomy, anatomy, register
from deeplimit.network.blocks import ConvolutionalResidual, LinearResidual, TwoLayerResidual
from deeplimit.network.chain import ResidualChain
from deeplimit.network.cifar_resnet import CifarArchitecture, CifarResNet
from deeplimit.network.classifiers import Architecture, ResidualClassifier
from deeplimit.network.initialisation import identical_start, initialise, smooth_start
from deeplimit.network.schemes import Euler, Heun, Scheme
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
