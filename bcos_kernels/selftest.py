"""Checks the backends of this machine against the definition in float64, and times them on a GPU.

What a backend is asked for is a case (selftest_cases.py); what comes of it is told and unlocked by the commands
(selftest_commands.py). A variant of a backend ("cuda:cutlass") is checked and timed as one more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import dispatch, functional, reference, tuning
from .selftest_cases import Case

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
    "layer_norm": reference.layer_norm,
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
        wide = len(shape) < 2 and not (name == "bias" and case.op not in tuning.WITHOUT_PRODUCTS)
        t = t if wide else t.to(_DTYPES[precision])
        found[name] = t.contiguous(memory_format=torch.channels_last) if case.channels_last and t.dim() == 4 else t
    return found


def _outputs(function: Callable, case: Case, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y, the gradient of every tensor that has one, running_var where it is updated; y once more where nothing is kept
    for a backward: other kernels may run then."""
    with torch.no_grad():
        inferred = function(**{name: t.detach().clone() for name, t in tensors.items()}, **case.options)
    return _gradients(function, case, tensors, dy) | {"y, inference": inferred}


def _gradients(function: Callable, case: Case, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
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
    found = _gradients(_DEFINITIONS[case.op], case, double, dy.double())
    found["y, inference"] = found["y"]
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
    served: frozenset[str] = frozenset()
    """Of "forward", "backward" and "inference" those in which kernels of its own ran: of a variant perhaps none, where
    its backend's others served."""

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
                with exactly(backend), _launches(case.op) as seen:
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
                served = _served(case.op, backend, seen)
                results.append(Result(case, precision, backend, status, fraction, detail, served))
    return results


def exactly(backend: str) -> contextlib.AbstractContextManager:
    """`dispatch.backend` of a name as rows have it: "cuda" there is a variant, whatever the table says."""
    return dispatch.backend(dispatch.DEFAULTS.get(backend, backend))


@contextlib.contextmanager
def _launches(op: str) -> Iterator[dict[str, tuple[tuple, str]]]:
    """Of an op that runs inside, "forward", "backward" or "inference" → (the key of its row, what ran it)."""
    seen: dict[str, tuple[tuple, str]] = {}
    run = dispatch.run

    def noting(name, direction, tensor, arguments, recorded=""):
        result = run(name, direction, tensor, arguments, recorded)
        if name == op:
            key = tuning.key(op, direction, arguments)
            is_forward = direction == "forward"
            told = dispatch.dispatched()[op if is_forward else f"{op}_{direction}"]
            seen[key[1] if is_forward else direction] = key, told
        return result

    dispatch.run = noting
    try:
        yield seen
    finally:
        dispatch.run = run


def _served(op: str, backend: str, seen: dict[str, tuple[tuple, str]]) -> frozenset[str]:
    """In which directions ``backend``'s own kernels ran, of the launches that were seen."""
    if backend in dispatch.VARIANTS:
        return frozenset(direction for direction, (_, ran) in seen.items() if ran == backend)
    return frozenset({"forward", "backward"} | ({"inference"} if op in tuning.KEEP else set()))


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


def usable(device: torch.device) -> list[str]:
    """The backends and variants that run on tensors of ``device``; the reference is the first."""
    found = dispatch.backends()
    return [
        name
        for name in (*found, *dispatch.VARIANTS)
        if found[name] is None and dispatch._accepts_device(dispatch.base(name), device)
    ]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def precisions(device: torch.device, quick: bool = False) -> list[str]:
    if device.type != "cuda":
        return ["float32"] if quick else ["float32", "bfloat16", "float16"]
    return ["bfloat16", "float32"] if quick else ["bfloat16", "float16", "float32", "tf32"]


# --- times ------------------------------------------------------------------------------------------------------------


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
    """(key, backend → milliseconds) of the forward and of the backward, of ops with one row for both of their sum; and
    of the forward that keeps nothing, but with a batch's own statistics, which nobody infers with.

    A variant that left a direction to its backend's other kernels has no time of its own there.
    """
    function = getattr(functional, case.op)
    infers = case.op in tuning.KEEP and not case.options.get("training")
    with _tf32(precision == "tf32"):
        tensors = inputs(case, precision, device)
        leaves = {name: t.requires_grad_(name != "running_var") for name, t in tensors.items()}
        wanted = [t for t in leaves.values() if t.requires_grad]
        runs: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}}
        if infers:
            runs["inference"] = {}
        served: dict[str, frozenset[str]] = {}
        for backend in backends:

            def forward(backend=backend) -> Tensor:
                with exactly(backend):
                    return function(**leaves, **case.options)

            def infer(forward=forward) -> Tensor:
                with torch.no_grad():
                    return forward()

            with _launches(case.op) as seen:
                y = forward()
                dy = torch.randn_like(y)
                runs["forward"][backend] = forward
                runs["backward"][backend] = lambda y=y, dy=dy: torch.autograd.grad(y, wanted, dy, retain_graph=True)
                runs["backward"][backend]()
                if infers:
                    runs["inference"][backend] = infer
                    infer()
            served[backend] = _served(case.op, backend, seen)
        keys = {direction: key for direction, (key, _) in seen.items()}
        times = {direction: _milliseconds(of, rounds) for direction, of in runs.items()}
    own = {d: {name: ms for name, ms in of.items() if d in served[name]} for d, of in times.items()}
    if case.op in tuning.JOINT:
        own["forward"] |= own.pop("backward")  # whose kernels ran in either
        own["forward"] = {name: times["forward"][name] + times["backward"][name] for name in own["forward"]}
    return [(keys[direction], of) for direction, of in own.items()]
