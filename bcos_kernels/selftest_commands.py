"""The commands `python -m bcos_kernels selftest` and `tune`: what is right is timed on a GPU, and unlocked there.

The selftest runs every op with every backend over options and shapes that kernels treat apart, and holds outputs and
gradients to `reference` in float64 (selftest.py). On a GPU the backends that passed are timed in turn on shapes of real
networks, and what was measured is written to the user's tuning table (tuning.py): from then on `auto` uses the fastest
right backend for shapes of those classes. `tune` does the same for a network's shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import cutlass, cutlass_build, tuning
from .selftest import _DTYPES, Result, _first_line, check, device_name, measure, precisions, usable
from .selftest_cases import Case, cases, cases_of_file, network_cases, timed_cases


class Session:
    """One run of either command: what was found, and how it is told."""

    def __init__(self, device: torch.device, backends: Sequence[str], say: Callable[[str], None]):
        self.device, self.backends, self.say = device, list(backends), say
        self.results: list[Result] = []
        self.times: list[dict] = []
        self.rows: list[dict] = []
        self.measured: dict[tuple[str, str, str], Case] = {}
        self.problems: list[str] = []

    def _wrong(self, op: str, precision: str) -> set[str]:
        """Backends that gave wrong numbers anywhere, for an op in a precision."""
        about = (op, precision)
        return {r.backend for r in self.results if r.status == "wrong" and (r.case.op, r.precision) == about}

    def check(self, todo: Sequence[Case], precisions: Sequence[str]) -> None:
        for op in dict.fromkeys(case.op for case in todo):
            for precision in precisions:
                if precision == "tf32" and op in tuning.WITHOUT_PRODUCTS:
                    continue  # no products
                start = time.perf_counter()
                found = []
                for case in todo:
                    if case.op == op:
                        found += check(case, precision, self.backends, self.device)
                self.results += found
                bad = [r for r in found if r.bad]
                took = time.perf_counter() - start
                self.say(f"{op} {precision}: {len(found)} checks, {len(bad) or 'none'} wrong, {took:.1f} s")
                for result in bad:
                    self.say(f"  {result.status}: {result.backend}, {result.case}: {result.detail}")

    def time(self, todo: Sequence[Case], dtypes: Sequence[str]) -> None:
        """Check at the very shape, then time what is right, and make rows of it. On a GPU."""
        for case in todo:
            for dtype in dtypes:
                precision = tuning.precision(case.op, _DTYPES[dtype])
                try:
                    self._time(case, precision)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    self.say(f"{case.op} {precision}, {case}: too little memory to check it, left as it was")

    def _time(self, case: Case, precision: str) -> None:
        found = check(case, precision, self.backends, self.device, oracle=self.device)
        self.results += found
        for result in found:
            if result.bad:
                self.say(f"  {result.status}: {result.backend}, {case}: {result.detail}")
        wrong = self._wrong(case.op, precision)
        right = [r.backend for r in found if r.status == "right" and r.backend not in wrong and r.served]
        if "reference" not in right:
            return
        for what, median_ms in measure(case, precision, right, self.device):
            self.rows.append(tuning.row(what, median_ms, str(case), wrong))
            self.measured[case.op, str(case), precision] = case
            best = min(median_ms, key=median_ms.__getitem__)
            ms = ", ".join(f"{name} {value:.3f}" for name, value in median_ms.items())
            self.times.append(
                {"op": case.op, "case": str(case), "dtype": precision, "direction": what[1], "fastest": best,
                 "median_ms": median_ms}
            )  # fmt: skip
            self.say(f"{case.op} {what[1]} {precision}, {case}: {ms} ms: {best}")

    def save(self) -> Path | None:
        """Write the rows to the user's table, without what was found wrong since they were made; returns its path."""
        if not self.rows:
            return None
        for row in self.rows:
            wrong = self._wrong(row["op"], row["dtype"])
            if "auto" in wrong:  # of two backends that are right alone; which of them, nobody knows
                wrong = set(tuning.KERNELS)
            row["backends"] = [name for name in row["backends"] if name not in wrong] or ["reference"]
            found = wrong & row["kernels"].keys()
            if found:
                row["wrong"] = sorted(found)
        try:
            return tuning.save(self.rows, *tuning.identity(self.device))
        except OSError as error:
            self.problems.append(f"the tuning table could not be written: {error}")
            return None

    def unlock(self) -> Path | None:
        """Write the rows, then check what `auto` now does, whose forward and backward may run on two backends; what is
        wrong is taken out again."""
        path = self.save()
        if path is None:
            return None
        before = len(self.results)
        for (_, _, precision), case in self.measured.items():
            with contextlib.suppress(torch.OutOfMemoryError):
                self.results += check(case, precision, ["auto"], self.device, oracle=self.device)
        return self.save() if any(result.bad for result in self.results[before:]) else path

    def report(self, path: Path | None) -> dict:
        return {
            "device": device_name(self.device), "versions": tuning.versions(), "backends": self.backends,
            "results": [result.row() for result in self.results], "times": self.times,
            "table": None if path is None else str(path),
            "problems": self.problems, "ok": self.ok,
        }  # fmt: skip

    @property
    def ok(self) -> bool:
        return not self.problems and not any(result.bad for result in self.results)

    def table(self) -> str:
        """Op and dtype by backend: how near the worst result came to what is allowed, or what is wrong."""
        found: dict[tuple[str, str], dict[str, list[Result]]] = {}
        for result in self.results:
            found.setdefault((result.case.op, result.precision), {}).setdefault(result.backend, []).append(result)
        names = list(dict.fromkeys(result.backend for result in self.results))
        lines = [["op", "dtype", *names]]
        for (op, precision), by_backend in found.items():
            lines.append([op, precision, *(_cell(by_backend.get(name, [])) for name in names)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _cell(results: list[Result]) -> str:
    bad = [result for result in results if result.bad]
    if bad:
        return f"{bad[0].status.upper()} in {len(bad)} of {len(results)}"
    right = [result.fraction for result in results if result.status == "right"]
    if not right:
        return results[0].status if results else "–"
    others = len(results) - len(right)
    return f"{len(right)} right, {max(right):.2f} of allowed" + (f", {others} not run" if others else "")


def _device(parser: argparse.ArgumentParser, asked: str | None) -> torch.device:
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: no CUDA device here (torch.cuda.is_available() is False)")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _finish(session: Session, options: argparse.Namespace, write: bool) -> int:
    path = session.unlock() if write else None
    print(session.table())
    if path is not None:
        print(f"\n{len(session.rows)} rows written to {path}: auto uses them from now on")
    for problem in session.problems:
        print(problem)
    print("\nall right" if session.ok else "\nWRONG: see above; what is wrong is not used by auto")
    if options.json:
        options.json.write_text(json.dumps(session.report(path), indent=1) + "\n", encoding="utf-8")
    return 0 if session.ok else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, cuda:1, cpu, …; default: the first GPU, else the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found there, too")
    parser.add_argument("--quick", action="store_true", help="fewer cases and dtypes")
    parser.add_argument(
        "--cutlass", action="store_true",
        help="build CUTLASS's kernels for this GPU first, up to a minute each, into the cache; without this they take "
        "part where they are built",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="do not write to the tuning table")


def _build_cutlass(parser: argparse.ArgumentParser, device: torch.device) -> None:
    """Before anything has loaded their library: one that is loaded cannot be replaced by one with more kernels."""
    if device.type != "cuda":
        parser.error(f"--cutlass: CUTLASS's kernels are for GPUs of compute capability 8.0 and later, got {device}")
    try:
        cutlass_build.build(cutlass_build.kinds_for(torch.cuda.get_device_capability(device)), verbose=True)
    except RuntimeError as error:
        parser.error(f"--cutlass: {_first_line(error)}")
    cutlass.unusable_reason.cache_clear()


def _session(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> Session:
    if options.cutlass:
        _build_cutlass(parser, device)
    return Session(device, usable(device), _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def selftest(argv: Sequence[str]) -> int:
    """The command; returns its exit status: 1 if a backend is wrong or the table cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m bcos_kernels selftest",
        description="Check every backend that runs here against the definition in float64. On a GPU, time those that "
        "are right, and let auto use the fastest: its tuning table is written to "
        f"{tuning.folder()} (BCOS_TUNING_CACHE names another folder). Exit status 1 if anything is wrong.",
    )
    _arguments(parser)
    options = parser.parse_args(argv)
    device = _device(parser, options.device)
    session = _session(parser, options, device)
    _say(f"{device_name(device)}: {', '.join(session.backends)}")
    interpreted = device.type == "cpu" and "triton" in session.backends  # minutes for all cases
    session.check(cases(options.quick or interpreted), precisions(device, options.quick or interpreted))
    if device.type == "cuda":
        session.time(timed_cases(options.quick), ["bfloat16", "float32"])
    return _finish(session, options, device.type == "cuda" and not options.dry_run)


def tune(argv: Sequence[str]) -> int:
    """The command; returns its exit status, as `selftest`."""
    parser = argparse.ArgumentParser(
        prog="python -m bcos_kernels tune",
        description="Check and time the backends on the shapes of networks, on a GPU, and add rows for them to the "
        "tuning table.",
        epilog='A file of shapes is a JSON list: [{"op": "conv2d", "x": [64, 64, 56, 56], "weight": [64, 64, 3, 3], '
        '"padding": 1}, {"op": "linear", "x": [12608, 384], "weight": [1536, 384], "b": 1.5}].',
    )
    parser.add_argument("what", nargs="+", help="networks of torchvision (resnet50, vit_b_16, …), or files of shapes")
    parser.add_argument("--batch", type=int, default=64, help="images at once, default 64")
    parser.add_argument("--size", type=int, default=224, help="edge of the images in pixels, default 224")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("bfloat16", "float16", "float32"),
        default=["bfloat16", "float32"],
        help="default: bfloat16 float32 (in tf32 where torch multiplies so)",
    )
    _arguments(parser)
    options = parser.parse_args(argv)
    todo: list[Case] = []
    for what in options.what:
        try:
            todo += (
                cases_of_file(Path(what)) if Path(what).is_file() else network_cases(what, options.batch, options.size)
            )
        except (ValueError, ImportError) as error:
            parser.error(f"{what}: {_first_line(error)}")
    device = _device(parser, options.device)
    if device.type != "cuda":
        parser.error(f"there is nothing to tune on {device}: kernels are chosen by tables on GPUs only")
    session = _session(parser, options, device)
    ops = {case.op for case in todo}
    checked = [*options.dtype, *(["tf32"] if "float32" in options.dtype else [])]
    session.check([case for case in cases(options.quick) if case.op in ops], checked)
    session.time(todo, options.dtype)
    return _finish(session, options, not options.dry_run)
