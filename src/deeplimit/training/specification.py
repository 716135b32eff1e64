"""What is told before anything is loaded: faults of a recipe's fields, of a model's specification.

A specification `module:function` is code. Typed on the command line or written in a program it is
the user's own; out of a recipe.toml it is whoever's wrote the file. `Named` says which on its way
through recipes, and `check_code` stands before the one import. A text that was made of another one
says nothing any more, and its code is not run.
"""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplimit.errors import InputError, did_you_mean
from deeplimit.network.shape import check_shape
from deeplimit.terminal import is_first_process, tell
from deeplimit.training.run_files import SUFFIX

if TYPE_CHECKING:
    from deeplimit.training.recipe import Recipe
else:
    Recipe = Any

LARGEST_SEED = 2**31 - 1  # what every random generator in use takes
LARGEST = 1e18  # optimisers square gradients, and so what multiplies them, in 32 bits: up to 3e38
LEAST = {"evaluations": 1, "stage_cost_layers": 1, "batch_size": 1, "devices": 1, "crop": 0}
LEAST |= {"length": 2, "rise": 0, "cut_while_training": 0}
POSITIVE = ("step", "length_scale", "learning_rate")
COSTS = ("stage_cost", "control_cost", "weight_decay")
PUBLISHED = {"activation": "relu", "norm": "batch", "step": 1.0, "scheme": "euler"}
# What says how a network of ours is built; nothing where the model is given.
NETWORK = (
    *("kind", "depth", "width", "hidden", "reduction"),
    *("initialisation", "length_scale", "start", "frame", *PUBLISHED),
)
TEXTS = ("text:", "table:")  # of data that a tokenizer reads
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
    def typed(cls, spec: str, *, trust: bool = False) -> "Named":
        """As the user typed it, or wrote it in a program; what is marked already stays as it is."""
        return spec if isinstance(spec, Named) else cls(spec, trust=trust)


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


def _chain(module: str) -> Iterator[ModuleSpec]:
    """Package, subpackage, …, module; `importlib.util.find_spec` would import all but the last."""
    name, *parts = module.split(".")
    with suppress(ValueError), current_folder():  # a module without one, such as __main__
        found = importlib.util.find_spec(name)
        while found is not None:
            yield found
            if not parts:
                return
            places = list(found.submodule_search_locations or ())
            name = f"{name}.{parts[0]}"
            loaded: ModuleSpec | None = getattr(sys.modules.get(name), "__spec__", None)
            # By its own name alone: for a dotted one the package would have to be loaded.
            found = loaded or PathFinder.find_spec(parts.pop(0), places)


@contextmanager
def current_folder() -> Iterator[None]:
    """Modules are looked for in the current folder too, as by `python -m`."""
    here, before = os.getcwd(), sys.path[:]
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path[:] = before


@cache
def _tell(message: str) -> None:
    if is_first_process():
        tell(f"deeplimit: {message}")


def check_ranges(recipe: Recipe) -> None:
    """Each number by itself."""
    shape = {n: getattr(recipe, n) for n in ("width", "hidden", "reduction", "step")}
    check_shape(recipe.kind, recipe.depth, **shape, name="depth", least=1)
    least = LEAST | {"epochs": 1 if recipe.model is None and recipe.start is None else 0}
    for name, number in least.items():
        value = getattr(recipe, name)
        if value is not None and value < number:
            raise InputError(f"{name} is {value}; expected at least {number}")
    for name in (*POSITIVE, *COSTS):
        value, positive = getattr(recipe, name), name in POSITIVE
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            expected = "a number above 0" if positive else "a number ≥ 0"
            raise InputError(f"{name} is {value:g}; expected {expected}")
        if value > LARGEST:
            raise InputError(
                f"{name} is {value:g}; expected at most {LARGEST:g}, whose square a number of "
                "32 bits holds: give a smaller one"
            )
    sure = 0.95 if recipe.confidence is None else recipe.confidence
    soft = "a number above 0 and below 1 − 1/C for C classes, such as 0.05"
    for name, right, expected in (
        ("softness", 0 < recipe.softness < 1, soft),
        (
            "points",
            0 <= recipe.points < 50,
            "from 0 to less than 50 points of accuracy, such as 0.5",
        ),
        ("confidence", 0.5 < sure < 1, "a fraction above 0.5 and below 1, such as 0.95"),
    ):
        if not right:
            raise InputError(f"{name} is {getattr(recipe, name):g}; expected {expected}")
    check_seed(recipe.seed)


def conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields for each conflict a field, and the words on its value; or no field, and all words."""
    kind, usual = f"a {recipe.kind} network", type(recipe)

    def given(name: str) -> bool:
        return bool(getattr(recipe, name) != getattr(usual, name))

    if recipe.model is not None:
        for name in filter(given, NETWORK):
            yield (
                name,
                f", but the model is {recipe.model}, which is built already; leave {name} out",
            )
    else:
        if recipe.weights is not None:
            yield (
                "weights",
                ", but no model is given; a network of deeplimit's own, or published weights of a "
                f"CIFAR ResNet, is a model by itself: model {recipe.weights}",
            )
        if recipe.stack is not None:
            yield "stack", f", but no model is given: {kind} has one; leave stack out"
        if any(map(given, ("new_head", "mean", "std"))):
            name = "new_head" if recipe.new_head else "mean or std"
            what = f"{kind} has a head for the data and standardises its own inputs"
            yield "", f"{name} given, but no model: {what}; leave {name} out"
    if (recipe.mean is None) != (recipe.std is None):
        yield "", "mean and std go together; give both, or neither"
    if not recipe.data:
        yield "data", "empty; expected the name of a data set, such as digits"
    if recipe.frame is not None and (recipe.kind not in ("vector", "logit") or not recipe.hidden):
        linear = "" if recipe.hidden else " with hidden 0"
        yield (
            "frame",
            f", but the layers of {kind}{linear} are no means of particles alone; leave it out, or "
            "give the kind vector or logit with hidden particles",
        )
    # The published architecture leaves no choice; a field must not be silently ignored.
    for name, fixed in PUBLISHED.items() if recipe.kind == "cifar-resnet" else ():
        if getattr(recipe, name) != fixed:
            remedy = "Leave it out, or give the kind convolutional"
            yield name, f"; a cifar-resnet has {name} {fixed}. {remedy}"
    # Fields that only go with another one's value, why, and how to leave them.
    for name, other, value, why, out in (
        ("length_scale", "initialisation", "smooth", "has none", f"at {usual.length_scale:g}"),
        ("evaluations", "gradient", "adjoint", "rebuilds no state", f"at {usual.evaluations}"),
        ("bits", "gradient", "adjoint", "keeps all states", "out"),
    ):
        there = getattr(recipe, other)
        if there != value and given(name):
            what = f", but the {other} {there} {why}; give the {other} {value}"
            yield name, f"{what}, or leave {name} {out}"
    if recipe.bits != 0 and given("evaluations"):
        what = f", but bits is {recipe.bits}: states come back by codes, or as planned"
        yield "evaluations", f"{what}; leave one out"
    if recipe.bits == "auto" and recipe.strategy == "fsdp":
        yield (
            "bits",
            ", but the strategy fsdp divides the parameters, by which no plan can be measured; "
            "give 2, 4 or 8",
        )
    if recipe.gradient == "adjoint" and recipe.kind == "cifar-resnet" and recipe.bits == 0:
        yield (
            "gradient",
            ": the states of a cifar-resnet cannot be rebuilt, because of the ReLU after every "
            "addition; give bits, the gradient backprop, or the kind convolutional",
        )
    for name, cost, why in (
        ("stage_cost_layers", "stage_cost", ": no layer has a loss"),
        ("control_cost_kind", "control_cost", ""),
    ):
        if getattr(recipe, name) is not None and getattr(recipe, cost) == 0:
            yield name, f", but {cost} is 0{why}; leave it out, or give a {cost} above 0"
    for name, forms in {"rise": TEXTS[:1], "length": TEXTS}.items():
        if getattr(recipe, name) is not None and not recipe.data.startswith(forms):
            what = f", but {recipe.data} is no text ({', '.join(forms)}…), to which it belongs"
            yield name, f"{what}; leave {name} out"
    if recipe.control == "plain":  # the same network less its stage cost, and one less deep
        name = "start" if recipe.model is None else "model"
        if getattr(recipe, name) is not None:
            yield (
                "control",
                f", but {name} is {getattr(recipe, name)}: a network that starts from weights has "
                "no like of another depth that starts from scratch; leave control at none",
            )
        if recipe.stage_cost == 0:
            yield (
                "control",
                ", but stage_cost is 0: the network is its own control; leave control at none, or "
                "give a stage_cost above 0",
            )
    if recipe.cut_while_training > recipe.epochs > 0:
        what = f" evaluations, one after each epoch, but epochs is {recipe.epochs}"
        yield "cut_while_training", f"{what}; give fewer, or more epochs"
    if recipe.control == "plain" and recipe.cut_while_training > 0:
        yield (
            "cut_while_training",
            ", but control is plain, and a network that got shorter has no like that stayed as "
            "deep; leave one of them out",
        )
    if recipe.batch_size % recipe.devices != 0:
        what = f", which {recipe.devices} devices cannot share equally"
        yield "batch_size", f"{what}; give a multiple of {recipe.devices}"


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that not every random generator in use takes."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed is {seed}; expected a number from 0 to {LARGEST_SEED}")
