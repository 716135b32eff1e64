"""How the files of a run are written again, where one is damaged."""

from pathlib import Path
from shlex import quote

MADE = "make the run again, by deeplimit refine, merge or interpolate"
# How the files are written again, by their names without suffix.
REMEDIES = {
    "recipe": "put it back; if you changed it yourself: deeplimit verify {} --accept",
    "model": "write it again: deeplimit train --resume {}",
    "metrics": "delete it, then deeplimit train --resume {} writes it again from the checkpoint",
    "profile": "write it again: deeplimit profile {}",
    "trajectories": "write it again: deeplimit profile {}",
    "crop": "write it again: deeplimit crop {} --to auto",
    "cropped": "make the cut again: deeplimit crop {}",
    "heal": "write it again: deeplimit heal {}",
    "healed": "heal its cut again: deeplimit heal {}",
    "ode": "write it again: deeplimit ode {}",
    "certificate": "write it again: RunFolder.write_certificate",
    "reference": "write it again: deeplimit train --resume {}",
    "report": "write it again: deeplimit report {}",
    "gradient": "write it again: deeplimit gradient {}",
    "start": MADE,
    "refine": MADE,
    "merge": MADE,
}


def elsewhere(folder: Path) -> str:
    """What to do with a run in a place that cannot be written to."""
    copy = f"DIR/{quote(folder.resolve().name)}"
    return (
        "copy the run into a folder DIR that can be: "
        f"cp -r {quote(str(folder))} {copy} && chmod -R u+w {copy}; then give {copy}"
    )


def stem(name: str) -> str:
    """Cropped of cropped.safetensors and of cropped/config.json."""
    return name.partition("/")[0].partition(".")[0]


def remedy(folder: Path, name: str) -> str:
    """What to do where a file of a run is damaged."""
    return REMEDIES.get(stem(name), "put it back").format(folder)
