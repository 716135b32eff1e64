"""`deeplimit train`: its options are a recipe's fields, with the defaults of the data set given."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from deeplimit.cli.options import STYLE, default_hint, documented, options_of, parsed
from deeplimit.errors import InputError
from deeplimit.training import Recipe, recipe_for
from deeplimit.training.specification import Named
from deeplimit.verbs import resume, train
from deeplimit.verbs.answer import Answer, Trust, option, unusual

DEFAULT_DATA = "digits"


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
    nothing = Train(data="")
    words = [word for word in args if word not in ("-h", "--help")]
    given = _parse(words, nothing)
    if given.resume is not None:
        _refuse_others(given, nothing)
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
        config=STYLE,
    )


def _refuse_others(given: Train, nothing: Train) -> None:
    """A run goes on by its own recipe: an option that would silently be ignored is refused."""
    for name in unusual(vars(given), vars(nothing)):
        if name in ("resume", "trust", "json"):
            continue
        value = getattr(given, name)
        what = "data set" if name == "data" else option(name)
        words = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise InputError(
            f"{what} {words} and --resume {given.resume} given; a run goes on by its own recipe: "
            f"leave out {what}, or leave out --resume to start a new run"
        )
