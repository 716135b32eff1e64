"""The command `deeplimit`: one file per verb; what they do is in the other rooms."""

from deeplimit.cli.entry import main

__all__ = ["main"]
