"""Which of timm's models convert: ``python -m benchmarks.families [GLOB ...]`` writes results/timm_models.json.

Every model of the globs (default: those that there are families for) is built on the meta device and converted with the
default options, which takes no memory for weights and about a second each. Whether conversions are exact and
explanations add up is tested on small networks of the same classes (tests/bcosification/convert/families).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version

from bcosification.convert.survey import TIMM_GLOBS, SurveyRow, summary, survey
from bcosification.evaluation.measuring import machine
from benchmarks.protocol import commit, results_folder


def write(rows: Sequence[SurveyRow]) -> None:
    """Rows and where they are from, one line each, into timm_models.json of the results."""
    run = {**machine(), "timm": version("timm"), "commit": commit()}
    lines = ",\n  ".join(
        json.dumps({key: value for key, value in row.to_dict().items() if value != ""}) for row in rows
    )
    text = f'{{"run": {json.dumps(run)},\n "rows": [\n  {lines}\n ]}}\n'
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "timm_models.json").write_text(text, encoding="utf-8")


def main(patterns: Sequence[str]) -> int:
    rows = survey(patterns or TIMM_GLOBS)
    write(rows)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
