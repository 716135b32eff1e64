"""What a residual network is: chains, schemes, residual functions, classifiers, anatomy."""

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: the vocabulary of shapes needs no torch."""
    if name in __all__:
        from deeplimit._anatomy import chain, registry
        from deeplimit.network import blocks, cifar_resnet, classifiers, initialisation, storage

        files = (registry, chain, blocks, cifar_resnet, classifiers, initialisation, storage)
        return next(getattr(file, name) for file in files if hasattr(file, name))
    raise AttributeError(f"module 'deeplimit.network' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
