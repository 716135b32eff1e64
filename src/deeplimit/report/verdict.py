"""A verdict in the terminal: words first, then a colour."""

from rich.text import Text

from deeplimit.control.verdict import Verdict

COLOURS = {"kept": "green", "unresolved": "yellow", "lost": "red", "nothing learnt": "red"}


def verdict_line(verdict: Verdict | None) -> list[Text]:
    """The verdict, its word in a colour too; nothing where there is none."""
    if verdict is None:
        return []
    word, rest = str(verdict).split(":", 1)
    return [Text.assemble((word, f"bold {COLOURS[verdict.word]}"), f":{rest}.")]
