"""What a verb returns, what the verbs for a trained network are given, and the page of a run."""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from deeplimit.errors import InputError
from deeplimit.studies.experiments import RUNS
from deeplimit.terminal import is_first_process
from deeplimit.training import Recipe, RunFolder, recipe_for
from deeplimit.training.run_folder import check_recipe
from deeplimit.training.specification import LARGEST_SEED, is_run

PAGE = "report.html"

# Parameters that several verbs have; a text by itself is what stands for the value in the help.
Model = Annotated[
    str,
    "MODEL",
    Doc(
        "A run folder, module:function, transformers:NAME (a model type, config.json, folder or "
        "cached hub name), torchvision:NAME, timm:NAME, or a .safetensors file of a network. "
        "Nothing is downloaded."
    ),
]
Figure = Annotated[Path | None, "FILE"]  # a page to write
Runs = Annotated[Path, "DIR", Doc("Folder for the run folders.")]
Run = Annotated[str | Path, "RUN", Doc("The run folder that train wrote.")]
Shape = Annotated[
    str | None,
    "C,H,W",
    Doc("Shape of one random input, where the model does not say it: 3,224,224."),
]
Trust = Annotated[
    bool,
    Doc(
        "Run the code that the recipe.toml of a run folder names as its model; which files these "
        "are is said first. See docs/trust.md."
    ),
]


@dataclass(frozen=True)
class Within:
    """Numbers that an option may have: it is refused before anything large is imported.

    Attributes:
        least, most: the ends, which belong to them.
        above: whether the least itself is none of them; `below` likewise.
    """

    least: int | float
    most: int | float = math.inf
    above: bool = False
    below: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises InputError for another number, or where it is one of several."""
        for number in value if isinstance(value, tuple) else (value,):
            low = self.least < number if self.above else self.least <= number
            high = number < self.most if self.below else number <= self.most
            if not (low and high):
                raise InputError(f"{name} is {number}; expected {self}")

    def __str__(self) -> str:
        """Says what is expected."""
        if math.isinf(self.most):
            return f"{'a number >' if self.above else 'at least'} {self.least}"
        start = f"a number {'above' if self.above else 'from'} {self.least}"
        return f"{start} {'to less than' if self.below else 'to'} {self.most}"


COUNT, POSITIVE, PART = Within(1), Within(0, above=True), Within(0, 1)
FRACTION = Within(0, 1, above=True)
SURE = Within(0.5, 1, above=True, below=True)
Seed = Annotated[int, Within(0, LARGEST_SEED)]


@dataclass(frozen=True)
class Answer:
    """The findings of a verb.

    Attributes:
        result: a record of numbers.
        written: what to say of the files that it left.
        beside: what else a table of the result shows.
        fault: what is wrong with what was looked at; empty where nothing is.
    """

    result: Any
    written: tuple[str, ...] = ()
    beside: tuple[Any, ...] = ()
    fault: str = ""


def show(folder: RunFolder) -> Answer:
    """Writes the page from what is in the folder; several processes leave it to the first."""
    if not is_first_process():
        return Answer(None)
    from deeplimit.report import write_page
    from deeplimit.training.results import Finished

    page = folder.path / PAGE
    with folder.commit() as new:
        results = new.results()
        write_page(results, new.files.place(PAGE))
    return Answer(Finished(folder.path, page, results), (f"The page is at {page.resolve()}",))


def renew_page(folder: RunFolder) -> str:
    """Writes the page from what is in the folder; says where it is."""
    return "".join(show(folder).written)


def profiled(folder: RunFolder) -> str:
    """Profiles a run that was made just now, and writes its page; says where it is."""
    from deeplimit.training import profile_run

    with folder.commit() as new:
        profile_run(new)
        return renew_page(new)


def unusual(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The names among `given` whose values are not the defaults."""
    return [name for name, value in given.items() if value != defaults[name]]


def option(name: str) -> str:
    """Writes a parameter as on the command line."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Elsewhere:
    """A model that was trained elsewhere: a run folder is made of it, nothing is trained.

    Raises:
        InputError: by its methods: no such run or model, a model without data, or a run with these.
    """

    data: Annotated[str | None, "DATA"] = None
    """Of a MODEL: its data, as in deeplimit train; of a model of text text:FILE, or table:FILE with
    columns text and label. A new run folder is made, nothing is trained."""
    length: Annotated[int | None, "L"] = None
    """Of a MODEL of text: tokens of a window, or the most of a text in a table; 256 by default."""
    data_dir: Path | None = None
    """Of a MODEL: folder that holds the data sets' folders; else DEEPLIMIT_DATA says where."""
    weights: Annotated[Path | None, "FILE"] = None
    """Of a MODEL: its weights, .safetensors or a state_dict (.pt), where it brings none."""
    stack: Annotated[str | None, "NAME"] = None
    """Of a MODEL with several lists of blocks: the one that is meant; by default the longest."""
    mean: tuple[float, ...] | None = None
    """Of a MODEL: mean of each channel that it was trained with, as in deeplimit train."""
    std: tuple[float, ...] | None = None
    """Of a MODEL: standard deviation of each channel, likewise."""
    runs: Runs = RUNS
    """Of a MODEL: folder for the run folder."""
    name: Annotated[str | None, "NAME"] = None
    """Of a MODEL: the run folder's name; by default the data set's."""

    @contextmanager
    def opened(self, run: str, *, trust: bool) -> Iterator[RunFolder]:
        """The run folder; one that was made now for a model is gone if what was asked is wrong."""
        folder = self.folder(run, trust=trust)
        try:
            yield folder
        except InputError:
            if self.data is not None:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise

    def folder(self, run: str, *, trust: bool) -> RunFolder:
        """The run folder, made now for a model."""
        made = self.check(run, trust=trust)
        if isinstance(made, RunFolder):
            return made
        from deeplimit.training import train

        return train(made, runs=self.runs, name=self.name)

    def check(self, run: str, *, trust: bool) -> RunFolder | Recipe:
        """The run folder, or the recipe of one to be made for a model; nothing large is loaded."""
        if is_run(run):
            there = Path(run)
            if (there / "config.json").is_file() and not (there / "recipe.toml").exists():
                raise InputError(
                    f"{run} is the folder of a model, not of a run: write transformers:{run}"
                )
            for name in unusual(vars(self), vars(Elsewhere())):
                raise InputError(
                    f"{option(name)} given, but {run} is a run folder, which has its own; leave "
                    f"{option(name)} out"
                )
            return RunFolder.open(run, trust=trust)
        if self.data is None:
            raise InputError(
                f"{run} is a model, not a run folder: give its data too, such as --data cifar10"
            )
        own = {n: value for n, value in vars(self).items() if n not in ("data", "runs", "name")}
        recipe = replace(recipe_for(self.data, run), epochs=0, **own)
        check_recipe(recipe, self.runs, self.name)
        return recipe


def check_figure(figure: Path | None) -> None:
    """Raises InputError where a page cannot be written to; before minutes of measuring."""
    if figure is None:
        return
    if figure.suffix == ".json":
        raise InputError(f"figure is {figure}; expected an .html file, its .json is written beside")
    if figure.is_dir() or not figure.parent.is_dir():
        why = "is a folder" if figure.is_dir() else f"there is no folder {figure.parent}"
        raise InputError(f"figure is {figure}: {why}; give a file in a folder that is there")
