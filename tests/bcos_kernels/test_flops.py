"""FlopCounterMode counts the ops as it counts torch's own layers."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bcos_kernels
from tests.bcos_kernels.harness import randn


def counted(function, *tensors: torch.Tensor) -> tuple[int, int]:
    """FLOPs of the forward, and of forward and backward together."""
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        forward = counter.get_total_flops()
        y.sum().backward()
    return forward, counter.get_total_flops()


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [randn(shape, i, torch.float32).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("b, max_out", [(1.0, 1), (2.0, 1), (1.5, 2)])
def test_counts_of_layers_are_those_of_torch_s(b, max_out):
    x, weight = leaves((3, 5, 6), (8, 6))
    got = counted(lambda x, w: bcos_kernels.linear(x, w, b=b, max_out=max_out, normalize_weight=True), x, weight)
    assert got == counted(F.linear, x, weight) == (2 * 15 * 6 * 8, 3 * 2 * 15 * 6 * 8)
    x, weight = leaves((2, 6, 9, 8), (8, 6, 3, 2))
    window = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    got = counted(lambda x, w: bcos_kernels.conv2d(x, w, **window, b=b, max_out=max_out), x, weight)
    assert got == counted(lambda x, w: F.conv2d(x, w, **window), x, weight)


def test_groups_and_gradients_that_nobody_needs():
    x, weight = leaves((2, 6, 5, 5), (6, 1, 3, 3))
    forward = counted(lambda x: F.conv2d(x, weight.detach(), groups=6), x)[0]
    assert forward == 2 * 2 * 9 * 6 * 9
    got = counted(lambda x: bcos_kernels.conv2d(x, weight.detach(), groups=6), x)
    assert got == (forward, 2 * forward)  # no gradient of the weight
    # torch takes the groups' channels for one group's in the weight's gradient
    assert counted(lambda x, w: bcos_kernels.conv2d(x, w, groups=6), x, weight) == (forward, 3 * forward)


@pytest.mark.parametrize("b, again", [(1.0, 0), (2.0, 1), (1.5, 0)])
def test_what_is_computed_again_is_counted_again(b, again):
    """An output changed in place: at B = 1 nothing of it is needed, at B = 1.5 the pre-scale outputs are kept."""
    x, weight = leaves((4, 6), (8, 6))
    forward, both = counted(lambda x, w: bcos_kernels.linear(x, w, b=b).mul_(2.0), x, weight)
    assert both == (3 + again) * forward


def test_a_network_s_table_names_the_ops():
    x, weight, scale = leaves((2, 3, 5, 5), (4, 3, 3, 3), (4,))

    def network(x, weight, scale):
        return bcos_kernels.batch_norm_uncentered(bcos_kernels.conv2d(x, weight), None, scale, training=True)

    with FlopCounterMode(display=False) as counter:
        network(x, weight, scale).sum().backward()
    ops = torch.ops.bcos_kernels
    forward = 2 * 2 * 9 * 4 * 27
    assert counter.get_flop_counts()["Global"] == {
        ops.conv2d: forward,
        ops.conv2d_backward: 2 * forward,
        ops.batch_norm_uncentered: 0,
        ops.batch_norm_uncentered_backward: 0,
    }


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("recompute, again", [(None, 0), ("inner", 1)])
def test_a_convolution_with_its_norm_counts_as_the_convolution(recompute, again, layout):
    x, weight = leaves((2, 6, 9, 8), (8, 6, 3, 2))
    window = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2))

    def function(x, weight):
        x = x.contiguous(memory_format=layout)
        return bcos_kernels.conv2d_batch_norm(x, weight, **window, running_var=None, training=True, recompute=recompute)

    forward, both = counted(lambda x, w: F.conv2d(x, w, **window), x, weight)
    assert counted(function, x, weight) == (forward, both + again * forward)


@pytest.mark.parametrize("first", ["bcos_kernels", "torch.utils.flop_counter"])
def test_formulas_are_there_whatever_is_imported_first(first):
    """And the counter, with Triton behind it, is not imported for them."""
    program = (
        f"import sys, torch, {first}\n"
        "import bcos_kernels\n"
        f"assert ('torch.utils.flop_counter' in sys.modules) == {first != 'bcos_kernels'}\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "print(sum(str(op).startswith('bcos_kernels.') for op in flop_registry))\n"
        "assert not any(type(finder).__module__ == 'bcos_kernels.flops' for finder in sys.meta_path)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "12"
