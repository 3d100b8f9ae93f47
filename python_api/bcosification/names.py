"""Names in messages: the first of many, and which may have been meant by one that stands for nothing.

Nothing but the standard library is needed here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["did_you_mean", "meant", "shortened"]


def meant(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The nearest of the known names, nearest first, whatever their case; [] where none is near."""
    by_lower: dict[str, str] = {}
    for entry in known:
        by_lower.setdefault(entry.lower(), entry)
    return [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), list(by_lower), n=most)]


def did_you_mean(names: Iterable[str]) -> str:
    """The end of an error: "; did you mean a, b or c?", or "" without names."""
    names = list(dict.fromkeys(names))
    if not names:
        return ""
    *others, last = names
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def shortened(names: Sequence[str], most: int = 6) -> str:
    """The first names of a list and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
