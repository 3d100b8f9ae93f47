"""Which of open_clip's models convert: ``python -m benchmarks.open_clip_models [GLOB ...]``.

Every model of the globs (default: all of open_clip.list_models()) is built on the meta device and converted with the
default options, which takes no memory for weights and half a second each; those with a text tower of Hugging Face's hub
without it. Without globs, results/open_clip_models.json gets the rows. That conversions are exact is tested on small
networks of all kinds, in tests/bcosification/convert/families/test_open_clip.py and test_open_clip_timm.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version

from bcosification.convert.survey import SurveyRow, summary, survey_open_clip
from bcosification.evaluation.measuring import machine
from benchmarks.protocol import commit, results_folder


def write(rows: Sequence[SurveyRow]) -> None:
    """Rows and where they are from, one line each, into open_clip_models.json of the results."""
    run = {**machine(), "open_clip": version("open_clip_torch"), "timm": version("timm"), "commit": commit()}
    told = ",\n  ".join(
        json.dumps({key: value for key, value in row.to_dict().items() if value != "" and key != "pattern"})
        for row in rows
    )
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    text = f'{{"run": {json.dumps(run)},\n "rows": [\n  {told}\n ]}}\n'
    (folder / "open_clip_models.json").write_text(text, encoding="utf-8")


def main(patterns: Sequence[str]) -> int:
    rows = survey_open_clip(patterns or ("*",))
    print(summary(rows))
    if not patterns:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
