"""A network in one safetensors file: weights, and in the metadata what to build them into.

Loading needs `deeplimit.network` alone, no training code.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.files import whole
from deeplimit.network.cifar_resnet import CifarArchitecture, CifarResNet
from deeplimit.network.classifiers import Architecture, ResidualClassifier
from deeplimit.network.weights import read_safetensors
from deeplimit.reading import parse_json

FORMAT = "1"
ARCHITECTURES: dict[str, type[Architecture] | type[CifarArchitecture]] = {
    "ResidualClassifier": Architecture,
    "CifarResNet": CifarArchitecture,
}


def architecture_of(model: nn.Module) -> Architecture | CifarArchitecture | None:
    """The architecture of a network of our own; None of any other model, a subclass too."""
    if not isinstance(model, ResidualClassifier | CifarResNet):
        return None
    return model.architecture if type(model).__name__ in ARCHITECTURES else None


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes a network; the file is whole or not there, the same network gives the same bytes.

    Raises:
        InputError: a model that does not carry an architecture of ours; use torch's own means.
        RunError: the disk is full or cannot be written to.
    """
    kind, architecture = type(model).__name__, architecture_of(model)
    if architecture is None:
        raise InputError(
            f"{kind} has no architecture to store; expected {' or '.join(ARCHITECTURES)}: "
            "save its state_dict() with safetensors instead"
        )
    metadata = {
        "deeplimit.format": FORMAT,
        "deeplimit.kind": kind,
        "deeplimit.architecture": json.dumps(architecture.to_dict()),
    }
    write_weights(model, Path(path), metadata)
    return Path(path)


def write_weights(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes a state_dict with metadata, whole."""
    # Copies: parameters that share memory may not lie in one file.
    weights = {
        name: w.detach().cpu().contiguous().clone() for name, w in model.state_dict().items()
    }
    with whole(path) as aside:
        with file_errors():
            save_file(weights, aside, metadata=metadata)
        _sort_metadata(aside)


@contextmanager
def file_errors() -> Iterator[None]:
    """Raises an OSError for safetensors' words on the disk, "… (os error 28)"."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error


def _sort_metadata(path: Path) -> None:
    """Puts the metadata in the order of its names; the library's is another one every time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # blanks fill it up, as the library does itself
            file.seek(8)
            file.write(text.ljust(size))


def load(path: str | Path) -> ResidualClassifier | CifarResNet:
    """Reads a network that `save` wrote, on the CPU, in its precision and in evaluation mode.

    Raises:
        InputError: no such file, a file cut short, one that `save` did not write, or weights that
            are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a network saved by deeplimit")
    weights, metadata = read_safetensors(path, "expected a network saved by deeplimit")
    if metadata.get("deeplimit.format") != FORMAT:
        raise InputError(
            f"{path}: format {metadata.get('deeplimit.format')!r}, expected {FORMAT!r}; it was "
            "written by another version of deeplimit or by another program"
        )
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(
                f"{path}: {name} is not finite: its training diverged; take "
                "weights from before, or train again with a smaller learning rate"
            )
    try:
        architecture = ARCHITECTURES[metadata["deeplimit.kind"]]
        settings: dict[str, Any] = parse_json(metadata["deeplimit.architecture"])
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
        }
        model = _built(architecture(**values), weights)
        model.load_state_dict(weights)
    except Exception as error:  # whatever an architecture's values lead to
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise InputError(f"{path}: weights and architecture do not fit ({reason})") from error
    return model.eval()


def _built(
    architecture: Architecture | CifarArchitecture, weights: dict[str, Tensor]
) -> ResidualClassifier | CifarResNet:
    """The network, if there are weights for all of it: else it might fill the memory."""
    if sum(architecture.depths) > len(weights):  # a layer has at least one
        raise ValueError(f"{sum(architecture.depths)} layers, but {len(weights)} tensors")
    with torch.device("meta"):
        outline = architecture.build().state_dict()
    wanted, there = (sum(w.numel() for w in of.values()) for of in (outline, weights))
    if wanted > there:
        raise ValueError(f"{wanted} numbers in the network, {there} in the file")
    floating_ones = (w.dtype for w in weights.values() if w.is_floating_point())
    precision = next(floating_ones, torch.get_default_dtype())
    for name, tensor in weights.items():
        floating = tensor.is_floating_point()
        if name in outline and floating != outline[name].is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}")
        if floating and tensor.dtype != precision:
            raise ValueError(f"{name} is {tensor.dtype}, others are {precision}")
    return architecture.build().to(precision)
