"""Tensors in files, of safetensors and of torch.save: sizes first, and no code."""

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deeplimit.reading import reading


def read_safetensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a safetensors file, on the CPU, and its metadata."""
    fault = "damaged or not a safetensors file"
    with reading(path, fault, remedy), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_pickled(path: Path, fault: str, remedy: str) -> Any:
    """Reads what torch.save wrote, of tensors and plain values only, on the CPU.

    torch.load looks at no checksum, and would unpack what torch.save never packs.
    """
    with reading(path, fault, remedy):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size, there = sum(f.file_size for f in archive.infolist()), path.stat().st_size
                if size > there:
                    raise ValueError(f"{size} bytes announced in a file of {there}")
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            # Before what is wrong torch says how to run the code in the file, and colours it.
            said = str(error).partition("WeightsUnpickler error:")[2].strip()
            raise ValueError(said.partition(". Please use")[0] or "no pickle") from error
