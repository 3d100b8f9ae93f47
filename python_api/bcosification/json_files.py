"""JSON that every reader takes: Python's NaN and Infinity are none, so what is not finite becomes null."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["finite", "json_text"]


def finite(value: Any) -> Any:
    """`value` with None in place of floats that are not finite, in dicts, lists and tuples (which become lists)."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, *, indent: int = 1, ensure_ascii: bool = True) -> str:
    """The text of a JSON file, with a line end; NaN and infinities as null."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False) + "\n"
