"""The verbs: a table of names, functions and renderers, and how a command line becomes a call."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from deeplimit.errors import InputError, did_you_mean

Command = Callable[[], None]

DESCRIPTION = """How deep must my residual network be?

Train it once, too deep, with a stage cost; deeplimit measures its turnpike, cuts it to the
depth that is enough, and shows on held-out data what that changes. For example:
  deeplimit demo                        all of it on scikit-learn's digits, in a minute
  deeplimit train mnist --data-dir DIR  all of it on your data
  deeplimit crop runs/mnist --to 6      another cut of the same network
  deeplimit heal runs/mnist             train the cut network a little more
  deeplimit train --help                every setting, with its meaning and default

Each run leaves a folder, runs/NAME, with a page to look at, report.html.
Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 Ctrl-C, 143 SIGTERM.
Version: deeplimit --version"""


@dataclass(frozen=True)
class Verb:
    """A verb of the command.

    Attributes:
        summary: what it is for, in a line.
        function: FILE:NAME in the package; its parameters are the options (`options_of`).
        shown: FILE:NAME in report/, which renders the result.
        doing: what its progress is called.
    """

    summary: str
    function: str
    shown: str = ""
    doing: str = "measuring"


def parse(args: list[str]) -> Command:
    """The verb that a command line asks for, with its options, ready to be called.

    Raises:
        SystemExit: after --help, or after the parser's own message about a wrong verb or option.
        InputError: options that are wrong together.
    """
    if args == ["--version"]:
        return _print_version
    return _choose(VERBS, "deeplimit", DESCRIPTION, args)


def options(verb: Verb) -> type[Any]:
    """The dataclass of a verb's options."""
    from deeplimit.cli.options import options_of

    made = _function(verb)
    return made if isinstance(made, type) else options_of(made)


def answer(verb: Verb, given: Any) -> None:
    """Calls a verb's function, and prints what it returns."""
    from deeplimit.cli.options import call
    from deeplimit.cli.output import progress

    function = _function(verb)
    silent = given.json or "tell" not in signature(function).parameters  # or has its own bars
    with progress(quiet=silent, doing=verb.doing) as tell:
        found = call(function, given, {"tell": tell, "quiet": given.json})
    show(verb, found, json=given.json)


def show(verb: Verb, found: Any, *, json: bool) -> None:
    """Prints an answer: a table, and where files are.

    Raises:
        InputError: what was looked at is not as it should be.
    """
    from deeplimit.cli.output import emit

    if found.result is not None:  # the first of several processes has it
        table = [] if json else [_report(verb.shown)(found.result, *found.beside)]
        emit(found.result, *table, *found.written, json=json)
    if found.fault:
        raise InputError(found.fault)


def _function(verb: Verb) -> Any:
    return pkgutil.resolve_name(f"deeplimit.{verb.function}")


def _report(name: str) -> Callable[..., Any]:
    shown: Callable[..., Any] = pkgutil.resolve_name(f"deeplimit.report.{name}")
    return shown


def _choose(verbs: dict[str, Verb], prog: str, description: str, args: list[str]) -> Command:
    if args and args[0] in verbs:
        name, *words = args
        if name == "study":
            return _choose(STUDIES, "deeplimit study", "Experiments over several runs.", words)
        if name == "train":
            from deeplimit.cli.train import parse_train

            made = parse_train(words)
            return lambda: show(verbs[name], made.answer(), json=made.json)
        return _parse_options(verbs[name], f"{prog} {name}", words)
    if args and not args[0].startswith("-"):
        raise InputError(
            f"{prog} has no verb {args[0]!r}{did_you_mean(args[0], verbs)}; expected one of "
            f"{', '.join(verbs)}: {prog} --help says what each does"
        )
    from tyro.extras import SubcommandApp

    listing = SubcommandApp()  # for --help, and to say what is wrong with an option
    for name, verb in verbs.items():
        listing.command(name=name, help=verb.summary)(lambda: None)
    listing.cli(prog=prog, description=description, args=args)
    return lambda: None


def _parse_options(verb: Verb, prog: str, args: list[str]) -> Command:
    import tyro

    from deeplimit.cli.options import STYLE

    kind = options(verb)
    given = tyro.cli(kind, prog=prog, args=args, config=STYLE)
    return given if callable(given) else partial(answer, verb, given)


def _print_version() -> None:
    from deeplimit import __version__

    print(f"deeplimit {__version__}")


STUDIES = {
    "consistency": Verb(
        "Does training stop depending on width and depth as both grow?",
        "verbs.studies:consistency",
        "studies:consistency_summary",
        "training",
    ),
    "convergence": Verb(
        "Where does training converge at a rate known before it starts?",
        "verbs.studies:convergence",
        "convergence:convergence_summary",
        "training",
    ),
    "horizon": Verb(
        "Does the number of layers in use stay bounded as the network gets deeper?",
        "verbs.studies:horizon",
        "studies:horizon_table",
    ),
    "linear": Verb(
        "Do linear residuals stay near a Neural ODE while they train?",
        "verbs.studies:linear",
        "studies:rates_summary",
        "training",
    ),
    "smooth": Verb(
        "Do two-layer residuals stay near a Neural ODE if they start smooth in depth?",
        "verbs.studies:smooth",
        "studies:rates_summary",
        "training",
    ),
}
VERBS = {
    "demo": Verb(
        "All of it on data that need no download, within a minute.",
        "verbs.runs:demo",
        "console:finished_summary",
    ),
    "train": Verb(
        "Train too deep, measure the turnpike, cut to the depth that is enough.",
        "verbs.runs:train",
        "console:finished_summary",
    ),
    "profile": Verb(
        "Measure the turnpike of a trained network, layer by layer.",
        "verbs.runs:profile",
        "console:profile_summary",
    ),
    "crop": Verb(
        "Cut a trained network to fewer layers.", "verbs.runs:crop", "console:crop_summary"
    ),
    "heal": Verb(
        "Train a cut network a little more, with the full one as its teacher.",
        "verbs.runs:heal",
        "console:healing_summary",
    ),
    "gradient": Verb(
        "What memory-free gradients would save on a model, and at what error.",
        "verbs.networks:gradient",
        "gradient_cost:gradient_summary",
    ),
    "ode": Verb(
        "How far a network is from its Neural ODE, and how smooth in depth.",
        "verbs.networks:ode",
        "depth_limit:depth_limit_summary",
    ),
    "refine": Verb(
        "Make a trained network deeper, as its Neural ODE says, and train on from there.",
        "verbs.runs:refine",
        "console:refinement_summary",
    ),
    "compare": Verb(
        "How far networks are from one another, whatever their widths and depths.",
        "verbs.measures:compare",
        "measures:comparison_summary",
        "comparing",
    ),
    "interpolate": Verb(
        "Loss and accuracy along the geodesic between two networks.",
        "verbs.measures:interpolate",
        "measures:interpolation_summary",
    ),
    "merge": Verb(
        "Join trained networks in one.",
        "verbs.measures:merge",
        "measures:merge_summary",
        "merging",
    ),
    "report": Verb(
        "Write the page of a run again.", "verbs.runs:report", "console:finished_summary"
    ),
    "verify": Verb(
        "Check that the files of a run are what they were when they were written.",
        "verbs.runs:verify",
        "console:verification_lines",
    ),
    "study": Verb(
        "Experiments over several runs: consistency, convergence, horizon, linear, smooth.", ""
    ),
}
