"""The control of a block: the parameters on which a control cost acts."""

from torch import nn

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def layers_of(block: nn.Module) -> list[nn.Module]:
    """The modules that have parameters of their own, in order of registration, taken for use."""
    return [m for m in block.modules() if next(m.parameters(recurse=False), None) is not None]


def control(block: nn.Module) -> list[nn.Parameter]:
    """The control θ_n of a block, on which a control cost acts.

    All its parameters; where the block has a norm, those from its last norm on, which is the norm's
    scale and bias if the block ends in it. A penalty on the weights before a norm is no control
    cost, since the norm undoes their scale. θ_n = 0 gives φ = 0.
    """
    layers = layers_of(block)
    norms = [i for i, layer in enumerate(layers) if isinstance(layer, NORM_LAYERS)]
    deciding = layers[norms[-1] :] if norms else layers
    every = (p for layer in deciding for p in layer.parameters(recurse=False))
    return list({id(p): p for p in every}.values())
