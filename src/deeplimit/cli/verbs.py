"""The verbs: which there are, and how a command line becomes one of them with its options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tyro
from tyro.extras import SubcommandApp

from deeplimit.cli.compare import Compare
from deeplimit.cli.consistency import Consistency
from deeplimit.cli.convergence import Convergence
from deeplimit.cli.crop import Crop
from deeplimit.cli.demo import Demo
from deeplimit.cli.gradient import Gradient
from deeplimit.cli.heal import Heal
from deeplimit.cli.horizon import Horizon
from deeplimit.cli.interpolate import Interpolate
from deeplimit.cli.linear import Linear
from deeplimit.cli.merge import Merge
from deeplimit.cli.ode import Ode
from deeplimit.cli.options import STYLE
from deeplimit.cli.profile import Profile
from deeplimit.cli.refine import Refine
from deeplimit.cli.report import Report
from deeplimit.cli.smooth import Smooth
from deeplimit.cli.verify import Verify

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
    """One verb, or a group of them.

    Attributes:
        summary: what it is for, in a line.
        parse: reads the words after the verb.
    """

    summary: str
    parse: Callable[[list[str]], Command]


def parse(args: list[str]) -> Command:
    """The verb that a command line asks for, with its options, ready to be called.

    Raises:
        SystemExit: after --help, or after the parser's own message about a wrong verb or option.
        InputError: options that are wrong together.
    """
    if args == ["--version"]:
        return _print_version
    return _choose(VERBS, "deeplimit", DESCRIPTION, args)


def _choose(verbs: dict[str, Verb], prog: str, description: str, args: list[str]) -> Command:
    if args and args[0] in verbs:
        return verbs[args[0]].parse(args[1:])
    listing = SubcommandApp()  # for --help, and to say what is wrong with the verb
    for name, verb in verbs.items():
        listing.command(name=name, help=verb.summary)(lambda: None)
    listing.cli(prog=prog, description=description, args=args)
    return lambda: None


def _options(kind: type[Any], prog: str) -> Callable[[list[str]], Command]:
    return lambda args: tyro.cli(kind, prog=prog, args=args, config=STYLE)


def _train(args: list[str]) -> Command:
    from deeplimit.cli.train import parse_train  # its options are a recipe's: it needs torch

    return parse_train(args)


def _study(args: list[str]) -> Command:
    return _choose(STUDIES, "deeplimit study", "Experiments over several runs.", args)


def _print_version() -> None:
    from deeplimit import __version__

    print(f"deeplimit {__version__}")


STUDIES = {
    "consistency": Verb(
        "Does training stop depending on width and depth as both grow?",
        _options(Consistency, "deeplimit study consistency"),
    ),
    "convergence": Verb(
        "Where does training converge at a rate known before it starts?",
        _options(Convergence, "deeplimit study convergence"),
    ),
    "horizon": Verb(
        "Does the number of layers in use stay bounded as the network gets deeper?",
        _options(Horizon, "deeplimit study horizon"),
    ),
    "linear": Verb(
        "Do linear residuals stay near a Neural ODE while they train?",
        _options(Linear, "deeplimit study linear"),
    ),
    "smooth": Verb(
        "Do two-layer residuals stay near a Neural ODE if they start smooth in depth?",
        _options(Smooth, "deeplimit study smooth"),
    ),
}
VERBS = {
    "demo": Verb(
        "All of it on data that need no download, within a minute.",
        _options(Demo, "deeplimit demo"),
    ),
    "train": Verb("Train too deep, measure the turnpike, cut to the depth that is enough.", _train),
    "profile": Verb(
        "Measure the turnpike of a trained network, layer by layer.",
        _options(Profile, "deeplimit profile"),
    ),
    "crop": Verb("Cut a trained network to fewer layers.", _options(Crop, "deeplimit crop")),
    "heal": Verb(
        "Train a cut network a little more, with the full one as its teacher.",
        _options(Heal, "deeplimit heal"),
    ),
    "gradient": Verb(
        "What memory-free gradients would save on a model, and at what error.",
        _options(Gradient, "deeplimit gradient"),
    ),
    "ode": Verb(
        "How far a network is from its Neural ODE, and how smooth in depth.",
        _options(Ode, "deeplimit ode"),
    ),
    "refine": Verb(
        "Make a trained network deeper, as its Neural ODE says, and train on from there.",
        _options(Refine, "deeplimit refine"),
    ),
    "compare": Verb(
        "How far networks are from one another, whatever their widths and depths.",
        _options(Compare, "deeplimit compare"),
    ),
    "interpolate": Verb(
        "Loss and accuracy along the geodesic between two networks.",
        _options(Interpolate, "deeplimit interpolate"),
    ),
    "merge": Verb("Join trained networks in one.", _options(Merge, "deeplimit merge")),
    "report": Verb("Write the page of a run again.", _options(Report, "deeplimit report")),
    "verify": Verb(
        "Check that the files of a run are what they were when they were written.",
        _options(Verify, "deeplimit verify"),
    ),
    "study": Verb(
        "Experiments over several runs: consistency, convergence, horizon, linear, smooth.", _study
    ),
}
