"""Warnings that name the line of the caller's code. Nothing but the standard library is needed here."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

INSIDE = ("bcosification", "torch")


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` at the first line, going outwards, that is neither this package's nor torch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
