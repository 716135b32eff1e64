"""What a residual network is: chains, schemes, residual functions, classifiers, anatomy."""

from deeplimit._anatomy import Anatomy, anatomy, register
from deeplimit._anatomy.chain import ResidualChain
from deeplimit._anatomy.schemes import Euler, Heun, Scheme
from deeplimit.network import cifar_anatomy, classifier_anatomy  # they register
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
    "cifar_anatomy",
    "classifier_anatomy",
    "identical_start",
    "initialise",
    "load",
    "register",
    "save",
    "smooth_start",
]
