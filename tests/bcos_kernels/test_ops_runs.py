"""Runs of the ops: repeated, on any number of threads, from several, on more than 2³¹ elements."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.op_cases import FUNCTIONS, assert_same, leaf, randn
from tests.bcos_kernels.tolerances import assert_close_to_reference


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_runs_repeat_bit_for_bit(layout):
    x = harness.lay_out(randn(4, 16, 20, 20, seed=1), layout).requires_grad_()
    weight, scale = leaf(24, 16, 3, 3, seed=2), leaf(24, seed=3)
    b = torch.tensor(1.6, requires_grad=True)

    def run():
        y = bcos_kernels.conv2d(x, weight, padding=1, normalize_weight=True, b=b)
        y = bcos_kernels.batch_norm_uncentered(y, None, scale, training=True, activation="relu")
        y = bcos_kernels.linear(y.mean((2, 3)), torch.ones(3, 24), b=1.5)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, b, scale))

    first = run()
    for _ in range(5):
        for mine, theirs in zip(run(), first, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_number_of_threads(layout):
    """Work split over more threads than the machine has cores: the same numbers, but for the order of sums."""
    shape = (4, 24, 32, 32)
    x, dy = harness.lay_out(randn(*shape, seed=1), layout), harness.lay_out(randn(*shape, seed=4), layout)
    leaves = [x, randn(24, 24, 3, 3, seed=2), 1 + 0.1 * randn(24, seed=3), randn(30, 24, seed=5)]

    def run(module, leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = module.conv2d(leaves[0], leaves[1], padding=1, normalize_weight=True)
        y = module.batch_norm_uncentered(y, None, leaves[2], training=True, activation="relu")
        z = module.linear(y.permute(0, 2, 3, 1), leaves[3], b=1.5)
        return z.detach(), *torch.autograd.grad([y, z], leaves, [dy.to(y.dtype), torch.ones_like(z)])

    expected = run(reference, [t.double() for t in leaves])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with bcos_kernels.backend("cpu"):
                got = run(bcos_kernels, leaves)
            for mine, theirs in zip(got, expected, strict=True):
                assert_close_to_reference(f"{count} threads", mine, None, theirs, torch.float32)
    finally:
        torch.set_num_threads(threads)


def test_from_several_python_threads():
    """Concurrent layers of different sizes do not disturb one another."""

    def run(seed: int) -> tuple[Tensor, ...]:
        x, weight = leaf(2, 4, 6 + seed, 6, seed=seed), leaf(5, 4, 3, 3, seed=2)
        y = bcos_kernels.conv2d(x, weight, b=2.0 if seed % 2 else 1.5)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))

    expected = [run(seed) for seed in range(6)]
    found: dict[int, list] = {seed: [] for seed in range(6)}

    def work(seed: int) -> None:
        for _ in range(10):
            found[seed].append(run(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed in range(6):
        assert len(found[seed]) == 10
        for results in found[seed]:
            assert_same(results, expected[seed], 1e-6)


def test_an_empty_batch_is_a_process_s_first():
    """Nothing of an earlier layer is there that a backward could do with."""
    program = (
        "import torch, bcos_kernels\n"
        "from bcos_kernels import batch_norm_uncentered, conv2d, conv2d_batch_norm, linear\n"
        "weight = torch.randn(2, 3, requires_grad=True)\n"
        "kernel = torch.randn(2, 3, 1, 1, requires_grad=True)\n"
        "image = torch.empty(0, 3, 4, 4).to(memory_format=torch.channels_last)\n"
        "for b in (2.0, 1.5):\n"
        "    linear(torch.empty(0, 3), weight, b=b).sum().backward()\n"
        "    conv2d(image, kernel, b=b).sum().backward()\n"
        "    conv2d_batch_norm(image, kernel, b=b, running_var=torch.ones(2), training=False).sum().backward()\n"
        "assert not weight.grad.any() and not kernel.grad.any()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, (run.returncode, run.stderr)


def _needs_memory(gibibytes: float):
    """Skips where less is available (Linux tells; elsewhere it is tried)."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    except OSError:
        return
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of memory, {free:.1f} are available")


@pytest.mark.slow
@pytest.mark.parametrize("op", FUNCTIONS)
def test_more_than_two_billion_elements(op):
    """Offsets are 64 bits wide: an output of more than 2³¹ elements, of which only the last ones are compared."""
    _needs_memory(11)
    units = 2**11
    weight = randn(units, 4, seed=2, dtype=torch.bfloat16)
    x = randn(2**20 + 5, 4, seed=1, dtype=torch.bfloat16)
    assert len(x) * units > 2**31
    with torch.no_grad(), bcos_kernels.backend("cpu"):
        if op == "linear":
            tail = bcos_kernels.linear(x, weight)[-3:].clone()
        else:
            x = x[: 2**20 + 2]
            image = x.view(2, -1, 1, 4).permute(0, 3, 1, 2)  # channels_last
            y = bcos_kernels.conv2d(image, weight.view(units, 4, 1, 1))
            assert y.numel() > 2**31
            tail = y[-1, :, -3:, 0].t().clone()
    wide = x[-3:].double()
    if op == "linear":
        expected = reference.linear(wide, weight.double())
    else:
        expected = reference.conv2d(wide.t()[None, :, :, None], weight.double().view(units, 4, 1, 1))[0, :, :, 0].t()
    assert_close_to_reference("y", tail, None, expected, torch.bfloat16)
