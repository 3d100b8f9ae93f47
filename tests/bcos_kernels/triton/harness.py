"""What the Triton tests share: awkward layouts, and running a file of cases in the interpreter."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROOT = Path(__file__).resolve().parents[3]


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Normal values of ``dtype``, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of t in another layout: "contiguous", "channels_last", "strided" (every second element), "transposed"
    (the last two dimensions stored the other way round), "expanded" (the first sample for all), "offset"."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return t[:1].expand_as(t)
    if layout == "offset":  # not aligned to 16 bytes
        flat = torch.cat([t.new_full((1,), float("nan")), t.reshape(-1)])
        return flat[1:].view(t.shape)
    raise ValueError(layout)


@contextlib.contextmanager
def exact_float32():
    """Float32 products in float32 on the GPU too."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def prepare_interpreter() -> None:
    """Bring the interpreter nearer to a GPU in what it computes, and make it several times as fast.

    It truncates to bfloat16: round to nearest. Its sums along a first axis are sequential: add pairwise, as reduction
    trees do. It patches triton.language at every call of a device function (4 ms): do so once a launch. It checks every
    integer operation for overflow: leave that out.
    """
    import dataclasses

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounding(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    interpreter._convert_float = convert_rounding

    def sum_pairwise(self, operand):
        data = operand.handle.data
        if self.axis is not None:
            data = np.ascontiguousarray(np.moveaxis(data, self.axis, -1))
        total = data.sum(axis=None if self.axis is None else -1)
        if self.keep_dims:
            total = np.expand_dims(total, tuple(range(data.ndim)) if self.axis is None else self.axis)
        return self.to_tensor(total, operand.dtype)

    interpreter.ReduceOps.sum = sum_pairwise

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_patching_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        namespace = id(self.fn.__globals__)
        if namespace not in patched:
            patched.add(namespace)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_patching_anew
    interpreter.InterpretedFunction.__call__ = call


def use_descriptors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the kernels of descriptors.py run in the interpreter, in two programs; returns a list of those that have."""
    module = importlib.import_module("bcos_kernels.triton_kernels.descriptors")
    ran: list[str] = []

    def noting(name: str, launch: Callable) -> Callable:
        def launcher(*arguments):
            ran.append(name)
            return launch(*arguments)

        return launcher

    monkeypatch.setattr(module, "architecture", lambda: 90)
    monkeypatch.setattr(module, "multiprocessors", lambda x: 2)
    for name in ("forward", "backward_dx", "backward_dw"):
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    return ran


def run_in_interpreter(cases: str, at_least: int) -> None:
    """Run the tests of file ``cases`` beside this one in a process of their own, in Triton's interpreter.

    Triton decides at its import whether to interpret, for the whole process; other tests need it compiled. Fails with
    the process's own report, also if a test was skipped or fewer than ``at_least`` passed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist",
        "--rootdir", str(ROOT), str(Path(__file__).with_name(cases)),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    passed = re.search(r"(\d+) passed", run.stdout)
    if run.returncode != 0 or not passed or int(passed[1]) < at_least or "skipped" in run.stdout:
        pytest.fail(f"{cases} in Triton's interpreter:\n{run.stdout[-12000:]}\n{run.stderr[-4000:]}", pytrace=False)
