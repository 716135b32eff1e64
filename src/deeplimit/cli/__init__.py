"""The command `deeplimit`: from words to a call; what a verb does is in the other rooms."""

from deeplimit.cli.entry import main

__all__ = ["main"]
