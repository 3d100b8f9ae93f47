"""Explanations of B-cos models, their pictures, and attribution methods for other models to compare with."""

from bcosification.explanation.attribution import (
    bcos_contributions,
    grad_cam,
    input_x_gradient,
    integrated_gradients,
)
from bcosification.explanation.explaining import Explanation, TextExplanation, explain
from bcosification.explanation.pictures import (
    color_picture,
    contribution_picture,
    explanation_figure,
    picture_grid,
    save_figure,
    save_picture,
)
from bcosification.explanation.tokens import TokenExplanation
from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = [
    "Explanation",
    "TextExplanation",
    "TokenExplanation",
    "bcos_contributions",
    "color_picture",
    "contribution_picture",
    "evaluation_mode",
    "explain",
    "explanation_figure",
    "grad_cam",
    "input_x_gradient",
    "integrated_gradients",
    "picture_grid",
    "save_figure",
    "save_picture",
]
