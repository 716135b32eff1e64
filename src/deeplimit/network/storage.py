"""A network in one safetensors file: weights, and in the metadata what to build them into.

Loading needs `deeplimit.network` alone, no training code.
"""

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network.cifar_resnet import CifarArchitecture, CifarResNet
from deeplimit.network.classifiers import Architecture, ResidualClassifier

FORMAT = "1"
ARCHITECTURES: dict[str, type[Architecture] | type[CifarArchitecture]] = {
    "ResidualClassifier": Architecture,
    "CifarResNet": CifarArchitecture,
}


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes a network, aside first and then renamed, so that the file is whole or not there.

    Raises:
        InputError: a model that does not carry an architecture of ours; use torch's own means.
    """
    kind = type(model).__name__
    if not isinstance(model, ResidualClassifier | CifarResNet) or kind not in ARCHITECTURES:
        raise InputError(
            f"{kind} has no architecture to store; expected {' or '.join(ARCHITECTURES)}: "
            "save its state_dict() with safetensors instead"
        )
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {
        "deeplimit.format": FORMAT,
        "deeplimit.kind": kind,
        "deeplimit.architecture": json.dumps(model.architecture.to_dict()),
    }
    # Copies: parameters that layers share may not lie in one file otherwise.
    weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, aside, metadata=metadata)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def load(path: str | Path) -> ResidualClassifier | CifarResNet:
    """Reads a network that `save` wrote, on the CPU, in its precision and in evaluation mode.

    Raises:
        InputError: no such file, a file cut short, or one that `save` did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a network saved by deeplimit")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({error})") from error
    if metadata.get("deeplimit.format") != FORMAT:
        raise InputError(
            f"{path}: format {metadata.get('deeplimit.format')!r}, expected {FORMAT!r}; it was "
            "written by another version of deeplimit or by another program"
        )
    try:
        architecture = ARCHITECTURES[metadata["deeplimit.kind"]]
        settings: dict[str, Any] = json.loads(metadata["deeplimit.architecture"])
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
        }
        model = architecture(**values).build().to(_precision(weights))
        model.load_state_dict(weights)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise InputError(f"{path}: weights and architecture do not fit ({reason})") from error
    return model.eval()


def _precision(weights: dict[str, Tensor]) -> torch.dtype:
    floating = (w.dtype for w in weights.values() if w.is_floating_point())
    return next(floating, torch.get_default_dtype())
