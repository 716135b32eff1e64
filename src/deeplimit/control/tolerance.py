"""How much accuracy may be lost: a fraction of all samples."""

from deeplimit._anatomy.checks import check_number
from deeplimit.errors import InputError, several

TOO_MUCH = 0.5  # of all samples: nobody means that, half a point was meant


def check_tolerance(accuracy: float) -> float:
    """The fraction of accuracy that may be lost.

    Raises:
        InputError: it is none, or given in percentage points.
    """
    accuracy = check_number("accuracy", accuracy, "a fraction, such as 0.005", lambda _: True)
    if not 0 <= accuracy < TOO_MUCH:
        raise InputError(
            f"{several(100 * accuracy, 'point')} of accuracy may be lost; expected from 0 to less "
            "than "
            f"{100 * TOO_MUCH:g} points: in Python a fraction, 0.005 for half a point"
        )
    return accuracy
