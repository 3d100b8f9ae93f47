"""Checks the backends of this machine against the definition, times them on a GPU, and unlocks there what is right.

`python -m bcos_kernels selftest` runs every op with every backend over options and shapes that kernels treat apart, and
holds outputs and gradients to `reference` in float64. On a GPU the backends that passed are timed in turn on shapes of
real networks, and what was measured is written to the user's tuning table (tuning.py): from then on `auto` uses the
fastest right backend for shapes of those classes. `python -m bcos_kernels tune` does the same for a network's shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import dispatch, functional, reference, tuning
from .selftest_cases import Case, cases, cases_of_file, network_cases, timed_cases

BOUNDS = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 2e-3}
"""What ‖out − ref‖/‖ref‖ has to stay under; tf32: float32 where torch lets products run in it."""
_DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ULP = {"float32": 2.0**-23, "tf32": 2.0**-10, "bfloat16": 2.0**-7, "float16": 2.0**-10}

# --- numbers ----------------------------------------------------------------------------------------------------------


def _definition_conv2d_batch_norm(
    x, weight, bias=None, *, running_var, norm_weight, norm_bias, training, activation=None, residual=None,
    detach=False, **convolution,
) -> Tensor:  # fmt: skip
    y = reference.conv2d(x, weight, bias, detach=detach, **convolution)
    return reference.batch_norm_uncentered(
        y, running_var, norm_weight, norm_bias, training=training, activation=activation, residual=residual,
        detach=detach,
    )  # fmt: skip


def _definition_linear_gelu(x, weight, bias=None, *, detach=False, **options) -> Tensor:
    return reference.gelu(reference.linear(x, weight, bias, detach=detach, **options), detach=detach)


_DEFINITIONS: dict[str, Callable] = {
    "linear": reference.linear,
    "conv2d": reference.conv2d,
    "batch_norm_uncentered": reference.batch_norm_uncentered,
    "conv2d_batch_norm": _definition_conv2d_batch_norm,
    "linear_gelu": _definition_linear_gelu,
}


def _tensor(case: Case, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = {"generator": generator, "device": generator.device}
    if name == "b":
        return torch.tensor(1.7, device=generator.device)
    if name == "running_var":
        return 0.5 + torch.rand(shape, **drawn)
    if len(shape) == 1:  # of a normalisation, or a layer's bias
        return torch.randn(shape, **drawn) * 0.2 + name.endswith("weight")
    if name == "weight":
        fan_in = math.prod(shape[1:])
        if case.values != "whole":
            return torch.randn(shape, **drawn) / fan_in**0.5
        order = torch.rand(shape[0], fan_in, **drawn).argsort(1)  # units of norm 4
        signs = torch.randint(0, 2, (shape[0], fan_in), **drawn) * 2.0 - 1
        return torch.where(order < 16, signs, 0.0).view(shape)
    if case.values == "whole":
        return torch.randint(-4, 5, shape, **drawn).float()
    values = torch.randn(shape, **drawn) * (1e4 if case.values == "large" else 1.0)
    if case.values == "zeros":
        values[0] = 0
    return values


def inputs(case: Case, precision: str, device: torch.device) -> dict[str, Tensor]:
    """The case's tensors; statistics, parameters of a normalisation and the exponent in float32."""
    # drawn on the device: of a network's shapes, hundreds of millions of values
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{case.op} {case}".encode()))
    found = {}
    for name, shape in case.tensors.items():
        t = _tensor(case, name, shape, generator)
        wide = len(shape) < 2 and not (name == "bias" and case.op != "batch_norm_uncentered")
        t = t if wide else t.to(_DTYPES[precision])
        found[name] = t.contiguous(memory_format=torch.channels_last) if case.channels_last and t.dim() == 4 else t
    return found


def _outputs(function: Callable, case: Case, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y, the gradient of every tensor that has one, and running_var where it is updated."""
    leaves = {name: t.detach().clone().requires_grad_(name != "running_var") for name, t in tensors.items()}
    y = function(**leaves, **case.options)
    wanted = [name for name in leaves if name != "running_var"]
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], dy, allow_unused=True)
    found = {"y": y.detach()} | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    if case.options.get("training"):
        found["running_var"] = leaves["running_var"]
    return found


def _oracle(case: Case, tensors: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """(outputs in float64, the terms of the sum ∂L/∂B or None)."""
    double = {name: t.double() for name, t in tensors.items()}
    if "b" in double:
        double["b"] = double["b"].expand(dy.shape)  # an exponent an element: their gradients are the terms
    found = _outputs(_DEFINITIONS[case.op], case, double, dy.double())
    terms = found.get("db")
    if terms is not None:
        found["db"] = terms.sum()
    return found, terms


def _near_zero(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """Where rounding decides whether the ReLU lets a gradient pass: nothing is compared there."""
    with torch.no_grad():
        options = {**case.options, "activation": None}
        before = _DEFINITIONS[case.op](**{name: t.double() for name, t in tensors.items()}, **options)
    return before.abs() < 0.03 * before.std()


def _error(got: Tensor, expected: Tensor, precision: str, terms: Tensor | None) -> float:
    """‖got − expected‖ / ‖expected‖ (a sum's: over the norm of its terms); infinite where what is not finite, or the
    shape, differs."""
    got = got.detach().to(expected.device, torch.float64)
    if got.shape != expected.shape:
        return math.inf
    counts = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), counts):
        return math.inf
    if precision == "float16":  # what is no normal number there has fewer bits than the bound asks for
        counts &= (expected.abs() >= torch.finfo(torch.float16).tiny) | (expected == 0)
    difference = torch.where(counts, got - expected, 0.0).norm().item()
    norm = (torch.where(counts, expected, 0.0) if terms is None else terms).norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)


@dataclasses.dataclass
class Result:
    """What a backend made of a case: worst of all outputs and gradients, as a fraction of what is allowed."""

    case: Case
    precision: str
    backend: str
    status: str  # "right", "wrong", "failed", "not built", "out of memory"
    fraction: float = 0.0
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.status in ("wrong", "failed")

    def row(self) -> dict:
        return {
            "op": self.case.op, "case": str(self.case), "dtype": self.precision, "backend": self.backend,
            "status": self.status, "detail": self.detail,
            "fraction_of_allowed": float(f"{self.fraction:.3g}") if math.isfinite(self.fraction) else None,
        }  # fmt: skip


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is a newer switch
        before = [setting.allow_tf32 for setting in settings]
        for setting in settings:
            setting.allow_tf32 = allowed
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for setting, value in zip(settings, before, strict=True):
                setting.allow_tf32 = value


def check(
    case: Case, precision: str, backends: Iterable[str], device: torch.device, oracle: torch.device | None = None
) -> list[Result]:
    """Hold backends to the definition in float64, computed on ``oracle`` (default: the CPU).

    An error has to stay under the bound of its precision, and under twice that of the library plus eager passes in the
    same precision (4 ulp, where that is larger).
    """
    oracle = oracle or torch.device("cpu")
    function = getattr(functional, case.op)
    results = []
    with _tf32(precision == "tf32"):
        tensors = inputs(case, precision, device)
        with dispatch.backend("reference"), torch.no_grad():
            like_y = function(**{name: t.clone() for name, t in tensors.items()}, **case.options)
        generator = torch.Generator(device).manual_seed(1)
        dy = torch.randn(like_y.shape, generator=generator, device=device).to(like_y.dtype)
        if case.values == "large":
            dy /= 16  # or gradients of the weight leave float16's range
        for_oracle = {name: t.to(oracle) for name, t in tensors.items()}
        if case.options.get("activation") == "relu":
            dy = torch.where(_near_zero(case, for_oracle).to(device), 0.0, dy)
        if like_y.dim() == 4 and case.channels_last:
            dy = dy.contiguous(memory_format=torch.channels_last)
        expected, terms = _oracle(case, for_oracle, dy.to(oracle))
        with dispatch.backend("reference"):
            eager = _outputs(function, case, tensors, dy)
        for backend in backends:
            try:
                with dispatch.backend(backend):
                    got = eager if backend == "reference" else _outputs(function, case, tensors, dy)
                    worst = _worst(got, eager, expected, terms, precision)
            except NotImplementedError as error:
                results.append(Result(case, precision, backend, "not built", detail=str(error)))
            except torch.OutOfMemoryError as error:
                results.append(Result(case, precision, backend, "out of memory", detail=_first_line(error)))
            except Exception as error:  # a kernel may fail to compile or launch in any way: that is what is asked here
                detail = f"{type(error).__name__}: {_first_line(error)}"
                results.append(Result(case, precision, backend, "failed", math.inf, detail))
            else:
                fraction, detail = worst
                status = "right" if fraction <= 1 else "wrong"
                results.append(Result(case, precision, backend, status, fraction, detail))
    return results


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _worst(got, eager, expected, terms, precision) -> tuple[float, str]:
    if got.keys() != expected.keys():
        return math.inf, f"gives {', '.join(got)}; expected {', '.join(expected)}"
    worst = (0.0, "")
    for name, value in expected.items():
        of = terms if name == "db" else None
        allowed = 2 * _error(eager[name], value, precision, of)
        allowed = min(BOUNDS[precision], max(allowed, 4 * _ULP[precision]))
        error = _error(got[name], value, precision, of)
        worst = max(worst, (error / allowed, f"{name}: error {error:.2g}, allowed {allowed:.2g}"))
    return worst


# --- times ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _keys_seen() -> Iterator[dict[str, tuple]]:
    """Of the ops that run inside, direction → the key of their row."""
    seen: dict[str, tuple] = {}
    run = dispatch.run

    def noting(op, direction, tensor, arguments, recorded=""):
        seen[direction] = tuning.key(op, direction, arguments)
        return run(op, direction, tensor, arguments, recorded)

    dispatch.run = noting
    try:
        yield seen
    finally:
        dispatch.run = run


def _milliseconds(runs: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median of each by CUDA events, called in turn; the device is waited for once, at the end."""
    events: dict[str, list] = {name: [] for name in runs}
    names = list(runs)
    for i in range(warmup + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            runs[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs[warmup:])
        for name, pairs in events.items()
    }


def measure(
    case: Case, precision: str, backends: Sequence[str], device: torch.device, rounds: int = 15
) -> list[tuple[tuple, dict[str, float]]]:
    """(key, backend → milliseconds) of the forward and of the backward; of ops with one row for both, of their sum."""
    function = getattr(functional, case.op)
    with _tf32(precision == "tf32"):
        tensors = inputs(case, precision, device)
        leaves = {name: t.requires_grad_(name != "running_var") for name, t in tensors.items()}
        wanted = [t for t in leaves.values() if t.requires_grad]
        forwards: dict[str, Callable[[], Tensor]] = {}
        backwards: dict[str, Callable[[], object]] = {}
        for backend in backends:

            def forward(backend=backend) -> Tensor:
                with dispatch.backend(backend):
                    return function(**leaves, **case.options)

            y = forward()
            dy = torch.randn_like(y)
            forwards[backend] = forward
            backwards[backend] = lambda y=y, dy=dy: torch.autograd.grad(y, wanted, dy, retain_graph=True)
        with _keys_seen() as seen:
            forwards["reference"]()
            backwards["reference"]()
        # the backward's key is seen where the backward runs: in threads of the engine's own
        times = {"forward": _milliseconds(forwards, rounds), "backward": _milliseconds(backwards, rounds)}
    if case.op in tuning.JOINT:
        return [(seen["forward"], {name: times["forward"][name] + times["backward"][name] for name in backends})]
    return [(seen[direction], times[direction]) for direction in ("forward", "backward")]


# --- the two commands -------------------------------------------------------------------------------------------------


def usable(device: torch.device) -> list[str]:
    """The backends that run on tensors of ``device``; the reference is the first."""
    return [
        name
        for name, reason in dispatch.backends().items()
        if reason is None and dispatch._accepts_device(name, device)
    ]


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
                if precision == "tf32" and op == "batch_norm_uncentered":
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
        right = [r.backend for r in found if r.status == "right" and r.backend not in wrong]
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


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def precisions(device: torch.device, quick: bool = False) -> list[str]:
    if device.type != "cuda":
        return ["float32"] if quick else ["float32", "bfloat16", "float16"]
    return ["bfloat16", "float32"] if quick else ["bfloat16", "float16", "float32", "tf32"]


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
    parser.add_argument("--dry-run", action="store_true", help="do not write to the tuning table")


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
    session = Session(device, usable(device), _say)
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
    session = Session(device, usable(device), _say)
    ops = {case.op for case in todo}
    checked = [*options.dtype, *(["tf32"] if "float32" in options.dtype else [])]
    session.check([case for case in cases(options.quick) if case.op in ops], checked)
    session.time(todo, options.dtype)
    return _finish(session, options, not options.dry_run)
