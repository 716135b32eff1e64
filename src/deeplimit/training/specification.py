"""Forms of a model's specification; faults and code in one are told before an import.

A specification `module:function` is code. Typed on the command line or written in a program it is
the user's own; out of a recipe.toml it is whoever's wrote the file. `Named` says which on its way
through recipes, and `check_code` stands before the one import. A text that was made of another one
says nothing any more, and its code is not run.
"""

import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from deeplimit.errors import InputError, did_you_mean
from deeplimit.rank import is_first_process
from deeplimit.terminal import tell
from deeplimit.training.run_files import SUFFIX

FORMS = (
    "a run folder, module:function, transformers:NAME, torchvision:NAME, timm:NAME or a "
    ".safetensors file of a network"
)
# Where to get a library whose models can be named.
LIBRARIES = {
    "transformers": "pip install 'deeplimit[hub]'",
    "torchvision": "install the one that goes with your torch",
    "timm": "install the one that goes with your torch",
}
MODEL_TYPE = re.compile(r'"([\w.-]+)"[,:]\s*"\w+Config"')


class Named(str):
    """A model's specification, and whose words it is.

    Attributes:
        file: which names it; None where the user did.
        trust: whether code may be run that `file`, or a run folder which this names, names.
    """

    file: Path | None
    trust: bool

    def __new__(cls, spec: str, file: Path | None = None, *, trust: bool = False) -> "Named":
        """The text, marked."""
        named = super().__new__(cls, spec)
        named.file, named.trust = file, trust
        return named

    @classmethod
    def typed(cls, spec: str) -> "Named":
        """As the user typed it, or wrote it in a program; what is marked already stays as it is."""
        return spec if isinstance(spec, Named) else cls(spec)


def is_run(spec: str) -> bool:
    """Says whether a specification is the path of a run folder, there or not."""
    return Path(spec).is_dir() or not (":" in spec or spec.endswith(SUFFIX))


def check_single(spec: str) -> None:
    """Refuses a specification that nothing stands behind, as far as files tell; none is loaded.

    Raises:
        InputError: no such folder, file, module or library, or no such type of model.
    """
    source, _, name = spec.partition(":")
    if is_run(spec) or (source not in LIBRARIES and spec.endswith(SUFFIX)):
        if not Path(spec).exists():
            what = "file" if spec.endswith(SUFFIX) else "folder"
            raise InputError(f"{spec}: no such {what}; the model is given as {FORMS}")
    elif not source or not name:
        raise InputError(f"the model is {spec!r}; expected {FORMS}")
    elif source not in LIBRARIES:
        _check_module(spec, source, name)
    elif source in sys.modules:
        return  # the library itself knows better
    elif importlib.util.find_spec(source) is None:
        raise InputError(
            f"{source} cannot be imported (there is no such module); {LIBRARIES[source]}"
        )
    elif source == "transformers":
        _check_type(name)


def _check_module(spec: str, module: str, function: str) -> None:
    """Raises InputError where no module is to be found; none is run."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        raise InputError(f"{spec!r} names no module and function; expected {FORMS}")
    if module in sys.modules or len([*_chain(module)]) == len(parts):
        return
    remedy = did_you_mean(module, LIBRARIES) or f"; expected {FORMS}"
    if module.endswith(".py"):
        remedy = f"; leave out .py: {module.removesuffix('.py')}:{function}"
    raise InputError(f"no module {module!r}, neither in this folder nor installed{remedy}")


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
        raise no_such_type(name, types)


def no_such_type(name: str, types: Iterable[str]) -> InputError:
    """The error for a model of transformers of which there are no files."""
    return InputError(
        f"transformers:{name}: no file or folder of that name, no model type"
        f"{did_you_mean(name, types)}, and nothing in the hub's cache; fetch it first (hf download "
        f"{name}), or give a config.json"
    )


def check_code(spec: str, module: str) -> None:
    """Before a module is imported: is it the user's, or trusted? Then its files are told on stderr.

    Raises:
        InputError: a file names it, and nobody said that it may be run; or nothing says who does.
    """
    if isinstance(spec, Named) and spec.file is None:
        return
    file = spec.file if isinstance(spec, Named) else "something unknown"
    code = ", ".join(sources(module)) or "found neither in this folder nor installed"
    if not isinstance(spec, Named) or not spec.trust:
        raise InputError(
            f"{file} names code, {spec} ({code}), which is not run unasked; read it, then give "
            "--trust (in Python trust=True) if it may be"
        )
    _tell(f"running code that {file} names, {spec}: {code}")


def sources(module: str) -> list[str]:
    """The files that importing a module runs, those of packages above it first; none is run."""
    return [found.origin or "no file" for found in _chain(module) if found.loader is not None]


@contextmanager
def current_folder() -> Iterator[None]:
    """Modules are looked for in the current folder too, as by `python -m`."""
    here = os.getcwd()
    given = here not in sys.path
    if given:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if given:
            with suppress(ValueError):
                sys.path.remove(here)


def _chain(module: str) -> Iterator[ModuleSpec]:
    """Package, subpackage, …, module; `importlib.util.find_spec` would import all but the last."""
    top, *parts = module.split(".")
    with current_folder():
        try:
            found = importlib.util.find_spec(top)
        except ValueError:  # a module without one, such as __main__
            found = None
        name = top
        while found is not None:
            yield found
            if not parts:
                return
            name = f"{name}.{parts.pop(0)}"
            places = list(found.submodule_search_locations or ())
            found = _inside(name, places)


def _inside(name: str, places: list[str]) -> ModuleSpec | None:
    """Finds a name in the folders of its package; several make a package without a file."""
    loaded: ModuleSpec | None = getattr(sys.modules.get(name), "__spec__", None)
    if loaded is not None:
        return loaded
    finders = (pkgutil.get_importer(place) for place in places)
    every = [spec for finder in finders if finder and (spec := finder.find_spec(name))]
    whole = next((spec for spec in every if spec.loader is not None), None)
    if whole is not None or not every:
        return whole
    joined = ModuleSpec(name, None, is_package=True)
    joined.submodule_search_locations = [
        place for spec in every for place in spec.submodule_search_locations or ()
    ]
    return joined


@cache
def _tell(message: str) -> None:
    if is_first_process():
        tell(f"deeplimit: {message}")
