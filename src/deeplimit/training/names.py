"""Names and paths that are wrong are told before anything large is imported."""

import errno
import importlib.util
import os
import re
from itertools import chain
from pathlib import Path

from deeplimit.data.registry import find_source
from deeplimit.errors import InputError, did_you_mean
from deeplimit.training.new_folder import ANOTHER, check_name
from deeplimit.training.recipe import Recipe
from deeplimit.training.run_files import SUFFIX
from deeplimit.training.run_folder import RunFolder
from deeplimit.training.trust import FORMS, is_run, parts_found

# Where to get a library whose models can be named.
LIBRARIES = {
    "transformers": "pip install 'deeplimit[hub]'",
    "torchvision": "install the one that goes with your torch",
    "timm": "install the one that goes with your torch",
}
MODEL_TYPE = re.compile(r'"([\w.-]+)"[,:]\s*"\w+Config"')


def check_spec(spec: str, *, trust: bool = False) -> None:
    """Refuses a model's name that nothing stands behind, as far as files tell; none is loaded.

    Raises:
        InputError: no such run folder, file, module or library, or no such model in it.
    """
    source, _, name = spec.partition(":")
    if source not in LIBRARIES and spec.endswith(SUFFIX):
        if not Path(spec).is_file():
            raise InputError(f"{spec}: no such file; the model is given as {FORMS}")
    elif is_run(spec):
        if not Path(spec).exists():
            raise InputError(f"{spec}: no such folder; the model is given as {FORMS}")
        RunFolder.open(spec, trust=trust)
    elif not source or not name:
        raise InputError(f"the model is {spec!r}; expected {FORMS}")
    elif source in LIBRARIES:
        if importlib.util.find_spec(source) is None:
            raise InputError(
                f"{source} cannot be imported (there is no such module); {LIBRARIES[source]}"
            )
        if source == "transformers":
            _check_type(name)
    else:
        check_module(spec, source, name)


def check_module(spec: str, module: str, function: str) -> None:
    """Raises InputError where no module is to be found; none is run."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        raise InputError(f"{spec!r} names no module and function; expected {FORMS}")
    if parts_found(module) == len(parts):
        return
    remedy = did_you_mean(module, LIBRARIES) or f"; expected {FORMS}"
    if module.endswith(".py"):
        remedy = f"; leave out .py: {module.removesuffix('.py')}:{function}"
    raise InputError(f"no module {module!r}, neither in this folder nor installed{remedy}")


def check_recipe(recipe: Recipe, runs: Path, name: str | None) -> None:
    """Raises InputError where data, model, weights or folder of a run cannot be there."""
    find_source(recipe.data, recipe.data_dir)
    if recipe.model is not None:
        check_spec(recipe.model, trust=getattr(recipe.model, "trust", False))
    if name is not None:
        check_name(name)
    check_runs(runs)


def check_runs(runs: Path) -> None:
    """Raises InputError where no folder can be made, as far as can be told without making one."""
    if runs.is_symlink() and not runs.exists():
        return  # told in full by who makes it
    nearest = next(
        place
        for place in chain([runs.absolute()], runs.absolute().parents)
        if os.path.lexists(place)
    )
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return
    if not nearest.is_dir():
        reason = "a file is in the way"
    elif os.statvfs(nearest).f_flag & os.ST_RDONLY:
        reason = os.strerror(errno.EROFS)
    else:
        reason = "it may not be written to"
    raise InputError(f"{runs}: no run folder can be made there ({reason}); {ANOTHER}")


def _check_type(name: str) -> None:
    """A model type, a path, or a name whose files are in the hub's cache."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    if Path(name).exists() or (cache / f"models--{name.replace('/', '--')}").exists():
        return
    found = importlib.util.find_spec("transformers")
    folder = Path(found.origin).parent if found is not None and found.origin else Path()
    types = {
        kind
        for file in (folder / "models" / "auto").glob("*a*to*_*.py")
        for kind in MODEL_TYPE.findall(file.read_text(encoding="utf-8", errors="replace"))
    }
    if types and name not in types:
        raise InputError(
            f"transformers:{name}: no file or folder of that name, no model type"
            f"{did_you_mean(name, types)}, and nothing in the hub's cache; fetch it first (hf "
            "download "
            f"{name}), or give a config.json"
        )
