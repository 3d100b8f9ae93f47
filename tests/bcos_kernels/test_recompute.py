"""recomputed: the same gradients, to the bit, from less memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bcos_kernels
from bcos_kernels import batch_norm_uncentered, conv2d, recomputed
from tests.bcos_kernels import harness
from tests.bcos_kernels.harness import kept_bytes


def normalized(y, weight, bias):
    return batch_norm_uncentered(y, None, weight, bias, training=True, activation="relu")


class Chain:
    """conv → norm and ReLU → conv, the middle recomputed from the first convolution's output."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 6):
        def leaf(*shape, seed):
            return harness.randn(shape, seed, dtype, 0.5).requires_grad_()

        self.x = leaf(3, 5, 8, 9, seed=1)
        self.w1, self.w2 = leaf(width, 5, 1, 1, seed=2), leaf(7, width, 3, 3, seed=3)
        self.weight, self.bias = leaf(width, seed=4), leaf(width, seed=5)
        self.leaves = [self.x, self.w1, self.w2, self.weight, self.bias]
        self.calls = 0

    def again(self, y, weight, bias):
        self.calls += 1
        return normalized(y, weight, bias)

    def forward(self, recompute: bool, middle=lambda z: z):
        y = conv2d(self.x, self.w1)
        z = normalized(y, self.weight, self.bias)
        if recompute:
            z = recomputed(z, self.again, y, self.weight, self.bias)
        return conv2d(middle(z), self.w2)

    def gradients(self, recompute: bool, **options):
        return torch.autograd.grad(self.forward(recompute, **options).square().sum(), self.leaves)


def assert_equal(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_gradients_are_the_same_to_the_bit(dtype, backend):
    chain = Chain(harness.DTYPES[dtype])
    with bcos_kernels.backend(backend):
        assert_equal(chain.gradients(True), chain.gradients(False))
    assert chain.calls == 1  # once for the second convolution and the ReLU's mask together


def test_it_is_not_kept():
    chain = Chain(width=64)
    middle = 3 * 64 * 8 * 9 * 4
    squares = 3 * 8 * 9 * 4  # go with the activation that they are left with
    difference = kept_bytes(lambda: chain.forward(False)) - kept_bytes(lambda: chain.forward(True))
    assert difference == middle + squares


def test_an_output_of_a_layer_and_a_recipe_of_a_recipe():
    """A linear whose own output is recomputed, from an input that is recomputed."""
    x, w1 = harness.randn((9, 6), 1, torch.float32).requires_grad_(), harness.randn((6, 6), 2, torch.float32)
    w2 = harness.randn((12, 6), 3, torch.float32).requires_grad_()
    calls = []

    def first(x):
        calls.append("first")
        return bcos_kernels.linear(x, w1)

    def second(z, w):
        calls.append("second")
        return bcos_kernels.linear(z, w)

    def forward(recompute):
        z = bcos_kernels.linear(x, w1)
        z = recomputed(z, first, x) if recompute else z
        y = bcos_kernels.linear(z, w2)
        y = recomputed(y, second, z, w2) if recompute else y
        return torch.autograd.grad(bcos_kernels.linear(y, torch.ones(3, 12)).sum(), (x, w2))

    assert_equal(forward(True), forward(False))
    assert sorted(calls) == ["first", "second"]


def test_a_concatenation():
    """An op of torch in the middle has no output of ours to let go, but what takes it keeps the parts."""
    parts = [harness.randn((2, c, 5, 5), c, torch.float32).requires_grad_() for c in (3, 4)]
    weight = harness.randn((5, 7, 1, 1), 9, torch.float32).requires_grad_()

    def gradients(recompute):
        x = torch.cat(parts, 1)
        x = recomputed(x, lambda *p: torch.cat(p, 1), *parts) if recompute else x
        return torch.autograd.grad(conv2d(x, weight).square().sum(), [*parts, weight])

    assert_equal(gradients(True), gradients(False))


def test_a_retained_graph_computes_again():
    chain = Chain()
    loss = chain.forward(True).square().sum()
    first = torch.autograd.grad(loss, chain.leaves, retain_graph=True)
    assert_equal(torch.autograd.grad(loss, chain.leaves), first)
    assert chain.calls == 2
    assert_equal(first, chain.gradients(False))


def test_changed_in_place_afterwards_it_is_kept():
    chain = Chain()
    assert_equal(chain.gradients(True, middle=lambda z: z.mul_(2)), chain.gradients(False, middle=lambda z: z * 2))


def test_an_input_changed_in_place_is_an_error():
    chain = Chain()
    loss = chain.forward(True).sum()
    with torch.no_grad():
        chain.weight.add_(1)
    with pytest.raises(RuntimeError, match="in-place operation|inplace operation"):
        loss.backward()


def test_a_second_derivative_is_an_error():
    chain = Chain()
    with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
        torch.autograd.grad(chain.forward(True).sum(), chain.leaves, create_graph=True)


def test_under_autocast():
    chain = Chain()

    def gradients(recompute):
        with torch.autocast("cpu", torch.bfloat16):
            y = chain.forward(recompute)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y.float().square().sum(), chain.leaves)

    assert_equal(gradients(True), gradients(False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_it_does_nothing(reentrant):
    chain = Chain(torch.float64)
    y = checkpoint(lambda x: chain.forward(True), chain.x, use_reentrant=reentrant)
    y.square().sum().backward()
    for leaf, expected in zip(chain.leaves[1:], chain.gradients(False)[1:], strict=True):
        torch.testing.assert_close(leaf.grad, expected)  # there outputs are computed again, from x and w


def test_inside_transforms_and_without_gradients_it_does_nothing():
    chain = Chain(torch.float64)
    with torch.no_grad():
        assert torch.equal(chain.forward(True), chain.forward(False))
    got = torch.func.grad(lambda x: conv2d(recomputed(x * 2, lambda x: x * 2, x), chain.w1).sum())(chain.x.detach())
    expected = torch.autograd.grad(conv2d(chain.x * 2, chain.w1).sum(), chain.x)[0]
    torch.testing.assert_close(got, expected)


def test_compiled_code_ignores_it():
    torch.compiler.reset()
    chain = Chain()
    compiled = torch.compile(lambda: chain.forward(True), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled().square().sum(), chain.leaves)
    torch.testing.assert_close(got, chain.gradients(False))
