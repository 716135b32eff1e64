"""`deeplimit verify`: whether a run folder is what it was when it was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit
from deeplimit.errors import InputError

if TYPE_CHECKING:
    from deeplimit.training.verifying import Verification


@dataclass(frozen=True)
class Verify:
    """Check every file of a run against run.json, which holds the size and sha256 of each.

    Exit code 0 if all are as they were written, 2 if one is not, or nobody knows because run.json
    was lost. Then what to do is said. The other verbs check what they read, and refuse what does
    not match. For example:
      deeplimit verify runs/digits
      deeplimit verify runs/digits --accept     after you changed recipe.toml yourself
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run folder that train wrote."""
    accept: bool = False
    """Vouch for the files as they are now: that you changed, or whose run.json was lost."""
    json: Json = False

    def __call__(self) -> None:
        """Prints a line per file."""
        from deeplimit.training.verifying import verify_run

        found = verify_run(self.run, accepting=self.accept)
        emit(found, *(f"{file.state:8} {file.name}" for file in found.files), json=self.json)
        if found.wrong:
            raise InputError(f"{self.run}: {_told(found)}")


def _told(found: "Verification") -> str:
    what = "; ".join(f"{file.name} is {file.state}: {file.remedy}" for file in found.wrong)
    return f"{len(found.wrong)} of {len(found.files)} files not as they were written: {what}"
