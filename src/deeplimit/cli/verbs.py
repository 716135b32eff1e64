"""The verbs: a table of names and functions, one of results and renderers, and how a command line
becomes a call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pkgutil import resolve_name
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
        file: in verbs/, of the function of that name; its parameters are the options
            (`options_of`).
        summary: what it is for, in a line.
        doing: what its progress is called.
    """

    file: str
    summary: str
    doing: str = "measuring"


STUDIES = {
    name: Verb("studies", summary, "training")
    for name, summary in {
        "consistency": "Does training stop depending on width and depth as both grow?",
        "convergence": "Where does training converge at a rate known before it starts?",
        "horizon": "Does the number of layers in use stay bounded as the network gets deeper?",
        "linear": "Do linear residuals stay near a Neural ODE while they train?",
        "smooth": "Do two-layer residuals stay near a Neural ODE if they start smooth in depth?",
    }.items()
}
VERBS = {
    "demo": Verb("runs", "All of it on data that need no download, within a minute."),
    "train": Verb("runs", "Train too deep, measure the turnpike, cut to the depth that is enough."),
    "profile": Verb("runs", "Measure the turnpike of a trained network, layer by layer."),
    "crop": Verb("runs", "Cut a trained network to fewer layers."),
    "heal": Verb("runs", "Train a cut network a little more, with the full one as its teacher."),
    "gradient": Verb(
        "networks", "What memory-free gradients would save on a model, and at what error."
    ),
    "ode": Verb("networks", "How far a network is from its Neural ODE, and how smooth in depth."),
    "refine": Verb(
        "runs", "Make a trained network deeper, as its Neural ODE says, and train on from there."
    ),
    "compare": Verb(
        "measures",
        "How far networks are from one another, whatever their widths and depths.",
        "comparing",
    ),
    "interpolate": Verb("measures", "Loss and accuracy along the geodesic between two networks."),
    "merge": Verb("measures", "Join trained networks in one.", "merging"),
    "report": Verb("runs", "Write the page of a run again."),
    "verify": Verb(
        "runs", "Check that the files of a run are what they were when they were written."
    ),
    "study": Verb("", f"Experiments over several runs: {', '.join(STUDIES)}."),
}
SHOWN = {  # the class of a result: FILE:NAME in report/, which renders it
    "Comparison": "measures:comparison_summary",
    "ConsistencyStudy": "studies:consistency_summary",
    "ConvergenceStudy": "convergence:convergence_summary",
    "Cut": "console:crop_summary",
    "DepthLimit": "depth_limit:depth_limit_summary",
    "Finished": "console:finished_summary",
    "GradientCost": "gradient_cost:gradient_summary",
    "Healing": "console:healing_summary",
    "HorizonStudy": "studies:horizon_table",
    "Interpolation": "measures:interpolation_summary",
    "LinearStudy": "studies:rates_summary",
    "MergedRuns": "measures:merge_summary",
    "Profiles": "console:profile_summary",
    "Refinement": "console:refinement_summary",
    "SmoothStudy": "studies:rates_summary",
    "Verification": "console:verification_lines",
}


def parse(args: list[str]) -> Command:
    """The verb that a command line asks for, with its options, ready to be called.

    Raises:
        SystemExit: after --help, or after the parser's own message about a wrong verb or option.
        InputError: options that are wrong together.
    """
    if args == ["--version"]:
        return _print_version
    if args[:1] == ["study"]:
        return _choose(STUDIES, "deeplimit study", "Experiments over several runs.", args[1:])
    return _choose(VERBS, "deeplimit", DESCRIPTION, args)


def function_of(name: str, verb: Verb) -> Callable[..., Any]:
    """The function of a verb."""
    function: Callable[..., Any] = resolve_name(f"deeplimit.verbs.{verb.file}:{name}")
    return function


def show(found: Any, *, json: bool) -> None:
    """Prints an answer: a table, and where files are.

    Raises:
        InputError: what was looked at is not as it should be.
    """
    from deeplimit.cli.output import emit

    result = found.result
    if result is not None:  # the first of several processes has it
        shown = f"deeplimit.report.{SHOWN[type(result).__name__]}"
        table = [] if json else [resolve_name(shown)(result, *found.beside)]
        emit(result, *table, *found.written, json=json)
    if found.fault:
        raise InputError(found.fault)


def _choose(verbs: dict[str, Verb], prog: str, description: str, args: list[str]) -> Command:
    if args and args[0] in verbs:
        name, *words = args
        return _parsed(name, verbs[name], prog, words)
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


def _parsed(name: str, verb: Verb, prog: str, args: list[str]) -> Command:
    if verb is VERBS["train"]:
        from deeplimit.cli.train import parse_train

        made = parse_train(args)
        return lambda: show(made.answer(), json=made.json)
    import tyro

    from deeplimit.cli.options import STYLE, options_of

    function = function_of(name, verb)
    given = tyro.cli(options_of(function), prog=f"{prog} {name}", args=args, config=STYLE)
    return partial(_answer, function, given, verb.doing)


def _answer(function: Callable[..., Any], given: Any, doing: str) -> None:
    """Calls a verb's function, and prints what it returns."""
    from deeplimit.cli.options import call
    from deeplimit.cli.output import progress

    silent = given.json or "tell" not in signature(function).parameters  # or has its own bars
    with progress(quiet=silent, doing=doing) as tell:
        found = call(function, given, {"tell": tell, "quiet": given.json})
    show(found, json=given.json)


def _print_version() -> None:
    from deeplimit import __version__

    print(f"deeplimit {__version__}")
