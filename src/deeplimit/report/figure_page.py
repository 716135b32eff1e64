"""A page of figures by itself, which opens offline, and the figures' numbers beside it."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from deeplimit.files import write_text
from deeplimit.records import to_plain

CONFIG = {"displayModeBar": False, "responsive": True}
HEAD = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>{title} · deeplimit</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<body style="font-family: sans-serif; margin: 1rem"><h1 style="font-size: 1.4rem">{title}</h1>'
)
# Panels side by side need room: on a phone the figure scrolls, not the page.
ROOM = '<div style="overflow-x: auto"><div style="min-width: {width}px">{figure}</div></div>'
PANELS = 820  # pixels, for two of them


def write_figures(
    path: Path,
    title: str,
    figures: Sequence[tuple[str, go.Figure, str]],
    result: Any = None,
    *,
    to: Path | None = None,
) -> str:
    """Writes (name, figure, caption) in one page, the result beside it; says where it is.

    Args:
        path: of the page.
        title: its heading.
        figures: what is on it.
        result: their numbers.
        to: where a page that belongs to a commit will be.
    """
    parts = [HEAD.format(title=escape(title))]
    for n, (_, figure, caption) in enumerate(figures):
        drawn = figure.to_html(include_plotlyjs=n == 0, full_html=False, config=CONFIG)
        several = "xaxis2" in figure.layout
        parts.append(ROOM.format(width=PANELS if several else 0, figure=drawn))
        parts.append(f"<p>{escape(caption)}</p>")
    write_text(path, "".join(parts) + "</body>\n")
    if result is not None:
        write_result(path.with_suffix(".json"), result)
    return f"The figure{' is' if len(figures) == 1 else 's are'} at {(to or path).resolve()}"


def write_result(path: Path, result: Any) -> None:
    """Writes a result as JSON, as --json prints it."""
    write_text(path, json.dumps(to_plain(result), allow_nan=False, ensure_ascii=False) + "\n")
