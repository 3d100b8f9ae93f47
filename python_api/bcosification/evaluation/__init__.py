"""Measures of models and of their explanations: accuracy, and how well explanations point at the right place."""

from bcosification.evaluation.accuracy import evaluate
from bcosification.evaluation.localization import Localization, energy_pointing_game, grid_pointing_game

__all__ = ["Localization", "energy_pointing_game", "evaluate", "grid_pointing_game"]
