"""How options look on the command line, the same for every verb."""

from typing import Annotated

from tyro.conf import DisallowNone, FlagCreatePairsOff, arg

from deeplimit.errors import InputError

# No --no-json beside --json, and no way to spell out None: leave the option out.
STYLE = (FlagCreatePairsOff, DisallowNone)

Trust = Annotated[
    bool,
    arg(
        help="Run the code that the recipe.toml of a run folder names as its model; which files "
        "these are is said first. See docs/trust.md."
    ),
]
Json = Annotated[bool, arg(help="Print the result as JSON on stdout, and nothing else there.")]


def sizes(shape: str | None) -> tuple[int, ...] | None:
    """The numbers in "3,224,224".

    Raises:
        InputError: there are others than whole numbers in it.
    """
    if shape is None:
        return None
    try:
        return tuple(int(size) for size in shape.split(","))
    except ValueError:
        raise InputError(f"shape is {shape!r}; expected sizes such as 3,224,224") from None
