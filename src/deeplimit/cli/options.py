"""A verb's options are made from its function: signature and docstring give name, default, help.

Positional parameters are words, keyword-only ones options. A parameter that is a dataclass stands
for its fields. A text in an annotation is what stands for the value in the help, `Doc` explains a
parameter that several functions have. `tell` and `quiet` are the command line's own to give. The
options of `deeplimit train` are a recipe's fields, with the defaults of the data set given.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, Positional, arg

from deeplimit.errors import InputError
from deeplimit.training import Recipe, recipe_for
from deeplimit.training.specification import Named
from deeplimit.verbs import resume, train
from deeplimit.verbs.answer import Answer, Trust, Within, option

# No --no-json beside --json, and no way to spell out None: leave the option out.
STYLE = (FlagCreatePairsOff, DisallowNone)
HIDDEN = ("tell", "quiet")
DEFAULT_DATA = "digits"
BESIDE_RESUME = ("--resume", "--trust", "--json")

Json = Annotated[bool, arg(help="Print the result as JSON on stdout, and nothing else there.")]


def options_of(function: Callable[..., Any]) -> type[Any]:
    """The options of a verb, and --json, as a dataclass that the parser reads."""
    description, explained = documented(function)
    bases: tuple[Any, ...] = ()
    own: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, default = parameter.annotation, parameter.default
        if name in HIDDEN:
            continue
        if is_dataclass(kind):
            bases = (kind,)
            own += [(f.name, parsed(f.type), f) for f in fields(kind)]
            continue
        said = explained.get(name)
        if said and default is True:  # the option is --no-NAME
            said = f"Do not {said[0].lower()}{said[1:]}"
        hint = parsed(kind, said, default, positional=parameter.kind is not parameter.KEYWORD_ONLY)
        required = default is inspect.Parameter.empty
        own.append((name, hint, field() if required else field(default=default)))
    own.append(("json", Json, field(default=False)))
    namespace = {"__doc__": description, "__module__": function.__module__}
    return make_dataclass(
        function.__name__, own, bases=bases, namespace=namespace, frozen=True, kw_only=True
    )


def call(function: Callable[..., Any], options: Any, hidden: Mapping[str, Any]) -> Any:
    """Calls a function with what was parsed, and what of `hidden` it takes.

    Raises:
        InputError: a number that is not within what its annotation says.
    """
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = parameter.annotation
        if name in HIDDEN:
            given[name] = hidden[name]
        elif is_dataclass(kind):
            values = {f.name: getattr(options, f.name) for f in fields(kind)}
            given[name] = kind(**values)  # type: ignore[operator]
        else:
            value = given[name] = getattr(options, name)
            for note in getattr(kind, "__metadata__", ()):
                if isinstance(note, Within) and value is not None:
                    note.check(option(name), value)
    return function(**given)


def documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Returns what a docstring says of a function, and of each parameter."""
    description, *sections = re.split(
        r"\n(?=(?:Args|Raises|Returns):\n)", inspect.getdoc(function) or ""
    )
    args = next((section for section in sections if section.startswith("Args:")), "")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", args, re.M)
    return description.strip(), {name: " ".join(text.split()) for name, text in entries}


def parsed(
    hint: Any, explained: str | None = None, default: Any = None, *, positional: bool = False
) -> Any:
    """An annotation that says to the parser what a function's says to people; `Doc` it reads."""
    notes = getattr(hint, "__metadata__", ())
    metavar = next((note for note in reversed(notes) if isinstance(note, str)), None)
    words = "" if default is True else default_hint
    told = arg(metavar=metavar, help=explained, help_behavior_hint=words)
    return Annotated[hint, Positional, told] if positional else Annotated[hint, told]


def default_hint(value: str) -> str:
    """None says nothing: the text of such an option says what is done without it."""
    return "" if value in ("", "None") else f"(default: {value})"


@dataclass(frozen=True, kw_only=True)
class Train(options_of(train)):  # type: ignore[misc]
    """The options of `train`, and what goes with a run or a recipe that is there."""

    data: Annotated[str, Positional, arg(metavar="DATA")] = DEFAULT_DATA
    """digits, mazes, spirals, mnist, cifar10, hub:OWNER/NAME, npz:FILE, or a folder in the data
    folder; for a model of text text:FILE, or table:FILE with columns text and label."""
    recipe: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=default_hint)] = None
    """Take data set and defaults from this recipe.toml; options given beside it override it."""
    resume: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint=default_hint)] = None
    """Go on with the run in this folder, by its own recipe; goes with no other option but json
    and trust."""
    trust: parsed(Trust) = False  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        """Checks nothing: the parser would put a box around what `Recipe` has to say."""

    def answer(self) -> Answer:
        """Trains, or goes on training; then profiles, cuts and writes the page."""
        if self.resume is not None:
            return resume(self.resume, trust=self.trust)
        own = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        return train(Recipe(**own), runs=self.runs, name=self.name)


def parse_train(args: list[str]) -> Train:
    """Reads the options twice: to see which data set is meant, then with that one's defaults.

    Raises:
        InputError: options that do not go together, or a recipe that cannot be read.
    """
    words = [word for word in args if word not in ("-h", "--help")]
    given = _parse(words, Train(data=""))
    if given.resume is not None:
        _refuse_others(words, given)
    if given.recipe is not None and given.data:
        raise InputError(
            f"data set {given.data!r} and --recipe {given.recipe} given; the recipe names its own "
            "data set: leave one of them out"
        )
    if given.recipe is not None:
        defaults = Recipe.from_toml(given.recipe, trust=given.trust)
        if given.model is not None:
            defaults = defaults.of_model(given.model)
    else:
        defaults = recipe_for(given.data or DEFAULT_DATA, given.model, given.optimizer)
    # Help on its own: what was given already would be left out of it.
    made = _parse(args if words == args else ["--help"], Train(**vars(defaults)))
    model = defaults.model  # as it was before the parser had it: with where it comes from
    if made.trust and isinstance(model, Named):
        model = Named(model, model.file, trust=True)
    settings: dict[str, Any] = {"model": model}  # of fields that the checker does not know
    return replace(made, **settings)


def _parse(args: list[str], defaults: Train) -> Train:
    return tyro.cli(
        Train,
        prog="deeplimit train",
        description=documented(train)[0],
        args=args,
        default=defaults,
        # What one data set has to be told not to do, another does not do by itself.
        config=STYLE if args == ["--help"] else (DisallowNone,),
    )


def _refuse_others(words: list[str], given: Train) -> None:
    """A run goes on by its own recipe: an option that would silently be ignored is refused.

    Also one whose value is the default here: the run's may be another.
    """
    places = [i for i, word in enumerate(words) if word.startswith("--")]
    said = [" ".join(words[i:j]) for i, j in pairwise([*places, len(words)])]
    others = [one for one in said if re.split("[ =]", one)[0] not in BESIDE_RESUME]
    for what in [f"data set {given.data}"] if given.data else others:
        raise InputError(
            f"{what} and --resume {given.resume} given; a run goes on by its own recipe: leave out "
            f"{what}, or leave out --resume to start a new run"
        )
