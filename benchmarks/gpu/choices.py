"""The stage `choices` of `make gpu`: what the kernels' design leaves to measurement.

Rows, by how their case begins; times are of CUDA graphs, but for those of eager steps:

    norm:       the library's product; Triton's forward without a norm (B = 1), with the norm from the tiles of its main
                loop, from a pass of its own, and from squares that the producer of x has left. Ratios to the product.
    tiles:      Triton's kernels with the tiles of configs.py, and with others. Ratios to configs.py's.
    pass:       memory-bound ops by backend: GB_per_s by the bytes that have to move, their share of the copy's rate.
    launching:  training steps of networks, eager and as a CUDA graph; host_ms is what the host takes for a step, which
                holds small batches up. Ratios to plain's eager step.

Which backend serves a shape class is what the stage `tuning` settles, recomputation (`ours-low`) the stage `networks`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import functional, selftest, triton_kernels
from bcos_kernels.selftest_cases import Case, batch_norm, conv2d, layer_norm, linear
from bcos_kernels.triton_kernels import configs
from bcos_kernels.triton_kernels.configs import Config
from bcosification.evaluation.measuring import interleaved, summarized

from .graphs import captured, capturing_stream
from .networks import rates, steps_of
from .running import Run, first_line

DIRECTIONS = ("forward", "backward")

# --- which tiles ------------------------------------------------------------------------------------------------------

TILES = {
    (16, "large"): [
        Config(128, 128, 64, 8, 3), Config(128, 128, 32, 8, 4), Config(64, 128, 64, 4, 4), Config(128, 64, 64, 4, 4),
    ],
    (16, "tall"): [Config(128, 64, 64, 4, 3), Config(128, 64, 32, 4, 4), Config(64, 64, 64, 4, 4)],
    (32, "large"): [Config(128, 64, 32, 8, 3), Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3)],
}  # fmt: skip
"""Form of a result → tiles beside that of configs.py. For 32 bits those of tf32: exact float32 products are no matrix
instructions. Compiled for sm_90 none of them spills; 128 × 128 × 64 in 4 warps does, 64 bytes a thread."""
DESCRIPTOR_TILES = {
    "wide": [Config(128, 256, 64, 8, 4), Config(256, 128, 64, 8, 3), Config(128, 128, 64, 8, 4)],
    "large": [Config(128, 128, 64, 4, 4), Config(128, 128, 64, 8, 3), Config(64, 128, 64, 4, 5)],
    "tall": [Config(128, 64, 64, 4, 5), Config(64, 64, 64, 4, 5), Config(128, 64, 128, 4, 3)],
}


def tiled_cases(rehearsal: bool = False) -> list[tuple[Case, str]]:
    """(case, precision) of products that are large enough for tiles to matter."""
    if rehearsal:
        return [(linear("MLP", 33, 32, 72), "float32")]
    batch, tokens = 256, 197 * 256
    found = [
        linear("ViT-S, MLP 1", tokens, 384, 1536),
        linear("ViT-B, MLP 2", tokens, 3072, 768),
        conv2d("1x1", (batch, 64, 56, 56), 256, 1),
        conv2d("1x1", (batch, 1024, 14, 14), 256, 1),
        conv2d("3x3", (batch, 64, 56, 56), 64, 3, padding=1),
        conv2d("3x3", (batch, 256, 14, 14), 256, 3, padding=1),
    ]
    return [(case, precision) for precision in ("bfloat16", "tf32") for case in found]


@contextlib.contextmanager
def tiles(form: tuple[int, str] | str, config: Config) -> Iterator[None]:
    """`config` in the place of that of configs.py for a form of results, a descriptor's form being a text alone."""
    table = configs.DESCRIPTOR_CONFIGS if isinstance(form, str) else configs.CONFIGS
    with mock.patch.dict(table, {form: config}):
        yield


def _told(config: Config) -> str:
    block = "x".join(map(str, config[:3]))
    return f"{block}, {config.num_warps} warps, {config.num_stages} stages"


def variants(precision: str) -> dict[str, tuple[tuple[int, str] | str, Config] | None]:
    """Contender → (form, tile); None is configs.py as it is."""
    bits = 16 if precision in ("bfloat16", "float16") else 32
    found: dict[str, tuple[tuple[int, str] | str, Config] | None] = {"configs.py": None}
    for (of, form), tiles in TILES.items():
        if of == bits:
            found |= {f"{form} {_told(config)}": ((of, form), config) for config in tiles}
    if bits == 16:
        for form, tiles in DESCRIPTOR_TILES.items():
            found |= {f"TMA, {form} {_told(config)}": (form, config) for config in tiles}
    return found


def calls_of(device: torch.device, case: Case, precision: str, backend: str) -> tuple[Callable, Callable]:
    """(forward that keeps what a backward needs, backward) of a case by a backend, for capturing and timing."""
    tensors = selftest.inputs(case, precision, device)
    leaves = {name: t.requires_grad_(name != "running_var") for name, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    function = getattr(functional, case.op)

    def forward() -> Tensor:
        with selftest.exactly(backend):
            return function(**leaves, **case.options)

    with capturing_stream(device):
        y = forward()
    dy = torch.randn_like(y)
    return forward, lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _timed(run: Run, runs: dict[str, Callable[[], object]], baseline: str) -> dict[str, dict[str, float]]:
    rounds = 2 if run.rehearsal else 15
    return summarized(interleaved(runs, rounds=rounds, device=run.device), baseline)


class _Noting(dict):
    """A table of tiles that notes which of its entries are looked up."""

    def __init__(self, table: dict, noted: set):
        super().__init__(table)
        self.noted = noted

    def __getitem__(self, key):
        self.noted.add(key)
        return super().__getitem__(key)


def _consulted(call: Callable[[], object]) -> set[tuple[int, str] | str]:
    """Forms whose tiles the launches of a call look up: others change nothing of it."""
    noted: set[tuple[int, str] | str] = set()
    tables = {name: _Noting(getattr(configs, name), noted) for name in ("CONFIGS", "DESCRIPTOR_CONFIGS")}
    with mock.patch.multiple(configs, **tables):
        call()
    return noted


def _tiled_label(case: Case, precision: str, direction: str) -> str:
    return f"tiles: {case.op} {precision}, {case}, {direction}"


def tiles_of(run: Run, case: Case, precision: str, backend: str = "triton") -> None:
    """Rows of a case: forward and backward with every tile that changes what is launched."""
    due = {direction for direction in DIRECTIONS if run.due(_tiled_label(case, precision, direction))}
    with selftest._tf32(precision == "tf32"):
        for direction, call in zip(DIRECTIONS, calls_of(run.device, case, precision, backend), strict=True):
            if direction not in due:
                continue
            label = _tiled_label(case, precision, direction)
            forms = _consulted(call)
            replays: dict[str, Callable[[], object]] = {}
            for name, variant in variants(precision).items():
                if variant is not None and variant[0] not in forms:
                    continue
                with contextlib.nullcontext() if variant is None else tiles(*variant):
                    try:
                        replays[name] = _fixed(call, variant, run.device)
                    except Exception as error:  # too much shared memory, say
                        reason = f"{type(error).__name__}: {first_line(error)}"
                        run.add(label, name, status="not run", reason=reason)
            times = _timed(run, replays, "configs.py")
            for name in reversed(times):  # configs.py last: a case counts as measured by it
                run.add(label, name, **times[name])
            del replays
            run.free()


def _fixed(call, variant, device: torch.device) -> Callable[[], object]:
    """The call with a tile in the place of another; once captured, a graph keeps it."""
    if device.type == "cuda" or variant is None:
        return captured(call, device)

    def tiled() -> object:
        with tiles(*variant):
            return call()

    tiled()
    return tiled


# --- where the norm comes from ----------------------------------------------------------------------------------------


def norm_cases(rehearsal: bool = False) -> list[Case]:
    if rehearsal:
        return [linear("MLP", 33, 32, 24), conv2d("3x3", (2, 16, 6, 6), 8, 3, padding=1)]
    return [case for case, precision in tiled_cases() if precision == "bfloat16"]


def _norm_contenders(case: Case, x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    rest = (False, 1, False)  # weights as they are, no maximum, nothing kept
    if case.op == "linear":
        product = partial(F.linear, x, weight)

        def forward(b: float, squares: Tensor | None) -> object:
            return triton_kernels.linear_forward(x, weight, None, b, None, *rest, squares)
    else:
        window = {key: (case.options.get(key, default),) * 2
                  for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))}  # fmt: skip
        product = partial(F.conv2d, x, weight, None, **window)

        def forward(b: float, squares: Tensor | None) -> object:
            return triton_kernels.conv2d_forward(x, weight, None, *window.values(), 1, b, None, *rest, squares)

    def squares_of() -> Tensor:
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square()

    known = squares_of()
    return {
        "library, product alone": product,
        "no norm": lambda: forward(1.0, None),
        "norm in the main loop": lambda: forward(2.0, None),
        "norm from the producer": lambda: forward(2.0, known),
        "norm from a pass": lambda: forward(2.0, squares_of()),
    }


def norms_of(run: Run, case: Case) -> None:
    """Rows of a case's forward, the norm taken in several ways."""
    precision = "float32" if run.rehearsal else "bfloat16"
    label = f"norm: {case.op} {precision}, {case}"
    if not run.due(label):
        return
    tensors = selftest.inputs(case, precision, run.device)
    with torch.no_grad():
        contenders = _norm_contenders(case, tensors["x"], tensors["weight"])
        times = _timed(run, {n: captured(call, run.device) for n, call in contenders.items()}, "library, product alone")
    for name in reversed(times):  # the library last: a case counts as measured by it
        run.add(label, name, **times[name])


# --- passes -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pass:
    """A memory-bound op; forward and backward: activations that have to be read or written, some of them twice as all
    of a channel has to be known first."""

    case: Case
    forward: int
    backward: int


def passes(rehearsal: bool = False) -> list[Pass]:
    shape, tokens = ((2, 8, 6, 6), 12) if rehearsal else ((256, 256, 56, 56), 197 * 256)
    relu = {"activation": "relu"}
    return [
        Pass(batch_norm("BatchNorm, known statistics", shape, training=False, **relu), 2, 3),
        Pass(batch_norm("BatchNorm", shape, training=True, **relu), 3, 5),
        Pass(batch_norm("BatchNorm, residual", shape, training=True, residual=True, **relu), 4, 8),
        Pass(layer_norm("LayerNorm", (tokens, 768)), 2, 3),
    ]


def pass_of(run: Run, each: Pass, backends: list[str]) -> None:
    """Rows of a memory-bound op: its rate by the bytes that have to move."""
    precision = "float32" if run.rehearsal else "bfloat16"
    label = f"pass: {each.case.op} {precision}, {each.case}"
    due = {direction for direction in DIRECTIONS if run.due(f"{label}, {direction}")}
    if not due:
        return
    size = torch.Size(each.case.tensors["x"]).numel() * (4 if run.rehearsal else 2)
    measured = rates(run, precision)
    calls = {backend: calls_of(run.device, each.case, precision, backend) for backend in backends}
    for i, (direction, moved) in enumerate(zip(DIRECTIONS, (each.forward, each.backward), strict=True)):
        if direction not in due:
            continue
        replays = {name: captured(of[i], run.device) for name, of in calls.items()}
        times = _timed(run, replays, backends[0])
        for name in reversed(times):  # the reference last: a case counts as measured by it
            rate = moved * size / times[name]["median_ms"] / 1e6
            share = {"share_of_copy": rate / measured[0]} if measured else {}
            run.add(f"{label}, {direction}", name, **times[name], GB_per_s=rate, **share)


# --- launching --------------------------------------------------------------------------------------------------------

LAUNCHED = (("resnet50", 256), ("resnet50", 16), ("vit_s", 256), ("vit_s", 16))


def _host_ms(run: Run, step: Callable[[], object]) -> float:
    """Median milliseconds after which a step that was begun returns to the host; the device goes on with it."""
    times = []
    for _ in range(2 if run.rehearsal else 9):
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def launching(run: Run, name: str, batch: int, precision: str, size: int) -> None:
    """Rows of a network's training step, plain and ours, as it is and as a CUDA graph."""
    label = f"launching: {name}, {precision}, batch {batch}"
    if not run.due(label):
        return
    runs: dict[str, Callable[[], object]] = {}
    host: dict[str, float] = {}
    for who, step in steps_of(run, name, batch, precision, size).items():
        step()
        runs[who], host[who] = step, _host_ms(run, step)
        try:
            runs[f"{who}, CUDA graph"] = captured(step, run.device)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            run.add(label, f"{who}, CUDA graph", status="failed", reason=reason)
    times = _timed(run, runs, "plain")
    for who in reversed(times):  # plain last: a case counts as measured by it
        extra = {"host_ms": host[who]} if who in host else {}
        run.add(label, who, images_per_s=batch / times[who]["median_ms"] * 1e3, **times[who], **extra)


def choices(run: Run) -> None:
    """Questions in the order of what hangs on them."""
    kernels = [name for name in selftest.usable(run.device) if name != "reference"]
    precision, size = ("float32", 64) if run.rehearsal else ("bfloat16", 224)
    for name, batch in [("resnet18", 2)] if run.rehearsal else LAUNCHED:
        launching(run, name, batch, precision, size)
        run.free()
    if "triton" in kernels:
        for case in norm_cases(run.rehearsal):
            norms_of(run, case)
            run.free()
    for each in passes(run.rehearsal):
        pass_of(run, each, ["reference", *(name for name in kernels if name not in ("cuda:cutlass",))])
        run.free()
    if "triton" not in kernels:
        run.add("norm and tiles", "triton", status="not run", reason="the backend triton does not run here")
        return
    due = [of for of in tiled_cases(run.rehearsal) if any(run.due(_tiled_label(*of, way)) for way in DIRECTIONS)]
    if due:
        from . import warm_up

        run.add("tiles", "compiled side by side", **warm_up.side_by_side(run, "--tiles"))
    for case, precision in due:
        tiles_of(run, case, precision)
