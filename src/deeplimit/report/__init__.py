"""Renderers of results: figures for notebooks, tables for the terminal, the page of a run.

A file for each subject holds its words, its table and its figures.
"""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.report.console import (
        crop_summary,
        healing_summary,
        profile_table,
        refinement_summary,
    )
    from deeplimit.report.gradient_cost import (
        gradient_answer,
        gradient_cost_figure,
        gradient_summary,
    )
    from deeplimit.report.page import render_page, write_page
    from deeplimit.report.run import training_figure, trajectory_figure
    from deeplimit.report.studies import rates_figure
    from deeplimit.report.turnpike import (
        class_figure,
        controls_figure,
        distance_figure,
        influence_figure,
        loss_figure,
        quality_figure,
        update_figure,
    )

__all__ = [
    "class_figure",
    "controls_figure",
    "crop_summary",
    "distance_figure",
    "gradient_answer",
    "gradient_cost_figure",
    "gradient_summary",
    "healing_summary",
    "influence_figure",
    "loss_figure",
    "profile_table",
    "quality_figure",
    "rates_figure",
    "refinement_summary",
    "render_page",
    "training_figure",
    "trajectory_figure",
    "update_figure",
    "write_page",
]

__getattr__, __dir__ = lazy(__name__)
