"""The networks written out by hand, a line per formula, to hold the package's answers against.

Nothing here goes through an anatomy, a scheme or a chain's forward.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit.network import CifarResNet, Heun, ResidualChain, ResidualClassifier

Walk = list[tuple[int, Tensor]]


def naive_chain(chain: ResidualChain, x: Tensor) -> list[Tensor]:
    """Euler or Heun, a step at a time."""
    blocks, h = [chain._modules[key] for key in chain._modules], chain.step
    states = [x]
    if isinstance(chain.scheme, Heun):
        for left, right in itertools.pairwise(blocks):
            a = left(x)
            x = x + h / 2 * (a + right(x + h * a))
            states.append(x)
    else:
        for block in blocks:
            x = x + h * block(x)
            states.append(x)
    return states


def naive_walk(model: nn.Module, x: Tensor) -> tuple[Walk, Tensor]:
    """The states that enter the layers and the head, each with its stage; and the logits."""
    if isinstance(model, ResidualChain):
        states = naive_chain(model, x)
        return [(0, s) for s in states], states[-1]
    if isinstance(model, CifarResNet):
        return naive_cifar_resnet(model, x)
    if not isinstance(model, ResidualClassifier):
        raise TypeError(type(model))
    walk: Walk = []
    x = model.stem(x)
    for m, chain in enumerate(model.stages):
        if m > 0:
            x = model.projections[m - 1](x)
        *entering, x = naive_chain(chain, x)
        walk += [(m, s) for s in entering]
    walk.append((len(model.stages) - 1, x))
    return walk, model.head(x)


def naive_carry(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """A state of a stage in the shape of the next, batch norms with their running statistics."""
    if isinstance(model, CifarResNet):
        return option_a(x)
    conv, norm = model.projections[stage]
    x = F.conv2d(x, conv.weight, conv.bias, stride=2)
    if isinstance(norm, nn.BatchNorm2d):
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[
            :, None, None
        ]
    return norm(x)


def naive_logits(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """z of one state: the remaining projections, then the head."""
    if isinstance(model, ResidualChain):
        return x
    for m in range(stage, len(model.stages) - 1):
        x = naive_carry(model, m, x)
    return model.head(x)


def option_a(x: Tensor) -> Tensor:
    """Every second pixel, zero channels in equal parts before and after; entry by entry."""
    b, c, h, w = x.shape
    y = torch.zeros(b, 2 * c, (h + 1) // 2, (w + 1) // 2, dtype=x.dtype)
    for channel in range(c):
        for i in range(0, h, 2):
            for j in range(0, w, 2):
                y[:, c // 2 + channel, i // 2, j // 2] = x[:, channel, i, j]
    return y


def naive_cifar_resnet(model: CifarResNet, x: Tensor) -> tuple[Walk, Tensor]:
    """ResNet of He et al. 2015, section 4.2, from its state_dict alone."""
    weights = dict(model.state_dict(keep_vars=True))
    training = model.training

    def normalise(name: str, x: Tensor) -> Tensor:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    x = (x - model.mean) / model.std
    x = normalise("bn1", F.conv2d(x, weights["conv1.weight"], padding=1)).relu()
    walk: Walk = []
    for m in (1, 2, 3):
        blocks = sorted({int(k.split(".")[1]) for k in weights if k.startswith(f"layer{m}.")})
        if m > 1 and 0 not in blocks:
            x = option_a(x)
        for i in blocks:
            name = f"layer{m}.{i}"
            changes = m > 1 and i == 0
            walk.append((m - 1 - changes, x))
            y = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=1 + changes, padding=1)
            y = F.conv2d(
                normalise(f"{name}.bn1", y).relu(), weights[f"{name}.conv2.weight"], padding=1
            )
            x = (normalise(f"{name}.bn2", y) + (option_a(x) if changes else x)).relu()
    walk.append((2, x))
    return walk, x.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]
