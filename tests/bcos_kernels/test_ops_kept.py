"""What the ops keep between forward and backward: under changes in place, checkpointing and hooks, in bytes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.op_cases import assert_same, leaf, randn, size

# In-place neighbours --------------------------------------------------------------------------------------------------


def block(module, x, weights, residual):
    """conv → in-place addition → in-place ReLU → conv → view → linear → in-place ReLU, as models write it."""
    out = module.conv2d(x, weights[0], padding=1)
    out += residual
    out = F.relu(out, inplace=True)
    out = module.conv2d(out, weights[1], stride=2, normalize_weight=True)
    out.mul_(0.5)
    out = module.linear(out.mean((2, 3)), weights[2])
    return torch.relu_(out)


def block_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        leaf(2, 4, 6, 6, seed=1, dtype=dtype),
        leaf(5, 4, 3, 3, seed=2, dtype=dtype),
        leaf(6, 5, 3, 3, seed=3, dtype=dtype),
        leaf(7, 6, seed=4, dtype=dtype),
        leaf(2, 5, 6, 6, seed=5, dtype=dtype),
    ]


def run_block(function, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    y = function(tensors[0], tensors[1:4], tensors[4])
    return y.detach(), *torch.autograd.grad(y.square().sum(), tensors)


def expected_block() -> tuple[Tensor, ...]:
    exact = [t.detach().double().requires_grad_() for t in block_inputs()]
    return tuple(t.float() for t in run_block(lambda *args: block(reference, *args), exact))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_in_place_neighbours(compiler):
    torch.compiler.reset()

    def function(x, weights, residual):
        return block(bcos_kernels, x, weights, residual)

    if compiler != "eager":
        function = torch.compile(function, backend=compiler, fullgraph=True)
    assert_same(run_block(function, block_inputs()), expected_block())


@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("change", ["+=", "relu_", "fill_", "copy_", "index", "view"])
def test_changes_of_an_output_do_not_reach_its_backward(change, b):
    """The gradient is that of the output as it was, whatever is written over it before the backward."""
    x, weight = leaf(5, 6, seed=1), leaf(4, 6, seed=2)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, z = bcos_kernels.linear(x, weight, b=b), reference.linear(*exact, b=b).clone()
    for out in (y, z):
        if change == "+=":
            out += 3
        elif change == "relu_":
            out.relu_()
        elif change == "fill_":
            with torch.no_grad():
                out.fill_(7.0)
        elif change == "copy_":
            out[:2].copy_(out[2:4].detach() * 2)
        elif change == "index":
            out[1] = 0
        else:
            out.view(2, 10).mul_(2)
    got, expected = torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(z.sum(), exact)
    assert_same(got, tuple(t.float() for t in expected))


def test_changed_inputs_are_an_error():
    """x and the weight are saved as they are; changing them before the backward is noticed as everywhere in torch."""
    x, weight = leaf(5, 6, seed=1), leaf(4, 6, seed=2)
    y = bcos_kernels.linear(x * 1, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_relu_fused_into_the_norm_guards_its_output():
    """y is kept for the mask, as torch's own ReLU does, where it was added to; else x gives the mask."""
    x = leaf(4, 3, 2, 2, seed=1)
    residual = leaf(4, 3, 2, 2, seed=2)
    y = bcos_kernels.batch_norm_uncentered(x, None, training=True, activation="relu", residual=residual)
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    expected = torch.autograd.grad(bcos_kernels.batch_norm_uncentered(x, None, training=True).relu().square().sum(), x)
    y = bcos_kernels.batch_norm_uncentered(x, None, training=True, activation="relu")
    square = y * y.detach().clone() * 2  # the gradient of the square, without y itself
    y.detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(square.sum(), x), expected)
    y = bcos_kernels.batch_norm_uncentered(x, None, training=True)
    y += 1  # without it nothing of y is needed
    y.sum().backward()


@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
def test_a_second_backward(b):
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    y = bcos_kernels.conv2d(x, weight, b=b)
    first = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    y += 1  # from here on y has to be recomputed
    second = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    third = torch.autograd.grad(y.sum(), (x, weight))
    assert_same(second, first)
    assert_same(third, second, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), (x, weight))


# What is kept between forward and backward ----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    expected = run_block(lambda *args: block(bcos_kernels, *args), block_inputs())

    def function(x, weights, residual):
        return checkpoint(
            lambda x, *rest: block(bcos_kernels, x, rest[:3], rest[3]), x, *weights, residual, use_reentrant=reentrant
        )

    tensors = block_inputs()
    y = function(tensors[0], tensors[1:4], tensors[4])
    y.square().sum().backward()  # the reentrant form knows only backward()
    assert_same((y.detach(), *(t.grad for t in tensors)), expected)


def test_under_saved_tensor_hooks_all_that_is_kept_goes_through_them():
    """Offloading sees every tensor: y is not held beside them, but recomputed."""
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    expected = torch.autograd.grad(bcos_kernels.conv2d(x, weight).sum(), (x, weight))
    with torch.autograd.graph.save_on_cpu():
        y = bcos_kernels.conv2d(x, weight)
        kept = weakref.ref(y.untyped_storage())
        total = y.sum()
    del y
    gc.collect()
    assert kept() is None
    assert_same(torch.autograd.grad(total, (x, weight)), expected)


def kept_bytes(function) -> tuple[int, Tensor]:
    """(bytes allocated by ``function`` that are still there after it, what it returned)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), result


KEPT = {  # options, what is kept besides x and y: the norms, pre-scale values (fp16 and general B), winning units
    "b 2": (dict(), torch.float32, dict(n=1)),
    "b 2, normalized": (dict(normalize_weight=True), torch.float32, dict(n=1)),
    "b 2, bf16": (dict(), torch.bfloat16, dict(n=1)),
    "b 2, fp16": (dict(), torch.float16, dict(n=1, a=1)),
    "b 1": (dict(b=1), torch.float32, dict()),
    "b 1.5": (dict(b=1.5), torch.float32, dict(n=1, a=1)),
    "max_out 2": (dict(max_out=2), torch.float32, dict(n=1, index=1)),
    "explaining": (dict(detach=True), torch.float32, dict(n=1)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", KEPT)
def test_bytes_kept_by_a_convolution(case, layout):
    options, dtype, besides = KEPT[case]
    x = harness.lay_out(randn(2, 32, 40, 40, seed=1, dtype=dtype), layout).requires_grad_()
    weight = leaf(32, 32, 3, 3, seed=2, dtype=dtype)

    def forward():
        return bcos_kernels.conv2d(x, weight, padding=1, **options)

    forward()  # what is allocated once and for all
    kept, y = kept_bytes(forward)
    norms = 2 * 40 * 40 * 4
    allowed = (
        size(y) + norms * besides.get("n", 0) + size(y) * besides.get("a", 0) + y.numel() * besides.get("index", 0)
    )
    assert size(y) <= kept <= allowed + 8192, (kept, allowed)


@pytest.mark.parametrize("case", KEPT)
def test_bytes_kept_by_a_linear_layer(case):
    options, dtype, besides = KEPT[case]
    x, weight = leaf(4, 200, 48, seed=1, dtype=dtype), leaf(96, 48, seed=2, dtype=dtype)

    def forward():
        return bcos_kernels.linear(x, weight, **options)

    forward()
    kept, y = kept_bytes(forward)
    norms = 800 * 4
    allowed = (
        size(y) + norms * besides.get("n", 0) + size(y) * besides.get("a", 0) + y.numel() * besides.get("index", 0)
    )
    assert size(y) <= kept <= allowed + 8192, (kept, allowed)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_bytes_kept_by_batch_norm(activation):
    x, residual = leaf(2, 32, 40, 40, seed=1), leaf(2, 32, 40, 40, seed=2)

    def forward():
        return bcos_kernels.batch_norm_uncentered(x, None, training=True, activation=activation, residual=residual)

    forward()
    kept, y = kept_bytes(forward)
    squares = 2 * 40 * 40 * 4  # for the norms of the next layer
    assert size(y) <= kept <= size(y) + squares + 8192


def test_backward_lets_go_of_the_output():
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    y = bcos_kernels.conv2d(x, weight)
    kept = weakref.ref(y.untyped_storage())
    total = y.sum()
    del y
    gc.collect()
    assert kept() is not None  # it is what the backward starts from
    total.backward()
    gc.collect()
    assert kept() is None


def test_a_graph_that_is_never_run_is_freed():
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    y = bcos_kernels.conv2d(x, weight)
    kept = weakref.ref(y.untyped_storage())
    gc.disable()
    try:
        del y
        assert kept() is None  # no cycle of references holds it
    finally:
        gc.enable()


def test_gradients_do_not_share_memory():
    """With one another, nor with a buffer that the next call writes to."""
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 1, 1, seed=2)
    for b, max_out in ((1.0, 1), (2.0, 1), (2.0, 5), (1.5, 1)):

        def grads(scale, b=b, max_out=max_out):
            y = bcos_kernels.conv2d(x, weight, b=b, max_out=max_out)
            return torch.autograd.grad(y.sum() * scale, (x, weight))  # noqa: B023

        first = grads(1.0)
        copies = [g.clone() for g in first]
        second = grads(-3.0)
        assert all(torch.equal(g, c) for g, c in zip(first, copies, strict=True))
        assert len({g.untyped_storage().data_ptr() for g in (*first, *second)}) == 4
