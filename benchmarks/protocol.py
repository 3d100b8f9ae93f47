"""The one measurement protocol of the suites: what runs, how often, and the rows that come of it.

Timing and counting are `bcosification.evaluation.measuring`'s: same process, same inputs, contenders interleaved,
warm-up first, medians. pytest-benchmark runs its cases one after the other, which on a shared machine compares
different minutes: so the suites here are pytest files that loop over contenders themselves.

Environment variables choose what runs:

    BCOS_BENCH_CONTENDERS   names separated by commas, or "eager" (what needs no compilation), or "all";
                            default: what the suite says. Every suite takes those that it has; its baseline always runs.
    BCOS_BENCH_ROUNDS       timed calls of each contender (default: the suite's)
    BCOS_BENCH_BATCH        images at once (default: the case's)
    BCOS_BENCH_SIZE         edge of the images of whole networks, in pixels (default: 224)
    BCOS_BENCH_DTYPE        float32 (default) or bfloat16, of the layer suites
    BCOS_BENCH_RESULTS      folder of the rows (default: benchmarks/results)

A case at another batch or size than the suite's own is a case of its own, whose label says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from bcosification.evaluation.measuring import machine

RESULTS = Path(__file__).parent / "results"
NAMES = (
    "plain", "plain-compiled", "peer", "peer-compiled", "peer-batch", "fused-peer", "fused-peer-nchw", "ours",
    "ours-compiled", "ours-low",
)  # fmt: skip
"""Every contender of any suite. -compiled: torch.compile; -nchw: with contiguous images; -low: fuse(memory="low");
peer-batch: the peer's explanations in batches, which its own `explain` does not take."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- what runs --------------------------------------------------------------------------------------------------------


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {text!r}")
    return int(text)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment variables above say, the suite's defaults where they say nothing."""

    batch: int
    rounds: int
    size: int = 224
    label: str = ""
    """What a case's label has to say, as it is not the default: ", batch 2", ", 64 pixels" or both."""

    @classmethod
    def read(cls, batch: int, rounds: int) -> Settings:
        given = cls(
            _number("BCOS_BENCH_BATCH", batch), _number("BCOS_BENCH_ROUNDS", rounds), _number("BCOS_BENCH_SIZE", 224)
        )
        label = f", batch {given.batch}" if given.batch != batch else ""
        label += f", {given.size} pixels" if given.size != 224 else ""
        return dataclasses.replace(given, label=label)


def dtype() -> tuple[str, torch.dtype]:
    """The dtype of the layer suites, and its name."""
    name = os.environ.get("BCOS_BENCH_DTYPE") or "float32"
    if name not in DTYPES:
        raise ValueError(f"BCOS_BENCH_DTYPE: expected one of {', '.join(DTYPES)}, got {name!r}")
    return name, DTYPES[name]


def chosen(has: Sequence[str], default: Sequence[str] | None = None) -> list[str]:
    """The contenders of a suite that are to run, in the suite's order.

    Args:
        has: all that the suite has; the first is the baseline, which always runs.
        default: those that run where nothing is asked for; None (default) for all.
    """
    asked = os.environ.get("BCOS_BENCH_CONTENDERS") or ""
    if asked == "all" or (not asked and default is None):
        names = list(has)
    elif not asked:
        names = list(default)
    elif asked == "eager":
        names = [name for name in has if not name.endswith("-compiled")]
    else:
        names = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(
            f"BCOS_BENCH_CONTENDERS: expected eager, all, or some of {', '.join(NAMES)}, got {', '.join(unknown)}"
        )
    names = [name for name in has if name in names]
    if not names:
        import pytest  # the GPU's stages take rows from here, on machines without it

        pytest.skip(f"none of BCOS_BENCH_CONTENDERS={asked} is a contender here: {', '.join(has)}")
    return names if names[0] == has[0] else [has[0], *names]


# --- rows -------------------------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit of the sources, with a plus where they differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    sources = [":/bcos_kernels", ":/csrc", ":/python_api"]
    changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", *sources], capture_output=True, text=True)
    return commit + ("+" if changed.stdout.strip() else "")


def results_folder() -> Path:
    return Path(os.environ.get("BCOS_BENCH_RESULTS") or RESULTS)


def _read(path: Path) -> tuple[dict[str, dict], list[dict]]:
    if not path.is_file():
        return {}, []
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["runs"], content["rows"]


def load_rows(suite: str, folder: Path | None = None) -> list[dict]:
    """The rows of a suite, each with its run's entries (date, commit, device, …) as `row["run"]`; [] if there are none.

    Rows of one run were measured in one process, interleaved; ratios are to the baseline of their own run.
    """
    runs, rows = _read((folder or results_folder()) / f"{suite}.json")
    return [{**row, "run": {"started": row["run"], **runs[row["run"]]}} for row in rows]


class Results:
    """Rows of one suite in <suite>.json, written after every row, so a run that is cut off keeps what it measured.

    A row replaces the one of its case and contender, and no other: a partial run leaves the rest as it is. Machine,
    versions and commit are kept per run, and every row names its run.
    """

    def __init__(self, suite: str, folder: Path | None = None):
        self.path = (folder or results_folder()) / f"{suite}.json"
        self.started = datetime.datetime.now().isoformat(timespec="seconds")
        self.machine = {**machine(), "commit": commit()}

    def add(self, case: str, contender: str, **values: object) -> None:
        """One row; values are numbers and strings, floats are kept to five digits."""
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        row = {"case": case, "contender": contender, **rounded, "run": self.started}
        runs, rows = _read(self.path)
        runs[self.started] = self.machine
        found = [i for i, other in enumerate(rows) if (other["case"], other["contender"]) == (case, contender)]
        if found:
            rows[found[0]] = row
        else:  # after the last row of its case
            same = [i for i, other in enumerate(rows) if other["case"] == case]
            rows.insert(same[-1] + 1 if same else len(rows), row)
        runs = {name: values for name, values in runs.items() if any(row["run"] == name for row in rows)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = [
            ",\n  ".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in runs.items()),
            ",\n  ".join(json.dumps(row) for row in rows),
        ]
        text = f'{{"runs": {{\n  {entries[0]}\n }},\n "rows": [\n  {entries[1]}\n ]}}\n'
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.path)

    def cannot(self, case: str, contender: str, status: str, reason: object) -> None:
        """A row that says that a contender does not run, and the first line of why."""
        reason = str(reason).strip().partition("\n")[0][:200]
        print(f"{case}: {contender}: {status}: {reason}", flush=True)
        self.add(case, contender, status=status, reason=reason)


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
