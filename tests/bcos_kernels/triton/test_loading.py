"""Importing the Triton backend costs nothing, and says what is missing."""

import os
import subprocess
import sys

import pytest
import torch

from bcos_kernels import triton_kernels

LAUNCHERS = [
    f"{op}_{direction}"
    for op in ("linear", "conv2d", "batch_norm_uncentered", "conv2d_batch_norm", "linear_gelu", "layer_norm")
    for direction in ("forward", "backward")
]


def _run(program: str, **environment: str) -> str:
    """Output of a Python program in a process that has no TRITON_INTERPRET of ours."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=inherited | environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def test_import_loads_no_triton_and_without_triton_the_reason_is_given():
    out = _run(
        "import sys\n"
        "sys.modules['triton'] = None  # an import of it raises\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "from bcos_kernels import triton_kernels\n"
        "print(triton_kernels.unusable_reason())\n"
        f"for name in {LAUNCHERS}:\n"
        "    try:\n"
        "        getattr(triton_kernels, name)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    lines = out.splitlines()
    assert lines[0] == "triton is not installed (pip install triton; Linux only)"
    assert lines[1:] == [f"{name}: {lines[0]}" for name in LAUNCHERS]


def test_import_compiles_and_imports_nothing():
    out = _run(
        "import sys\n"
        "from bcos_kernels import triton_kernels\n"
        "triton_kernels.unusable_reason()\n"
        "print([m for m in sys.modules if m.startswith('bcos_kernels.triton_kernels.')])\n",
        CUDA_VISIBLE_DEVICES="",
    )
    assert out.strip() == "[]"


def test_reasons_and_devices():
    program = (
        "import torch\nfrom bcos_kernels import triton_kernels as t\n"
        "print(t.unusable_reason(), t.runs_on(torch.device('cpu')), t.runs_on(torch.device('cuda')), sep='|')"
    )
    interpreted = _run(program, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="").strip().split("|")
    compiled = _run(program, CUDA_VISIBLE_DEVICES="").strip().split("|")
    assert interpreted == ["None", "True", "True"]
    assert compiled == ["no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)", "False", "True"]


def test_unknown_name():
    with pytest.raises(AttributeError, match="conv3d_forward"):
        triton_kernels.conv3d_forward  # noqa: B018


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launchers run here")
def test_launchers_are_found_without_a_gpu():
    assert all(callable(getattr(triton_kernels, name)) for name in LAUNCHERS)
    assert set(LAUNCHERS) < set(triton_kernels.__all__)
