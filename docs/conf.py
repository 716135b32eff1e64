"""Settings of the documentation: the Markdown files of this folder, and the docstrings."""

from typing import Any

from deeplimit import __version__

project = "deeplimit"
copyright = "the deeplimit developers, Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
html_theme = "furo"
html_title = f"deeplimit {release}"


def setup(app: Any) -> None:
    """Reads docstrings as they are written: bars are norms, indented paragraphs are code."""
    app.connect("autodoc-process-docstring", _as_written, priority=0)


def _as_written(
    _app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    made: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and made and not made[-1] and not literal:
            literal = True
            made += ["::", ""]
        if line and not indented:
            literal = False
        made.append(line if literal else line.replace("|", r"\|"))
    lines[:] = made
