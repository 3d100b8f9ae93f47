"""Measures of models and of their explanations: accuracy, how well explanations point at the right place, speed."""

from bcosification.evaluation.accuracy import evaluate
from bcosification.evaluation.benchmarking import Benchmark, benchmark
from bcosification.evaluation.localization import Localization, energy_pointing_game, grid_pointing_game
from bcosification.evaluation.zero_shot import evaluate_zero_shot

__all__ = [
    "Benchmark",
    "Localization",
    "benchmark",
    "energy_pointing_game",
    "evaluate",
    "evaluate_zero_shot",
    "grid_pointing_game",
]
