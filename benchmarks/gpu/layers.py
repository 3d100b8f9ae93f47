"""The stage `layers` of `make gpu`: single layers of ResNet-50 and ViTs, against plain and the peer's.

Rows, a contender each: median_ms and ratio (to plain's) of forward and backward, forward_ms and forward_ratio; the
same with device_ before it from CUDA graphs, what the device takes without the time that launching does. A network
hides that time behind its kernels, a single layer does not. Rows of plain have floor_ms and forward_floor_ms
(floor.py), where the stage `environment` has measured the device's rates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bcos_kernels import selftest, selftest_cases
from bcosification.evaluation.measuring import interleaved, summarized

from .. import floor
from .cases import layer_cases
from .graphs import captured
from .networks import rates
from .running import Run, first_line

COMPILED = ", max-autotune"
SUITES = (("bfloat16", ""), ("bfloat16", COMPILED), ("tf32", ""))
"""(precision, how): first all that needs no compiler for every shape; then the compiled ones."""


def _layer(case: selftest_cases.Case) -> tuple[nn.Module, nn.Module]:
    """(plain, B-cos) with the same weight; B-cosified models' layers: weights as they are."""
    from bcosification.nn import BcosConv2d, BcosLinear

    weight = case.tensors["weight"]
    if case.op == "linear":
        plain: nn.Module = nn.Linear(weight[1], weight[0], bias=False)
        ours: nn.Module = BcosLinear(weight[1], weight[0], normalize_weight=False)
    else:
        options = {key: case.options[key] for key in ("stride", "padding", "groups") if key in case.options}
        channels = weight[1] * options.get("groups", 1)
        plain = nn.Conv2d(channels, weight[0], weight[2:], bias=False, **options)
        ours = BcosConv2d(channels, weight[0], weight[2:], normalize_weight=False, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def layers(run: Run) -> None:
    """Forward and backward, and forward alone, shape by shape while there is time."""
    for precision, how in (("float32", ""), ("float32", COMPILED)) if run.rehearsal else SUITES:
        for case in layer_cases(run.rehearsal):
            label = f"{case.op} {precision}, {case}{how}"
            if run.due(label, "plain"):
                with selftest._tf32(precision == "tf32"):
                    _layer_at(run, label, case, precision, how)
                run.free()


def _layer_at(run: Run, label: str, case: selftest_cases.Case, precision: str, how: str) -> None:
    from bcosification.evaluation.peer_style import peer_style

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    plain, ours = (m.to(run.device, dtype, memory_format=torch.channels_last) for m in _layer(case))
    peer = peer_style(nn.Sequential(ours))
    functions: dict[str, Callable] = {"plain": plain}
    if how:
        compiler = {"backend": "eager"} if run.rehearsal else {"mode": "max-autotune-no-cudagraphs"}
        torch.compiler.reset()
        for name, layer in (("plain", plain), ("peer", peer)):
            functions[f"{name}-compiled"] = torch.compile(layer, dynamic=False, **compiler)
    else:
        backends = ["auto", *(name for name in selftest.usable(run.device) if name != "reference")]
        functions["peer"] = peer
        functions |= {f"ours-{name}": _named(ours, name) for name in backends}
    _time_layer(run, label, case, precision, dtype, functions, peer)


def _named(layer: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with selftest.exactly(backend):
            return layer(x)

    forward.parameters = layer.parameters
    return forward


def _time_layer(run: Run, label, case, precision, dtype, functions: dict[str, Callable], peer: nn.Module) -> None:
    x = torch.randn(case.tensors["x"], device=run.device, dtype=dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()
    with torch.no_grad():
        like = functions["plain"](x)
    dy = torch.randn_like(like)
    steps, errors = {}, {}
    expected = torch.autograd.grad(peer(x), (x, *peer.parameters()), dy)
    for name, function in list(functions.items()):

        def step(function=function):
            return torch.autograd.grad(function(x), (x, *function.parameters()), dy)

        try:
            found = step()
        except Exception as error:  # a compiler or a kernel that fails ends one contender
            run.add(label, name, status="failed", reason=f"{type(error).__name__}: {first_line(error)}")
            continue
        if not name.startswith("plain"):
            errors[name] = max(
                float((got.float() - want.float()).norm() / want.float().norm())
                for got, want in zip(found, expected, strict=True)
            )
            if errors[name] > 3e-2:  # of two results in 16 bits, one of them rounded after every pass
                run.add(label, name, status="wrong", difference_from_peer=errors[name])
                continue
        steps[name] = step
    forwards = {name: lambda f=functions[name]: f(x) for name in steps}
    rounds = 2 if run.rehearsal else 15

    def timed(runs: dict[str, Callable]) -> dict[str, dict[str, float]]:
        return summarized(interleaved(runs, rounds=rounds, device=run.device))

    found = {"": timed(steps), "forward_": timed(forwards)}
    for what, runs in (("device_", steps), ("device_forward_", forwards)):
        replays = _captured(run, label, runs)
        found[what] = timed(replays) if "plain" in replays else {}
    for name in reversed(list(steps)):  # plain last: a case counts as measured by it
        values = {"dtype": precision, **found[""][name]}
        for what in ("forward_", "device_", "device_forward_"):
            if name in found[what]:
                values |= {f"{what}ms": found[what][name]["median_ms"], f"{what}ratio": found[what][name]["ratio"]}
        if name in errors:
            values["difference_from_peer"] = errors[name]
        if name == "plain":
            values |= _floors(run, case, precision, dtype)
        run.add(label, name, **values)


def _captured(run: Run, label: str, runs: dict[str, Callable]) -> dict[str, Callable]:
    """Those that can be captured in a CUDA graph, as replays."""
    replays = {}
    for name, function in runs.items():
        try:
            replays[name] = captured(function, run.device)
        except Exception as error:  # what a graph cannot hold is timed without one alone
            print(f"{label}: {name}: no CUDA graph: {type(error).__name__}: {first_line(error)}", flush=True)
    return replays


def _floors(run: Run, case: selftest_cases.Case, precision: str, dtype: torch.dtype) -> dict[str, float]:
    measured = rates(run, precision)
    if measured is None:
        return {}
    forward, backward = (work.milliseconds(*measured) for work in floor.of_layer(case, dtype.itemsize))
    return {"forward_floor_ms": forward, "floor_ms": forward + backward}
