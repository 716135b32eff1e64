"""Figures of a run's results; plotly figures are returned, so that notebooks show them."""

from deeplimit.report.figures.classes import class_figure
from deeplimit.report.figures.gradient_cost import gradient_cost_figure
from deeplimit.report.figures.layers import (
    accuracy_figure,
    distance_figure,
    influence_figure,
    loss_figure,
    update_figure,
)
from deeplimit.report.figures.rates import rates_figure
from deeplimit.report.figures.training import training_figure
from deeplimit.report.figures.trajectory import trajectory_figure

__all__ = [
    "accuracy_figure",
    "class_figure",
    "distance_figure",
    "gradient_cost_figure",
    "influence_figure",
    "loss_figure",
    "rates_figure",
    "training_figure",
    "trajectory_figure",
    "update_figure",
]
