"""Renderers of results: figures for notebooks, tables for the terminal, the page of a run."""

from deeplimit.report.console import crop_summary, healing_summary, profile_table
from deeplimit.report.figures import (
    accuracy_figure,
    class_figure,
    distance_figure,
    gradient_cost_figure,
    loss_figure,
    rates_figure,
    training_figure,
    trajectory_figure,
    update_figure,
)
from deeplimit.report.gradient_cost import gradient_answer, gradient_summary
from deeplimit.report.page import render_page, write_page
from deeplimit.report.refinement import refinement_summary

__all__ = [
    "accuracy_figure",
    "class_figure",
    "crop_summary",
    "distance_figure",
    "gradient_answer",
    "gradient_cost_figure",
    "gradient_summary",
    "healing_summary",
    "loss_figure",
    "profile_table",
    "rates_figure",
    "refinement_summary",
    "render_page",
    "training_figure",
    "trajectory_figure",
    "update_figure",
    "write_page",
]
