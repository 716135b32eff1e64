"""The verbs: their names, a table of results and renderers, how a command line becomes a call."""

import sys
from collections.abc import Callable, Collection
from functools import partial
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from deeplimit.errors import InputError, did_you_mean
from deeplimit.terminal import progress, stop_writing, visible_json

Command = Callable[[], None]

DESCRIPTION = """Train a residual network once, use it at every depth.

With a stage cost, the loss at every layer, each state is an answer. deeplimit measures every
depth on held-out data, cuts to the one that is enough, and shows what that changes. For example:
  deeplimit demo                        all of it on mazes that need depth, in a minute
  deeplimit train mnist --data-dir DIR  all of it on your data
  deeplimit crop runs/mnist --to 6      another cut of the same network
  deeplimit heal runs/mnist             train the cut network a little more
  deeplimit train --help                every setting, with its meaning and default

Each run leaves a folder, runs/NAME, with a page to look at, report.html.
Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 Ctrl-C, 143 SIGTERM.
Version: deeplimit --version"""


STUDIES = {  # the function of each; a record that it returns gets a page
    "consistency": "studies:study_consistency",
    "convergence": "studies:study_convergence",
    "horizon": "verbs.measures:horizon",
    "linear": "studies:study_linear",
    "smooth": "studies:study_smooth",
}
# Functions in verbs/ whose parameters are the options (`options_of`); "study" stands for STUDIES.
VERBS = (
    *("demo", "train", "profile", "crop", "heal", "gradient", "ode", "refine"),
    *("compare", "interpolate", "merge", "report", "verify", "study"),
)
DOING = {  # what a verb's progress is called
    **dict.fromkeys(VERBS, "measuring"),
    **dict.fromkeys(STUDIES, "training"),
    "compare": "comparing",
    "merge": "merging",
}
PAGES = {  # a study's figures, FILE:NAME in report/, and their heading
    "consistency": (
        "studies:consistency_figures",
        "Does training stop depending on width and depth?",
    ),
    "convergence": (
        "convergence:convergence_figures",
        "Where training converges at a rate known before it starts",
    ),
    "linear": (
        "studies:rates_figures",
        "Linear residuals: distance to the Neural ODE against depth",
    ),
    "smooth": (
        "studies:rates_figures",
        "Two-layer residuals: distance to the Neural ODE against depth",
    ),
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


def function_of(verb: str) -> Callable[..., Any]:
    """The function of a verb, or of a study."""
    function: Callable[..., Any] = resolve_name(f"deeplimit.{STUDIES.get(verb, f'verbs:{verb}')}")
    return function


def show(found: Any, *, json: bool) -> None:
    """Prints an answer: a table, and where files are.

    Raises:
        InputError: what was looked at is not as it should be.
    """
    result = found.result
    if result is not None:  # the first of several processes has it
        shown = f"deeplimit.report.{SHOWN[type(result).__name__]}"
        table = [] if json else [resolve_name(shown)(result, *found.beside)]
        emit(result, *table, *found.written, json=json)
    if found.fault:
        raise InputError(found.fault)


def emit(result: Any, *shown: Any, json: bool) -> None:
    """The result on stdout: as JSON, or as what `shown` renders (rich's renderables or text).

    JSON is that of the run folder's files: tuples are lists, NaN is null.
    """
    from deeplimit.records import to_json
    from deeplimit.terminal import Terminal

    try:
        if json:
            print(visible_json(to_json(result)))
        else:
            console = Terminal(soft_wrap=True, highlight=False, markup=False)
            for part in shown:
                console.print(part)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; the work itself is done
        stop_writing()


def _choose(verbs: Collection[str], prog: str, description: str, args: list[str]) -> Command:
    if args and args[0] in verbs:
        return _parsed(args[0], f"{prog} {args[0]}", args[1:])
    if args and not args[0].startswith("-"):
        raise InputError(
            f"{prog} has no verb {args[0]!r}{did_you_mean(args[0], verbs)}; expected one of "
            f"{', '.join(verbs)}: {prog} --help says what each does"
        )
    from tyro.extras import SubcommandApp

    listing = SubcommandApp()  # for --help, and to say what is wrong with an option
    for verb in verbs:
        listing.command(name=verb, help=summary_of(verb))(lambda: None)
    listing.cli(prog=prog, description=description, args=args)
    return lambda: None


def summary_of(verb: str) -> str:
    """The line that says what a verb is for."""
    if verb == "study":
        return f"Experiments over several runs: {', '.join(STUDIES)}."
    return (function_of(verb).__doc__ or "").split("\n")[0]


def _parsed(verb: str, prog: str, args: list[str]) -> Command:
    if verb == "train":
        from deeplimit.cli.options import parse_train

        made = parse_train(args)
        return lambda: show(made.answer(), json=made.json)
    import tyro

    from deeplimit.cli.options import STYLE, options_of

    function = function_of(verb)
    given = tyro.cli(options_of(function), prog=prog, args=args, config=STYLE)
    return partial(_answer, verb, function, given)


def _answer(verb: str, function: Callable[..., Any], given: Any) -> None:
    """Calls a verb's function, and prints what it returns."""
    from deeplimit.cli.options import call

    silent = given.json or "tell" not in signature(function).parameters  # or has its own bars
    with progress(quiet=silent, doing=DOING[verb]) as tell:
        found = call(function, given, {"tell": tell, "quiet": given.json})
    if verb in PAGES:
        from deeplimit.report.page import write_figures
        from deeplimit.verbs.answer import Answer

        figures, title = PAGES[verb]
        shown = resolve_name(f"deeplimit.report.{figures}")(found)
        written = write_figures(Path(found.folder) / "study.html", title, shown)
        found = Answer(found, (written,))
    show(found, json=given.json)


def _print_version() -> None:
    from deeplimit import __version__

    print(f"deeplimit {__version__}")
