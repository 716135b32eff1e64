"""The machine and the versions that a result was measured with."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch


@dataclass(frozen=True)
class Machine:
    """Stands beside the figures of a study, and of every benchmark.

    Attributes:
        processor: its model.
        cores: of the machine.
        threads: that torch used.
        python, torch, deeplimit: their versions.
        gpu: its name; None where torch sees none.
    """

    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    deeplimit: str
    gpu: str | None = None

    @classmethod
    def here(cls) -> "Machine":
        """Returns what this process runs on.

        >>> Machine.here().cores > 0
        True
        """
        return cls(
            processor=_processor(),
            cores=os.cpu_count() or 0,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            deeplimit=version("deeplimit"),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor()


def machine() -> dict[str, str | int]:
    """Returns it as plain values, to be stored beside the figures of a benchmark."""
    return {name: value for name, value in vars(Machine.here()).items() if value is not None}
