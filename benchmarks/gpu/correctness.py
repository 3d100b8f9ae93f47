"""The stage `correctness` of `make gpu`: numbers, and the ways in which an op can be called on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bcos_kernels
from bcos_kernels import functional, reference, selftest, selftest_cases, tuning

from .graphs import captured
from .running import Run, first_line


def _check(run: Run, case: selftest_cases.Case, precision: str, backends: list[str]) -> None:
    label = f"{case.op} {precision}, {case}"
    due = [name for name in backends if run.due(label, name)]
    if not due:
        return
    try:
        found = selftest.check(case, precision, due, run.device)
    except Exception as error:  # of the library itself, or of the definition
        run.add(label, "reference", status="failed", reason=f"{type(error).__name__}: {first_line(error)}")
        return
    for result in found:
        row = result.row()
        run.add(label, result.backend, **{key: row[key] for key in ("status", "fraction_of_allowed", "detail")})


def correctness(run: Run) -> None:
    backends = selftest.usable(run.device)
    kernels = [name for name in backends if name != "reference"]
    for precision in ("float32",) if run.rehearsal else ("bfloat16", "float32", "float16", "tf32"):
        for case in selftest_cases.cases(quick=run.rehearsal):
            if precision == "tf32" and case.op in tuning.WITHOUT_PRODUCTS:
                continue
            _check(run, case, precision, backends)
    for backend in [*kernels, "reference"]:
        for case in selftest_cases.cases(quick=True)[: 2 if run.rehearsal else None]:
            for name, extra in EXTRAS.items():
                run.attempt(f"{name}: {case.op}, {case}", backend, lambda e=extra, c=case, b=backend: e(run, c, b))
    for backend in kernels:
        for name, large in LARGE.items():
            run.attempt(f"beyond 2^31 elements: {name}", backend, lambda f=large, b=backend: f(run, b))
            run.free()


def _calls(run: Run, case: selftest_cases.Case, backend: str, dtype: str = "bfloat16"):
    """(tensors, dy, a function of these to outputs) of a case."""
    precision = "float32" if run.rehearsal else dtype
    tensors = selftest.inputs(case, precision, run.device)
    function = getattr(functional, case.op)
    with torch.no_grad(), bcos_kernels.backend("reference"):
        like = function(**{name: t.clone() for name, t in tensors.items()}, **case.options)
    dy = torch.randn_like(like)

    def outputs() -> dict[str, Tensor]:
        with selftest.exactly(backend):
            return selftest._outputs(function, case, tensors, dy)

    return tensors, dy, outputs


def _same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict:
    """A row: bitwise the same, or how far from it."""
    worst = max((float((got[k].double() - v.double()).abs().max()) if v.numel() else 0.0) for k, v in expected.items())
    equal = got.keys() == expected.keys() and all(torch.equal(got[k], v) for k, v in expected.items())
    near = all(torch.allclose(got[k].float(), v.float(), 2e-2, 2e-2) for k, v in expected.items())
    return {"status": "right" if near else "wrong", "bitwise": int(equal), "largest_difference": worst}


def _streams(run: Run, case: selftest_cases.Case, backend: str) -> dict:
    """Inputs that are still being written on a side stream when the op is called there."""
    if run.device.type != "cuda":
        raise NotImplementedError("streams need a GPU")
    tensors, _, outputs = _calls(run, case, backend)
    expected = outputs()
    kept = {name: t.clone() for name, t in tensors.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for t in tensors.values():
            t.zero_()
        torch.cuda._sleep(50_000_000)
        for name, t in tensors.items():
            t.copy_(kept[name])
        got = outputs()
    side.synchronize()
    return _same(got, expected)


def _graphs(run: Run, case: selftest_cases.Case, backend: str) -> dict:
    """Forward and backward captured in a CUDA graph, replayed on other values than it was captured with."""
    if run.device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    tensors, _, outputs = _calls(run, case, backend)
    kept = {name: t.clone() for name, t in tensors.items()}
    expected = outputs()
    for name, t in tensors.items():
        t.copy_(kept[name] * 0.5)
    replay = captured(outputs, run.device)
    for name, t in tensors.items():
        t.copy_(kept[name])
    got = replay()
    torch.cuda.synchronize()
    return _same(got, expected)


def _compiled(run: Run, case: selftest_cases.Case, backend: str) -> dict:
    """torch.compile(fullgraph=True), forward and backward."""
    tensors, dy, outputs = _calls(run, case, backend)
    expected = outputs()
    torch.compiler.reset()
    function, options = getattr(functional, case.op), dict(case.options)
    compiler = "aot_eager" if run.rehearsal else "inductor"
    compiled = torch.compile(
        lambda **leaves: function(**leaves, **options), fullgraph=True, dynamic=False, backend=compiler
    )
    with selftest.exactly(backend):
        got = selftest._outputs(lambda **arguments: compiled(**_leaves(arguments, case)), case, tensors, dy)
    return _same(got, expected)


def _leaves(arguments: dict, case: selftest_cases.Case) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if name not in case.options}


EXTRAS = {"side stream": _streams, "CUDA graph": _graphs, "compiled": _compiled}


def _large_linear(run: Run, backend: str) -> dict:
    """x of more than 2^31 elements: the last rows of y and dx, against the definition on these rows alone."""
    rows, k, n = (64, 32, 8) if run.rehearsal else (2**21 + 5, 1032, 16)
    x = torch.randn(rows, k, dtype=torch.bfloat16, device=run.device).requires_grad_()
    w = (torch.randn(n, k, device=run.device) / k**0.5).bfloat16().requires_grad_()
    dy = torch.randn(rows, n, dtype=torch.bfloat16, device=run.device)
    with selftest.exactly(backend):
        y = bcos_kernels.linear(x, w)
        (dx,) = torch.autograd.grad(y, x, dy)
    return _near_the_end(x, w, dy, y, dx, slice(-16, None), lambda x, w: reference.linear(x, w))


def _large_conv2d(kernel: int) -> Callable[[Run, str], dict]:
    def large(run: Run, backend: str) -> dict:
        edge = 20 if run.rehearsal else 5800  # 64 · 5800² = 2.15e9
        x = torch.randn(1, 64, 1, 1, device=run.device, dtype=torch.bfloat16).expand(1, 64, edge, edge)
        x = torch.empty_like(x, memory_format=torch.channels_last).normal_().requires_grad_()
        w = (torch.randn(16, 64, kernel, kernel, device=run.device) / (8 * kernel)).bfloat16()
        w = w.contiguous(memory_format=torch.channels_last).requires_grad_()
        with selftest.exactly(backend):
            y = bcos_kernels.conv2d(x, w, padding=kernel // 2)
            dy = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, dy)
        rows = slice(-8 - kernel, None)  # of which the first ones lack their neighbours
        return _near_the_end(
            x, w, dy, y, dx, (..., rows, slice(None)), lambda x, w: reference.conv2d(x, w, padding=kernel // 2),
            (..., slice(kernel, None), slice(None)),
        )  # fmt: skip

    return large


def _near_the_end(x, w, dy, y, dx, place, definition, inner=slice(None)) -> dict:
    part = x.detach()[place].double().requires_grad_()
    expected = definition(part, w.detach().double())
    (dpart,) = torch.autograd.grad(expected, part, dy[place].double())
    errors = [
        float((got[place].double() - want)[inner].norm() / want[inner].norm())
        for got, want in ((y.detach(), expected.detach()), (dx, dpart))
    ]
    right = max(errors) < selftest.BOUNDS["bfloat16"]
    return {"status": "right" if right else "wrong", "y_error": errors[0], "dx_error": errors[1]}


def _large_batch_norm(run: Run, backend: str) -> dict:
    edge = 20 if run.rehearsal else 4100  # 2 · 64 · 4100² = 2.15e9
    x = torch.empty(2, 64, edge, edge, dtype=torch.bfloat16, device=run.device)
    x = x.contiguous(memory_format=torch.channels_last).normal_()
    var, weight = torch.rand(64, device=run.device) + 0.5, torch.rand(64, device=run.device) + 0.5
    with selftest.exactly(backend), torch.no_grad():
        y = bcos_kernels.batch_norm_uncentered(x, var, weight, None, training=False, activation="relu")
    place = (slice(1, 2), slice(None), slice(-4, None))
    want = reference.batch_norm_uncentered(
        x[place].double(), var.double(), weight.double(), None, training=False, activation="relu"
    )
    error = float((y[place].double() - want).norm() / want.norm())
    return {"status": "right" if error < selftest.BOUNDS["bfloat16"] else "wrong", "y_error": error}


LARGE = {
    "linear": _large_linear,
    "conv2d 1x1": _large_conv2d(1),
    "conv2d 3x3": _large_conv2d(3),
    "batch_norm_uncentered": _large_batch_norm,
}
