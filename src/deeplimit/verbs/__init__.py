"""What the command's verbs do, as functions: profile, cut, page and all; torch comes when needed.

    from deeplimit.verbs import crop, train

    done = train(Recipe(depth=(20,)), runs="runs")       # trains, profiles, cuts, writes the page
    crop(done.result.run, to=5)

Signature and docstring of each give the command's options, their defaults and their help.
"""

from deeplimit.verbs.answer import Answer, Elsewhere
from deeplimit.verbs.measures import compare, interpolate, merge
from deeplimit.verbs.networks import gradient, ode
from deeplimit.verbs.runs import crop, demo, heal, profile, refine, report, resume, train, verify

__all__ = [
    "Answer",
    "Elsewhere",
    "compare",
    "crop",
    "demo",
    "gradient",
    "heal",
    "interpolate",
    "merge",
    "ode",
    "profile",
    "refine",
    "report",
    "resume",
    "train",
    "verify",
]
