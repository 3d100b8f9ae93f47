"""JSON that every reader takes."""

import json
import math

import pytest

from bcosification.json_files import json_text


def _strict(text):
    """As readers that know no NaN read it."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_not_finite_is_null():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "NaN")}], "d": None, "e": True}
    assert _strict(json_text(value)) == {"a": None, "b": [1.5, None, {"c": [None, "NaN"]}], "d": None, "e": True}
    assert math.isnan(value["a"]), "what was given is left alone"


def test_finite_values_stay_as_they_are():
    value = {"name": "ñ", "values": [0, -0.0, 1e-300, 2**70]}
    assert _strict(json_text(value, indent=2)) == value
    assert json_text(value, ensure_ascii=False).count("ñ") == 1 and json_text(value).endswith("}\n")
