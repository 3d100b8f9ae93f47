"""The stages of benchmarks/gpu.py: what each measures, and its rows.

Errors are fractions of what is allowed (bcos_kernels/selftest.py). Times are medians by CUDA events, contenders in
turn. A row of something wrong has status "wrong", of something that raised "failed", with the first line of why.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import bcos_kernels
from bcos_kernels import cutlass_build, selftest, selftest_cases, selftest_commands, tuning
from bcosification.evaluation.benchmarking import Step, explain_one_by_one, gradient_error, inference, input_gradient
from bcosification.evaluation.measuring import interleaved, summarized

from . import gpu_warm_up
from .gpu import ROOT, OutOfTime, Run, first_line
from .gpu_cases import layer_cases, tuned_cases
from .gpu_guards import SKIPPED, guarded, repeated
from .networks import NETWORKS, Models, NotHere, inputs


def _tool(*command: str, timeout: float = 60, **environment: str) -> tuple[int, str]:
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


# --- environment ------------------------------------------------------------------------------------------------------


def environment(run: Run) -> None:
    from bcos_kernels.__main__ import _text
    from bcos_kernels.__main__ import environment as report

    print(_text(report()), flush=True)
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    for name, command in {
        "nvidia-smi": ("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"),
        "nvcc": ("nvcc", "--version"),
        "compute-sanitizer": ("compute-sanitizer", "--version"),
        "ncu": ("ncu", "--version"),
    }.items():

        def look(command=command) -> dict:
            status, text = _tool(*command)
            lines = text.strip().splitlines()
            wanted = next((line for line in lines if "release" in line or "Version" in line), lines[0] if lines else "")
            return {"status": "there" if status == 0 else "missing", "says": wanted[:200]}

        run.attempt("tools", name, look)
    for name in ("torchvision", "bcos", "einops", "nvidia-cutlass"):
        try:
            values = {"status": "there", "says": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            values = {"status": "missing", "says": f"pip install {name}, or --wheels"}
        run.add("packages", name, **values)
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        run.add(
            "device", properties.name, multiprocessors=properties.multi_processor_count,
            memory_GiB=properties.total_memory / 2**30, L2_MiB=properties.L2_cache_size / 2**20,
        )  # fmt: skip

    def rate(make: Callable[[], Callable[[], object]], amount: float, unit: str) -> Callable[[], dict]:
        def measured() -> dict:
            run.free()
            with torch.no_grad():
                work = make()
                seconds = interleaved({"": work}, rounds=2 if run.rehearsal else 20, warmup=3, device=run.device)[""]
            middle = sorted(seconds)[len(seconds) // 2]
            return {"median_ms": middle * 1e3, unit: amount / middle}

        return measured

    count = 2**12 if run.rehearsal else 2**31  # 4 GiB of bfloat16, far beyond any L2
    edge = 64 if run.rehearsal else 8192

    def copying():
        source = torch.randn(count, dtype=torch.bfloat16, device=run.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def reading():
        source = torch.randn(count, dtype=torch.bfloat16, device=run.device)
        return lambda: source.sum(dtype=torch.float32)

    def multiplying(dtype):
        def made():
            left, right = (torch.randn(edge, edge, device=run.device).to(dtype) for _ in range(2))
            return lambda: left @ right

        return made

    run.attempt("bandwidth", "copy, read + written", rate(copying, 4 * count / 1e9, "GB_per_s"))
    run.attempt("bandwidth", "sum, read", rate(reading, 2 * count / 1e9, "GB_per_s"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        run.attempt(f"matrix product {edge}^3", name, rate(multiplying(dtype), 2 * edge**3 / 1e12, "TFLOP_per_s"))
    with selftest._tf32(True):
        product = rate(multiplying(torch.float32), 2 * edge**3 / 1e12, "TFLOP_per_s")
        run.attempt(f"matrix product {edge}^3", "tf32", product)


# --- builds -----------------------------------------------------------------------------------------------------------


def builds(run: Run) -> None:
    """In place, and always: what an earlier run built may lie on another machine."""
    run.forget()
    stand_in = Path(tempfile.mkdtemp())
    if importlib.util.find_spec("pybind11") is None:  # its headers come with torch, and they are all that is asked for
        headers = str(Path(torch.__file__).parent / "include")
        (stand_in / "pybind11.py").write_text(f"def get_include():\n    return {headers!r}\n", encoding="utf-8")
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(stand_in)]))

    def build(*command: str) -> Callable[[], dict]:
        def work() -> dict:
            start = time.perf_counter()
            status, text = _tool(sys.executable, *command, timeout=max(run.left(), 1), PYTHONPATH=paths)
            print(text[-6000:], flush=True)
            if status == 124:
                raise OutOfTime(" ".join(command))
            last = text.strip().splitlines()[-1:] or [""]
            return {"status": "built" if status == 0 else "failed", "seconds": time.perf_counter() - start,
                    "reason": "" if status == 0 else last[0][:200]}  # fmt: skip

        return work

    if run.rehearsal:
        run.attempt("setup.py", "native", build("-c", "print('built')"))
        run.attempt("triton", "compiled side by side", partial(gpu_warm_up.side_by_side, run))
        return
    run.attempt("setup.py", "native", build("setup.py", "build_ext", "--inplace"))
    reason = cutlass_build.unbuildable_reason()
    if reason is not None:
        run.add("cutlass", "bfloat16", status="not run", reason=first_line(reason))
    else:
        jobs = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
        run.attempt("cutlass", "bfloat16", build("-m", "bcos_kernels.cutlass_build", "--jobs", jobs))
    status, text = _tool(sys.executable, "-m", "bcos_kernels", "--json")  # asks anew what can be loaded
    if status == 0:
        for name, why in json.loads(text[text.index("{") : text.rindex("}") + 1])["backends"].items():
            run.add("backends", name, status="usable" if why is None else "not usable", reason=why or "")
    run.attempt("triton", "compiled side by side", partial(gpu_warm_up.side_by_side, run))


# --- tuning -----------------------------------------------------------------------------------------------------------


def _checked(run: Run, session: selftest_commands.Session, precisions: list[str]) -> None:
    """The session's checks: what the stage `correctness` has found with these sources on this device, else anew."""
    found = run.rows.of_stage("correctness")
    missing: dict[tuple[str, str], list[selftest_cases.Case]] = {}
    for case in selftest_cases.cases(quick=run.rehearsal):
        for precision in precisions:
            if precision == "tf32" and case.op in tuning.WITHOUT_PRODUCTS:
                continue
            rows = [found.get((f"{case.op} {precision}, {case}", name)) for name in session.backends]
            if None in rows:
                missing.setdefault((case.op, precision), []).append(case)
                continue
            session.results += [
                selftest.Result(case, precision, name, row["status"], row["fraction_of_allowed"], row["detail"])
                for name, row in zip(session.backends, rows, strict=True)
            ]
    print(f"{len(session.results)} checks are those of the stage correctness", flush=True)
    for (op, precision), todo in missing.items():
        if run.left() <= 0:
            raise OutOfTime(f"{op} {precision}")
        session.check(todo, [precision])


def tune(run: Run) -> None:
    """Checks, then rows of the tuning table, for the selftest's shapes and those of two networks; saved one by one."""
    session = selftest_commands.Session(run.device, selftest.usable(run.device), lambda text: print(text, flush=True))
    every = selftest.precisions(run.device, quick=run.rehearsal)
    _checked(run, session, every)
    for result in session.results:
        if result.bad:
            run.add(f"{result.case.op} {result.precision}, {result.case}", result.backend, status=result.status,
                    reason=result.detail)  # fmt: skip
    run.add("checks", "all", status="right" if session.ok else "wrong", checks=len(session.results))
    if run.rehearsal:
        return
    for case in tuned_cases():
        for dtype in ("bfloat16", "float32"):
            label = f"{case.op} {dtype}, {case}"
            if not run.due(label):
                continue
            before = len(session.times)
            session.time([case], [dtype])
            run.free()
            session.save()
            if len(session.times) == before:
                run.add(label, "all", status="not run", reason="no right numbers, or too little memory to check them")
            for found in session.times[before:]:
                values = {f"{name}_ms": ms for name, ms in found["median_ms"].items()}
                run.add(label, found["direction"], fastest=found["fastest"], **values)
    session.unlock()
    run.add("auto, forward and backward together", "auto", status="right" if session.ok else "wrong")


# --- layers -----------------------------------------------------------------------------------------------------------


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
    """Forward + backward and forward alone. First all that needs no compiler for every shape; then the compiled ones,
    shape by shape, while there is time."""
    from bcosification.evaluation.peer_style import peer_style

    backends = ["auto", *(name for name in selftest.usable(run.device) if name != "reference")]
    dtype = torch.float32 if run.rehearsal else torch.bfloat16
    compiler = {"backend": "eager"} if run.rehearsal else {"mode": "max-autotune-no-cudagraphs"}
    for how in ("", ", max-autotune"):
        for case in layer_cases(run.rehearsal):
            label = f"{case.op} {str(dtype).removeprefix('torch.')}, {case}{how}"
            if not run.due(label, "plain"):
                continue
            plain, ours = (m.to(run.device, dtype, memory_format=torch.channels_last) for m in _layer(case))
            peer = peer_style(nn.Sequential(ours))
            functions: dict[str, Callable] = {"plain": plain}
            if how:
                torch.compiler.reset()
                for name, layer in (("plain", plain), ("peer", peer)):
                    functions[f"{name}-compiled"] = torch.compile(layer, dynamic=False, **compiler)
            else:
                functions["peer"] = peer
                functions |= {f"ours-{name}": _named(ours, name) for name in backends}
            _time_layer(run, label, case, dtype, functions, peer)
            run.free()


def _named(layer: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with selftest.exactly(backend):
            return layer(x)

    forward.parameters = layer.parameters
    return forward


def _time_layer(run: Run, label: str, case, dtype, functions: dict[str, Callable], peer: nn.Module) -> None:
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
    rounds = 2 if run.rehearsal else 15
    both = summarized(interleaved(steps, rounds=rounds, device=run.device))
    alone = summarized(
        interleaved({name: lambda f=functions[name]: f(x) for name in steps}, rounds=rounds, device=run.device)
    )
    for name in reversed(list(steps)):  # plain last: a case counts as measured by it
        extra = {"difference_from_peer": errors[name]} if name in errors else {}
        run.add(label, name, dtype=str(dtype).removeprefix("torch."), **both[name],
                forward_ms=alone[name]["median_ms"], forward_ratio=alone[name]["ratio"], **extra)  # fmt: skip


# --- networks ---------------------------------------------------------------------------------------------------------


def _vit(width: int, heads: int) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=heads, hidden_dim=width, mlp_dim=4 * width
    )


def networks(run: Run) -> None:
    """`bcosification.evaluation.benchmark` of each network: first eager, then compiled contenders; numbers first."""
    import bcosification
    from bcosification.evaluation import benchmark

    if importlib.util.find_spec("torchvision") is None:
        run.add("networks", "all", status="not run", reason="no torchvision here")
        return
    import torchvision

    known = {
        "resnet50": (lambda: torchvision.models.resnet50(), 256),
        "vit_b": (lambda: _vit(768, 12), 128),
        "vit_s": (lambda: _vit(384, 6), 256),
    }
    contenders = {"eager": ("plain", "peer", "ours", "ours-low"), PACKAGE: (),
                  "compiled": ("plain", "plain-compiled", "peer-compiled", "ours-compiled")}  # fmt: skip
    size, rounds, dtypes = 224, 3, ("bfloat16", "float32")
    if run.rehearsal:
        known = {"resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 2)}
        contenders, size, rounds, dtypes = {"eager": ("plain", "ours"), PACKAGE: ()}, 64, 1, ("float32",)
    for how, group in contenders.items():
        if how == PACKAGE:
            for dtype in dtypes:
                for name in [name for name in known if name in NETWORKS]:
                    _of_the_package(run, name, dtype, known[name][1], size, rounds)
            continue
        for dtype in dtypes:
            for name, (make, batch) in known.items():
                label = f"{name}, {dtype}, batch {batch}, {how}"
                if not run.due(label, seconds=0 if run.rehearsal else 60):
                    continue
                run.free()
                torch.manual_seed(0)
                original = make().to(run.device)
                images = torch.rand(batch, 3, size, size, device=run.device)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        converted = bcosification.bcosify(
                            original, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
                        )
                        found = benchmark(
                            original, converted, images, contenders=group, rounds=rounds, dtype=dtype, progress=True
                        )
                except Exception as error:  # of one network
                    run.add(label, "all", status="failed", reason=f"{type(error).__name__}: {first_line(error)}")
                    continue
                print(found, flush=True)
                ran = ", ".join(sorted(set(bcos_kernels.dispatched().values())))
                for row in found.rows:
                    values = {key: value for key, value in row.items() if key not in ("task", "contender", "failed")}
                    if "failed" in row:
                        values |= {"status": "failed", "reason": row["failed"]}
                    elif row["contender"].startswith("ours"):
                        values["backends"] = ran
                    run.add(label, f"{row['contender']}, {row['task']}", **values)
                del original, converted, images


PACKAGE = "package bcos"


def _of_the_package(run: Run, name: str, dtype: str, batch: int, size: int, rounds: int) -> None:
    """The package's own network of that kind, as it is and fused by us, in turn with the plain one. Other networks than
    the converted ones: weights normalised, and its ViTs have no class token. Gradients are compared before times: next
    to the constant of an untrained network's logits the rest is nothing."""
    label = f"{name}, {dtype}, batch {batch}, {PACKAGE}"
    if not run.due(label, seconds=0 if run.rehearsal else 60):
        return
    run.free()
    names = {"plain": "plain", "peer": "bcos", "fused-peer": "bcos, fused"}
    models = Models(name, size)
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    try:
        made = {who: models.build(who).to(run.device) for who in names}
        images = {who: inputs(who, batch, size).to(run.device) for who in names}
        labels = torch.arange(batch, device=run.device)
        error, right = _same_gradients(made["peer"], made["fused-peer"], images["peer"][:4], labels[:4])
        if not right:
            run.add(label, "bcos, fused", status="wrong", difference_from_peer=error)
            return
        tasks = {
            "training": lambda who: Step(made[who].train(), images[who], labels, autocast=autocast),
            "inference": lambda who: partial(inference, made[who].eval(), images[who], autocast=autocast),
            "explanation": lambda who: _explainer(who, made[who].eval(), images[who], autocast),
        }
        for task, prepare in tasks.items():
            runs = {who: prepare(who) for who in names}
            times = interleaved(runs, rounds=rounds, warmup=1, device=run.device)
            for who, values in reversed(summarized(times).items()):  # plain last: a case counts as measured by it
                rate = batch / values["median_ms"] * 1e3
                extra = {"difference_from_peer": error} if who == "fused-peer" else {}
                run.add(label, f"{names[who]}, {task}", images_per_s=rate, **values, **extra)
    except NotHere as error:
        run.add(label, "bcos", status="not run", reason=f"{error.status}: {first_line(error)}")
    except Exception as error:  # of one network
        run.add(label, "bcos", status="failed", reason=f"{type(error).__name__}: {first_line(error)}")


def _same_gradients(peer: nn.Module, fused: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, bool]:
    """How far the gradients of a fused network are from its peer's, and whether that is rounding: below a hundredth, or
    no further from those in float64 than twice what the peer's are."""

    def gradients(model: nn.Module, x: Tensor = images) -> dict[str, Tensor]:
        return Step(copy.deepcopy(model), x, labels).gradients()

    got, expected = gradients(fused), gradients(peer)
    error = gradient_error(got, expected)
    if error < 1e-2:
        return error, True
    exact = gradients(copy.deepcopy(peer).double(), images.double())
    return error, gradient_error(got, exact) <= 2 * gradient_error(expected, exact)


def _explainer(who: str, model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> Callable[[], object]:
    """Of plain the input gradient; of the package image by image, as it explains; fused, in batches."""
    if who == "plain":
        return partial(input_gradient, model, images, autocast=autocast)
    if who == "peer":
        return partial(explain_one_by_one, model, images, autocast=autocast)

    def ours():
        from bcosification.explanation import explain

        with warnings.catch_warnings(), torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            warnings.simplefilter("ignore")  # in 16 bits the sum of the contributions is the logit roughly
            return explain(model, images, batch_size=len(images))

    return ours


# --- sanitizer --------------------------------------------------------------------------------------------------------


def sanitizer(run: Run) -> None:
    """Guard bands and repeats for every backend; then the toolkit's checkers, on a small set of calls."""
    backends = [name for name in selftest.usable(run.device) if name != "reference" or run.rehearsal]
    precision = "float32" if run.rehearsal else "bfloat16"
    repeats = 3 if run.rehearsal else 50
    for backend in backends:
        for case in selftest_cases.cases(quick=run.rehearsal):
            label = f"{case.op} {precision}, {case}"
            run.attempt(f"guard bands: {label}", backend,
                     lambda c=case, b=backend: guarded(c, precision, b, run.device))  # fmt: skip
            run.attempt(f"{repeats} repeats: {label}", backend,
                     lambda c=case, b=backend: repeated(c, precision, b, run.device, repeats))  # fmt: skip
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        run.add("compute-sanitizer", "all", status="not run", reason="no compute-sanitizer here")
        return
    for checker in ("memcheck", "racecheck", "initcheck"):
        for backend in [name for name in backends if name in tuning.KERNELS]:
            run.attempt(checker, backend, lambda t=checker, b=backend: _sanitized(run, tool, t, b))


def _sanitized(run: Run, tool: str, checker: str, backend: str) -> dict:
    log = run.out / f"gpu_{checker}_{backend.replace(':', '_')}.log"
    command = [
        tool, "--tool", checker, "--error-exitcode", "86", "--log-file", str(log), sys.executable, "-m",
        "benchmarks.gpu_guards", backend,
    ]  # fmt: skip
    # no cache of blocks: it would hide what lies outside of a tensor
    status, text = _tool(*command, timeout=max(run.left(), 1), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status == 124:
        raise OutOfTime(f"{checker}, {backend}")
    text = (log.read_text(errors="replace") if log.is_file() else "") + text
    summary = next((line.strip("= ") for line in reversed(text.splitlines()) if "SUMMARY" in line), "")
    if "not supported" in text:
        return {"status": "not run", "reason": "the device refuses it"}
    skipped = [line.removeprefix(SKIPPED) for line in text.splitlines() if line.startswith(SKIPPED)]
    seen = {"skipped": "; ".join(skipped)} if skipped else {}
    if status == 0:
        return {"status": "right", "says": summary[:200], **seen}
    return {"status": "wrong" if status == 86 else "failed", "says": summary[:200] or first_line(text), **seen}
