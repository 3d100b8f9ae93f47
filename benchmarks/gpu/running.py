"""What a stage runs with: its time, its rows, and the programs that it calls."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bcos_kernels import tuning
from bcosification.evaluation.measuring import machine

from ..protocol import Results, load_rows

ROOT = Path(__file__).resolve().parents[2]


class OutOfTime(Exception):
    """A stage's time limit has come."""


def sources() -> str:
    """Twelve digits that change with the code that is measured: a checkout need not come with git."""
    digest = hashlib.sha256()
    for folder in ("bcos_kernels", "csrc", "python_api", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


class Rows(Results):
    """Rows of a stage; the machine of a run is a GPU's, with the code's digest beside the commit."""

    def __init__(self, stage: str, folder: Path, device: torch.device):
        self.suite, self.folder = f"gpu_{stage}", folder
        self.path = folder / f"{self.suite}.json"
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S")
        gpu = {}
        if device.type == "cuda":
            _, architecture = tuning.identity(device)
            gpu = {"architecture": architecture, "cuda": torch.version.cuda, "tuned": len(tuning.table(device))}
        self.machine = {
            **machine(device), **gpu, "triton": tuning.versions()["triton"], "commit": _commit(), "sources": sources()
        }  # fmt: skip

    def of_stage(self, stage: str) -> dict[tuple[str, str], dict]:
        """(case, contender) → row of a stage's rows that hold here: of these sources, on this device."""
        same = ("sources", "device", "torch", "triton")
        return {
            (row["case"], row["contender"]): row
            for row in load_rows(f"gpu_{stage}", self.folder)
            if all(row["run"].get(k) == self.machine[k] for k in same)
        }

    def finished(self) -> set[tuple[str, str]]:
        """(case, contender) of the rows that need not be measured again."""
        rows = self.of_stage(self.suite.removeprefix("gpu_"))
        return {of for of, row in rows.items() if row.get("status") not in ("wrong", "failed")}


def first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:200]


def output_of(*command: str, timeout: float = 60, **environment: str) -> tuple[int, str]:
    """(exit status, output); 127 where there is no such program, 124 where it took too long: it is ended then, with all
    that it has started."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 127, str(error)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 124, f"took more than {timeout:.0f} s"
    return process.returncode, output


@dataclasses.dataclass
class Run:
    """What a stage works with.

    Attributes:
        device: what is measured. rehearsal: on the CPU, with as little work as shows that the stage runs.
        rows: where results go. out: the folder for any other file.
        deadline: of `time.monotonic`.
    """

    device: torch.device
    rehearsal: bool
    rows: Rows
    out: Path
    deadline: float
    again: bool = False
    wrong: int = 0

    def __post_init__(self):
        self._finished = set() if self.again else self.rows.finished()

    def forget(self) -> None:
        """Do everything again."""
        self._finished = set()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def due(self, case: str, contender: str = "", seconds: float = 0) -> bool:
        """Whether a case is still to be measured; raises OutOfTime where less time is left than it takes."""
        if any(case == done and contender in ("", by) for done, by in self._finished):
            return False
        if self.left() <= seconds:
            raise OutOfTime(case)
        return True

    def add(self, case: str, contender: str, **values: object) -> None:
        """A row, printed too; its status "wrong" or "failed" makes the stage's."""
        self.wrong += values.get("status") in ("wrong", "failed")
        self.rows.add(case, contender, **values)
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v != "")
        print(f"{case}: {contender}: {shown}", flush=True)

    def attempt(self, case: str, contender: str, work: Callable[[], dict]) -> None:
        """The row of one piece of work, if it is due; what it raises is a row too, and ends nothing else."""
        if not self.due(case, contender):
            return
        try:
            values = work()
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            values = {"status": "not run", "reason": f"{type(error).__name__}: {first_line(error)}"}
        except OutOfTime:
            raise
        except Exception as error:  # a kernel or a compiler may fail in any way: that is what is asked here
            values = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        self.add(case, contender, **values)

    def free(self) -> None:
        """Give memory that nothing holds back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
