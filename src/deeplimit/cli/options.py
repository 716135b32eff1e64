"""How options look on the command line, the same for every verb."""

from typing import Annotated

from tyro.conf import DisallowNone, FlagCreatePairsOff, arg

# No --no-json beside --json, and no way to spell out None: leave the option out.
STYLE = (FlagCreatePairsOff, DisallowNone)

Json = Annotated[bool, arg(help="Print the result as JSON on stdout, and nothing else there.")]
