"""Everything that waits for a GPU, in one command: stages of less than ten minutes, the most valuable first.

    python -m benchmarks.gpu                             # all of them, from a bare checkout: nothing is installed
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --stage builds,correctness --out DIR

    python -m benchmarks.gpu --budget 560 --out DIR      # all of them within that time, each with a share of it

A stage is a process of its own with a time limit. Its rows go to gpu_<stage>.json as they come, so a stage that is cut
off keeps what it measured; the same command goes on where it stopped, as long as sources, device and torch are the
same (--again measures anew). How each stage ended is in gpu_stages.json. The tuning table of the stage `tuning` is
written below DIR too: DIR/tuning/<device>.json.

Exit status: 0 all done; 1 something is wrong or failed; 2 usage; 3 no GPU here; 4 a time limit came first (run again).

--rehearse runs the stages on the CPU with next to no work in them: what can be tried of them without a GPU.

--wheels DIR (or BCOS_WHEELS) names a folder of wheels, of packages that this machine lacks (wheels.py): bcos with
einops, which is measured against, and nvidia-cutlass, whose headers the CUTLASS kernels need.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..protocol import results_folder
from .running import ROOT, OutOfTime, Rows, Run
from .wheels import unpack

DONE, WRONG, NO_GPU, CUT_OFF = 0, 1, 3, 4
ENDINGS = {DONE: "done", WRONG: "wrong", NO_GPU: "no GPU here", CUT_OFF: "cut off"}
GRACE = 20
"""Seconds that a stage has after its limit to end by itself, before it is ended."""
LEAST = 10
"""Seconds that a stage needs to begin: it is not started with less."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One entry of --list; ``run`` fills a `Run`'s rows. ``share``, of a --budget: next to those of the others."""

    name: str
    about: str
    limit_s: int
    share: float
    run: Callable[[Run], None]


def all_stages() -> dict[str, Stage]:
    from . import choices, correctness, finetune, layers, networks, profile, stages

    listed = (
        Stage("environment", "versions and tools; copy bandwidth and matrix rates: the ceilings", 240, 1,
              stages.environment),
        Stage("builds", "the CUDA library through setup.py, its CUTLASS part where the headers are, Triton's kernels",
              540, 5, stages.builds),
        Stage("correctness", "all backends over options, streams, graphs, compilation, 2^31 elements", 540, 5,
              correctness.correctness),
        Stage("tuning", "what is right is timed and unlocked: the tuning table of this GPU", 540, 5, stages.tune),
        Stage("layers", "layers of ResNet-50 and ViTs against plain, the peer's and the floor, eager and compiled", 540,
              4, layers.layers),
        Stage("networks", "training steps, memory, inference and explanations of CNNs, ViTs and CLIP's RN50", 580, 6,
              networks.networks),
        Stage("profile", "where a training step's time goes, by kernel; counters of single kernels", 540, 2,
              profile.profile),
        Stage("choices", "graphs against eager steps, where the norm comes from, rates of passes, tiles", 540, 3,
              choices.choices),
        Stage("finetune", "a ResNet-50 fine-tuned through the input pipeline: rates, losses, memory, kernels", 580, 2,
              finetune.finetune),
        Stage("sanitizer", "memory checker and race checker; guard bands and bitwise repeats", 540, 2,
              stages.sanitizer),
    )  # fmt: skip
    return {stage.name: stage for stage in listed}


def run_here(stage: Stage, out: Path, limit_s: float, *, again: bool = False, rehearsal: bool = False) -> int:
    """Run a stage in this process; returns its exit status."""
    if not rehearsal and not torch.cuda.is_available():
        print(f"{stage.name}: no GPU here (torch.cuda.is_available() is False)", flush=True)
        return NO_GPU
    device = torch.device("cpu") if rehearsal else torch.device("cuda", 0)
    torch.manual_seed(0)
    run = Run(device, rehearsal, Rows(stage.name, out, device), out, time.monotonic() + limit_s, again)
    try:
        stage.run(run)
    except OutOfTime as error:
        print(f"{stage.name}: the time is over, before {error}", flush=True)
        return WRONG if run.wrong else CUT_OFF
    except Exception:
        traceback.print_exc()
        return WRONG
    return WRONG if run.wrong else DONE


def run_apart(stage: Stage, out: Path, limit_s: float, options: Sequence[str], packages: Path | None = None) -> int:
    """Run a stage in a process of its own, which is ended with its children when its time is over; ``packages`` is a
    folder of what is not installed."""
    paths = [ROOT, ROOT / "python_api", os.environ.get("PYTHONPATH"), packages]
    path = os.pathsep.join(str(part) for part in paths if part)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "BCOS_TUNING_CACHE": str(out / "tuning")}
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--here", "--stage", stage.name, "--out", str(out), "--limit",
        str(limit_s), *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(limit_s + GRACE)
    except subprocess.TimeoutExpired:
        status = CUT_OFF
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status if status in ENDINGS else WRONG


@contextlib.contextmanager
def _packages(wheels: Path | None) -> Iterator[Path | None]:
    """A folder of the packages that come as wheels, while the stages run; None where there are none."""
    if wheels is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        found = unpack(wheels, Path(folder))
        print("from wheels: " + (", ".join(f"{n} {v}" for n, v in found.items()) or "nothing that is not installed"))
        yield Path(folder)


def limit_of(stage: Stage, following: Sequence[Stage], left: float) -> float:
    """Seconds for a stage when ``left`` remain for it and those that follow: its share. What it leaves is theirs."""
    left = max(0.0, left - GRACE)  # which the last of them may take to end
    share = left * stage.share / (stage.share + sum(other.share for other in following))
    return min(stage.limit_s, max(share, LEAST), left)


def worst(statuses: Sequence[int]) -> int:
    """The exit status for several stages: something wrong first, then no GPU, then a time limit."""
    return next((status for status in (WRONG, NO_GPU, CUT_OFF) if status in statuses), DONE)


def main(argv: Sequence[str] | None = None) -> int:
    known = all_stages()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__[__doc__.index("Exit status") :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", metavar="NAME[,NAME]", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="print the stages and their time limits")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the rows; default: benchmarks/results")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each stage, instead of its own")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help="for all stages together: each gets a share, and what one leaves goes to those that follow",
    )  # fmt: skip
    wheels = os.environ.get("BCOS_WHEELS")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", default=Path(wheels) if wheels else None,
        help="folder of wheels of what is not installed here: bcos, einops, nvidia-cutlass; default: $BCOS_WHEELS",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with next to no work")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{stage.name:12s} {stage.limit_s:4d} s  {stage.about}" for stage in known.values()))
        return DONE
    names = options.stage.split(",") if options.stage else list(known)
    for name in names:
        if name not in known:
            parser.error(f"--stage: expected some of {', '.join(known)}, got {name}")
    if options.limit is not None and options.limit <= 0:
        parser.error(f"--limit: expected seconds > 0, got {options.limit:g}")
    if options.budget is not None and options.budget <= LEAST * len(names) + GRACE:
        parser.error(f"--budget: expected more than {LEAST * len(names) + GRACE} seconds for {len(names)} stages, "
                     f"got {options.budget:g}")  # fmt: skip
    out = (options.out or results_folder()).resolve()
    if options.here:
        limit = options.limit or known[names[0]].limit_s
        return run_here(known[names[0]], out, limit, again=options.again, rehearsal=options.rehearse)
    if not options.rehearse and not torch.cuda.is_available():
        print("no GPU here (torch.cuda.is_available() is False)")
        return NO_GPU
    passed_on = [*(["--again"] if options.again else []), *(["--rehearse"] if options.rehearse else [])]
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    statuses = []
    end = time.monotonic() + (options.budget or float("inf"))
    with contextlib.ExitStack() as stack:
        try:
            packages = stack.enter_context(_packages(options.wheels))
        except ValueError as error:
            parser.error(f"--wheels: {error}")
        for position, name in enumerate(names, 1):
            limit = options.limit or known[name].limit_s
            if options.budget is not None:
                following = [known[other] for other in names[position:]]
                limit = min(limit, limit_of(known[name], following, end - time.monotonic()))
            if limit < LEAST and options.limit is None:
                statuses.append(CUT_OFF)
                print(f"== {name}: not begun, {max(limit, 0):.0f} s are left for it", flush=True)
                continue
            print(f"== {name}: {known[name].about} (at most {limit:.0f} s)", flush=True)
            start = time.monotonic()
            statuses.append(run_apart(known[name], out, limit, passed_on, packages))
            seconds = time.monotonic() - start
            Rows("stages", out, device).add(name, "stage", status=ENDINGS[statuses[-1]], seconds=seconds)
            print(f"== {name}: {ENDINGS[statuses[-1]]}, {seconds:.0f} s", flush=True)
    return worst(statuses)
