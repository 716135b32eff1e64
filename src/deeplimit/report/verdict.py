"""A verdict in the terminal: words first, then a colour."""

from rich.text import Text

from deeplimit.control.verdict import Verdict, Word

COLOURS = {"kept": "green", "unresolved": "yellow", "lost": "red", "nothing learnt": "red"}


def verdict_line(verdict: Verdict | None) -> list[Text]:
    """The verdict, its word in a colour too; nothing where there is none."""
    if verdict is None:
        return []
    _, rest = str(verdict).split(":", 1)
    return [Text.assemble(worded(verdict.word), f":{rest}.")]


def worded(word: Word) -> tuple[str, str]:
    """The word as it begins a sentence, and its style."""
    return word.capitalize(), f"bold {COLOURS[word]}"
