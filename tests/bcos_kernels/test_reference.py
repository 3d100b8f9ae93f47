"""The reference itself: against cases worked out by hand, against the peer package `bcos` 0.1.3, and its written-out
gradients against autograd through its definitions."""

from __future__ import annotations

import math

import bcos.modules
import bcos.modules.norms
import pytest
import torch
from torch import Tensor

from bcos_kernels import reference
from tests.bcos_kernels import harness


def doubles(*values, grad: bool = False) -> Tensor:
    return torch.tensor(*values, dtype=torch.float64, requires_grad=grad)


def assert_equal(name: str, got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    difference, norm = (got - expected).norm().item(), expected.norm().item()
    assert difference <= tolerance * norm, f"{name}: {got}, expected {expected} (error {difference / (norm or 1):.3g})"


# By hand --------------------------------------------------------------------------------------------------------------


class TestLinearByHand:
    """x = (3, 4), so n = 5 but for 1e-12; weights (1, 0) and (0, 2)."""

    x = [[3.0, 4.0]]
    weight = [[1.0, 0.0], [0.0, 2.0]]

    def test_values(self):
        x, weight = doubles(self.x), doubles(self.weight)
        # a = (3, 8); B = 2: (3·3/5, 8·8/5)
        assert_equal("b 2", reference.linear(x, weight), doubles([[1.8, 12.8]]))
        # normalized: a = (3, 4): (9/5, 16/5)
        assert_equal("normalized", reference.linear(x, weight, normalize_weight=True), doubles([[1.8, 3.2]]))
        assert_equal("b 1", reference.linear(x, weight, b=1), doubles([[3.0, 8.0]]))
        # B = 3: 3·(3/5 + 1e-6)² = 3·0.360001200001, 8·(8/5 + 1e-6)² = 8·2.560003200001
        assert_equal("b 3", reference.linear(x, weight, b=3), doubles([[1.080003600003, 20.480025600008]]))
        # the general form at B = 2: 3·(3/5 + 1e-6)
        assert_equal("b tensor", reference.linear(x, weight, b=doubles(2.0)), doubles([[1.800003, 12.800008]]))
        # bias (−4, 2): a = (−1, 10): the sign of a is kept
        assert_equal("bias", reference.linear(x, weight, doubles([-4.0, 2.0])), doubles([[-0.2, 20.0]]))
        # max_out 2: the larger of 3 and 8
        assert_equal("max_out", reference.linear(x, weight, max_out=2), doubles([[12.8]]))

    def test_gradients(self):
        x, weight = doubles(self.x, grad=True), doubles(self.weight[:1], grad=True)
        dx, dw = torch.autograd.grad(reference.linear(x, weight).sum(), (x, weight))
        # ∂y/∂a = 2·3/5 = 6/5, ∂y/∂n = −9/25, ∂n/∂x = (3/5, 4/5): dx = 6/5·(1, 0) − 9/25·(3/5, 4/5), dw = 6/5·(3, 4)
        assert_equal("dx", dx, doubles([[0.984, -0.288]]))
        assert_equal("dw", dw, doubles([[3.6, 4.8]]))
        # explaining: the scale 3/5 is a constant: dx = 3/5·(1, 0), dw = 3/5·(3, 4)
        dx, dw = torch.autograd.grad(reference.linear(x, weight, detach=True).sum(), (x, weight))
        assert_equal("dx, detach", dx, doubles([[0.6, 0.0]]))
        assert_equal("dw, detach", dw, doubles([[1.8, 2.4]]))

    def test_gradient_through_the_weight_norm(self):
        x, weight = doubles(self.x, grad=True), doubles([[2.0, 0.0]], grad=True)
        dx, dw = torch.autograd.grad(reference.linear(x, weight, normalize_weight=True).sum(), (x, weight))
        # ŵ = (1, 0), dŵ = 6/5·(3, 4); dw = (dŵ − ŵ(ŵ·dŵ))/2 = (0, 24/5)/2
        assert_equal("dw", dw, doubles([[0.0, 2.4]]))
        assert_equal("dx", dx, doubles([[0.984, -0.288]]))

    def test_gradient_of_b(self):
        b = doubles(3.0, grad=True)
        (db,) = torch.autograd.grad(reference.linear(doubles(self.x), doubles(self.weight[:1]), b=b).sum(), b)
        # y log c, c = 3/5 + 1e-6
        assert_equal("db", db, doubles(1.080003600003 * math.log(0.600001)))

    def test_second_derivative(self):
        # K = 1: y = (w x)²·sign/|x| = w|w| x for w, x > 0: y_xx = 0, y_ww = 2x, y_xw = 2w
        x, weight = doubles([[3.0]], grad=True), doubles([[0.5]], grad=True)
        dx, dw = torch.autograd.grad(reference.linear(x, weight).sum(), (x, weight), create_graph=True)
        xx, xw = torch.autograd.grad(dx.sum(), (x, weight), retain_graph=True)
        (ww,) = torch.autograd.grad(dw.sum(), weight)
        assert xx.abs().item() < 1e-10
        assert_equal("y_xw", xw, doubles([[1.0]]), 1e-10)
        assert_equal("y_ww", ww, doubles([[6.0]]), 1e-10)


class TestConv2dByHand:
    """A 2×2 image of one channel (2 at the bottom right, else 1, 1, 0) under a 2×2 window."""

    x = [[[[1.0, 1.0], [0.0, 2.0]]]]
    weight = [[[[1.0, 0.0], [0.0, 1.0]]]]
    n = math.sqrt(6 + 1e-6)  # Σ p² = 1 + 1 + 0 + 4

    def test_values(self):
        x, weight = doubles(self.x), doubles(self.weight)
        # a = 1 + 2 = 3
        assert_equal("b 2", reference.conv2d(x, weight), doubles([[[[9 / self.n]]]]))
        assert_equal("b 1", reference.conv2d(x, weight, b=1), doubles([[[[3.0]]]]))
        assert_equal("b 1.5", reference.conv2d(x, weight, b=1.5), doubles([[[[3 * (3 / self.n + 1e-6) ** 0.5]]]]))
        # ‖w‖ = √2: a = 3/√2
        normalized = reference.conv2d(x, weight, normalize_weight=True)
        assert_equal("normalized", normalized, doubles([[[[4.5 / self.n]]]]))
        assert_equal("unbatched", reference.conv2d(x[0], weight), doubles([[[9 / self.n]]]))

    def test_padding_and_stride(self):
        # padding 1, stride 2: the four windows hold one pixel each, at the corner (1 − row, 1 − column) of the kernel:
        # weights 1 (for the pixel 1 at the top left, and the 2), 0 and 0
        y = reference.conv2d(doubles(self.x), doubles(self.weight), stride=2, padding=1)
        assert_equal("y", y, doubles([[[[1 / math.sqrt(1 + 1e-6), 0.0], [0.0, 4 / math.sqrt(4 + 1e-6)]]]]))

    def test_padding_modes_count_what_is_padded(self):
        # one row (1, 2), a 1×3 window of ones with padding 1
        x, weight = doubles([[[[1.0, 2.0]]]]), doubles([[[[1.0, 1.0, 1.0]]]])
        for mode, patches in (
            ("zeros", ((0, 1, 2), (1, 2, 0))),
            ("reflect", ((2, 1, 2), (1, 2, 1))),
            ("replicate", ((1, 1, 2), (1, 2, 2))),
            ("circular", ((2, 1, 2), (1, 2, 1))),
        ):
            expected = [sum(p) ** 2 / math.sqrt(sum(v * v for v in p) + 1e-6) for p in patches]
            y = reference.conv2d(x, weight, padding=(0, 1), padding_mode=mode)
            assert_equal(mode, y, doubles([[[expected]]]))

    def test_same_puts_the_extra_zero_last(self):
        # a 1×2 window with padding "same" sees (1, 2) and (2, 0)
        y = reference.conv2d(doubles([[[[1.0, 2.0]]]]), doubles([[[[1.0, 1.0]]]]), padding="same")
        assert_equal("y", y, doubles([[[[9 / math.sqrt(5 + 1e-6), 4 / math.sqrt(4 + 1e-6)]]]]))

    def test_every_group_has_its_norm(self):
        # channels 3 and 4 as groups: y = 3·3/3 and 4·4/4 (times the weights 1 and −2), not over the common norm 5
        x, weight = doubles([[[[3.0]], [[4.0]]]]), doubles([[[[1.0]]], [[[-2.0]]]])
        expected = doubles([[[[9 / math.sqrt(9 + 1e-6)]], [[-64 / math.sqrt(16 + 1e-6)]]]])
        assert_equal("y", reference.conv2d(x, weight, groups=2), expected)

    def test_dilation(self):
        # taps 0 and 2 of (1, 5, 2): the pixel between is not in the patch
        y = reference.conv2d(doubles([[[[1.0, 5.0, 2.0]]]]), doubles([[[[1.0, 1.0]]]]), dilation=(1, 2))
        assert_equal("y", y, doubles([[[[9 / math.sqrt(5 + 1e-6)]]]]))

    def test_gradients(self):
        x, weight = doubles(self.x, grad=True), doubles(self.weight, grad=True)
        dx, dw = torch.autograd.grad(reference.conv2d(x, weight).sum(), (x, weight))
        # ∂y/∂a = 6/n, ∂y/∂n = −9/n²: dx = 6/n·w − 9/n³·x, dw = 6/n·x
        n = self.n
        assert_equal("dx", dx, doubles([[[[6 / n - 9 / n**3, -9 / n**3], [0.0, 6 / n - 18 / n**3]]]]))
        assert_equal("dw", dw, doubles(self.x) * 6 / n)
        dx, dw = torch.autograd.grad(reference.conv2d(x, weight, detach=True).sum(), (x, weight))
        assert_equal("dx, detach", dx, doubles(self.weight) * 3 / n)
        assert_equal("dw, detach", dw, doubles(self.x) * 3 / n)


class TestBatchNormByHand:
    """One channel with the values 1 and 3: biased variance 1; eps = 3: σ = 2."""

    def test_values(self):
        running_var = doubles([5.0])
        y = reference.batch_norm_uncentered(doubles([[1.0], [3.0]]), running_var, training=True, eps=3.0)
        assert_equal("y", y, doubles([[0.5], [1.5]]))  # divided by 2, not centred
        assert_equal("running_var", running_var, doubles([0.9 * 5 + 0.1 * 1]))
        y = reference.batch_norm_uncentered(doubles([[1.0], [3.0]]), doubles([13.0]), training=False, eps=3.0)
        assert_equal("eval", y, doubles([[0.25], [0.75]]))
        options = dict(training=True, eps=3.0, weight=doubles([4.0]), bias=doubles([-3.0]))
        x, residual = doubles([[1.0], [3.0]]), doubles([[0.0], [-1.0]])
        y = reference.batch_norm_uncentered(x, None, **options)
        assert_equal("affine", y, doubles([[-1.0], [3.0]]))  # 4·(0.5, 1.5) − 3
        y = reference.batch_norm_uncentered(x, None, **options, residual=residual, activation="relu")
        assert_equal("relu", y, doubles([[0.0], [2.0]]))

    def test_gradients(self):
        x = doubles([[1.0], [3.0]], grad=True)
        dy = doubles([[1.0], [0.0]])
        y = reference.batch_norm_uncentered(x, None, training=True, eps=3.0)
        # dx = g/σ − (Σ g x)/σ³·(x − mean)/2: (1/2 − 1/8·(−1)/2, −1/8·1/2)
        assert_equal("dx", torch.autograd.grad(y, x, dy)[0], doubles([[0.5625], [-0.0625]]))
        y = reference.batch_norm_uncentered(x, None, training=True, eps=3.0, detach=True)
        assert_equal("dx, detach", torch.autograd.grad(y, x, dy)[0], doubles([[0.5], [0.0]]))


class TestLayerNormByHand:
    """A row of the values 1, 1 and 4: mean 2, biased variance 2; eps = 2: σ = 2."""

    def test_values(self):
        x = doubles([[1.0, 1.0, 4.0]])
        assert_equal("y", reference.layer_norm(x, 3, eps=2.0), doubles([[-0.5, -0.5, 1.0]]))
        y = reference.layer_norm(x, (3,), doubles([2.0, 4.0, 1.0]), doubles([1.0, 0.0, -1.0]), 2.0)
        assert_equal("affine", y, doubles([[0.0, -2.0, 0.0]]))
        y = reference.layer_norm(x.t().unsqueeze(0), 3, eps=2.0, channels_first=True)
        assert_equal("channels first", y, doubles([[[-0.5], [-0.5], [1.0]]]))

    def test_gradients(self):
        x, dy = doubles([[1.0, 1.0, 4.0]], grad=True), doubles([[3.0, 0.0, 0.0]])
        y = reference.layer_norm(x, 3, eps=2.0)
        # (g − 1 − x̂·mean of g·x̂)/2, x̂ = (−1/2, −1/2, 1), mean of g·x̂ = −1/2
        assert_equal("dx", torch.autograd.grad(y, x, dy)[0], doubles([[0.875, -0.625, -0.25]]))
        y = reference.layer_norm(x, 3, eps=2.0, detach=True)
        assert_equal("dx, detach", torch.autograd.grad(y, x, dy)[0], doubles([[1.0, -0.5, -0.5]]))


# Where the formulas have holes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5, 3.0])
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_zero_patches(op, b, dtype):
    """y = 0, and finite gradients of first and second order; nothing flows through the norm at 0."""
    dtype = harness.DTYPES[dtype]
    shape, weight_shape = ((3, 4), (5, 4)) if op == "linear" else ((3, 4, 3, 3), (5, 4, 3, 3))
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    weight = harness.randn(weight_shape, 1, dtype).requires_grad_()
    y = getattr(reference, op)(x, weight, b=b, normalize_weight=True)
    assert not y.any()
    first = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    assert all(torch.isfinite(g).all() for g in first) and not first[1].any()
    second = torch.autograd.grad(sum(g.sum() for g in first), (x, weight))
    assert all(torch.isfinite(g).all() for g in second)
    # c = 1e-6 (0 in the special form B = 2): dx = Σ_o c^(B−1) ŵ_o
    factor = 1.0 if b == 1 else 0.0 if b == 2 else 1e-6 ** (b - 1)
    w_hat = reference.normalized_weight(weight.detach().double())
    expected = (factor * w_hat.sum(0)).to(dtype).double()  # float16 has no 1e-12
    assert_equal("dx", first[0].double()[0].flatten(), expected.flatten(), 1e-2)


def test_gradient_of_the_norm_at_zero():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(reference.linear_norm(x).sum(), x, create_graph=True)
    assert not first.any()
    (second,) = torch.autograd.grad(first.sum(), x)
    assert not second.any()


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_zero_units(op):
    """A weight of norm 0 is ŵ = 0 with ∂L/∂w = 0, in its neighbours' company."""
    shape, weight_shape = ((3, 4), (5, 4)) if op == "linear" else ((3, 4, 3, 3), (5, 4, 3, 3))
    x, weight = harness.randn(shape, 1, torch.float64), harness.randn(weight_shape, 2, torch.float64)
    weight[1] = 0
    x.requires_grad_(), weight.requires_grad_()
    y = getattr(reference, op)(x, weight, normalize_weight=True)
    first = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))
    assert not y[:, 1].any() and not first[1][1].any() and not second[1][1].any()
    others = [0, 2, 3, 4]
    kept = weight.detach()[others].requires_grad_()
    z = getattr(reference, op)(x, kept, normalize_weight=True)
    expected = torch.autograd.grad(z.sum(), (x, kept))
    assert_equal("y", y[:, others], z)
    assert_equal("dx", first[0], expected[0])
    assert_equal("dw", first[1][others], expected[1])


@pytest.mark.parametrize("op", ["linear", "conv2d"])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
def test_ties_give_the_gradient_to_the_first_unit(b, op):
    shape, weight_shape = ((3, 4), (3, 4)) if op == "linear" else ((3, 4, 3, 3), (3, 4, 3, 3))
    # whole numbers, of which products are exact in whatever order a library sums them
    x, w = harness.integers(shape, 1, torch.float64), harness.signs(weight_shape, 2, torch.float64)
    doubled = w.repeat_interleave(2, dim=0).requires_grad_()
    single = w.clone().requires_grad_()
    y, expected = getattr(reference, op)(x, doubled, b=b, max_out=2), getattr(reference, op)(x, single, b=b)
    assert_equal("y", y, expected)
    (dw,), (dw_single,) = torch.autograd.grad(y.sum(), doubled), torch.autograd.grad(expected.sum(), single)
    assert_equal("first", dw[::2], dw_single)
    assert not dw[1::2].any()


@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
def test_nan(b):
    x, weight = harness.randn((3, 4), 1, torch.float64), harness.randn((6, 4), 2, torch.float64)
    x[1, 2] = float("nan")
    for options in (dict(), dict(max_out=2), dict(normalize_weight=True)):
        y = reference.linear(x, weight, b=b, **options)
        assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()
    image, kernel = harness.randn((2, 3, 4, 4), 1, torch.float64), harness.randn((2, 3, 2, 2), 2, torch.float64)
    image[0, 1, 0, 0] = float("nan")
    y = reference.conv2d(image, kernel, b=b)
    assert y[0, :, 0, 0].isnan().all() and y.isnan().sum() == 2


def test_empty():
    assert reference.linear(torch.zeros(0, 4), torch.ones(6, 4), max_out=2).shape == (0, 3)
    assert reference.conv2d(torch.zeros(0, 4, 5, 5), torch.ones(6, 4, 3, 3), max_out=2).shape == (0, 3, 3, 3)


def test_large_values_in_float16():
    """The norm is taken in float32: 1e4 squared is beyond float16."""
    x, weight = torch.full((1, 64), 1e4, dtype=torch.float16), torch.full((1, 64), 1 / 64, dtype=torch.float16)
    assert_equal("y", reference.linear(x, weight).double(), doubles([[1e4 / 8]]), 1e-3)


# Against the peer -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "1x1": dict(kernel_size=1),
    "3x3": dict(kernel_size=3, padding=1),
    "7x7, stride 2": dict(kernel_size=7, stride=2, padding=3),
    "oblong": dict(kernel_size=(3, 1), padding=(1, 0), stride=(1, 2)),
    "groups": dict(kernel_size=3, padding=1, groups=2),
    "depthwise": dict(kernel_size=3, groups=4, out_channels=4),
    "dilation": dict(kernel_size=3, padding=2, dilation=2),
    "max_out": dict(kernel_size=3, padding=1, max_out=2),
    "groups, max_out": dict(kernel_size=3, groups=2, max_out=3),
    "b 1": dict(kernel_size=3, b=1),
    "b 1.25": dict(kernel_size=3, padding=1, b=1.25),
    "b 3, max_out": dict(kernel_size=3, padding=1, b=3, max_out=2),
}


@pytest.mark.filterwarnings("ignore:dilation > 1")
@pytest.mark.parametrize("explaining", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_against_the_peer(case, explaining):
    options = dict(CONVOLUTIONS[case])
    peer = bcos.modules.BcosConv2d(4, options.pop("out_channels", 6), **options).double()
    peer.set_explanation_mode(explaining)
    x = harness.randn((2, 4, 11, 12), 1, torch.float64).requires_grad_()
    weight = peer.linear.weight
    expected = peer(x)
    options.pop("kernel_size")
    y = reference.conv2d(x, weight, **{"b": 2, **options}, normalize_weight=True, detach=explaining)
    _compare(y, expected, x, weight)


def _compare(y: Tensor, expected: Tensor, x: Tensor, weight: Tensor, tolerance: float = 1e-12) -> None:
    direction = harness.randn(tuple(expected.shape), 9, torch.float64)
    assert_equal("y", y, expected, tolerance)
    for name, got, other in zip(
        ("dx", "dw"),
        torch.autograd.grad(y, (x, weight), direction),
        torch.autograd.grad(expected, (x, weight), direction),
        strict=True,
    ):
        assert_equal(name, got, other, 10 * tolerance)


@pytest.mark.parametrize("explaining", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("b", [1, 2, 1.25, 3])
@pytest.mark.parametrize("max_out", [1, 3])
def test_linear_against_the_peer(max_out, b, explaining):
    peer = bcos.modules.BcosLinear(7, 5, b=b, max_out=max_out).double()
    peer.set_explanation_mode(explaining)
    x = harness.randn((2, 6, 7), 1, torch.float64).requires_grad_()
    weight = peer.linear.weight
    y = reference.linear(x, weight, b=b, normalize_weight=True, max_out=max_out, detach=explaining)
    _compare(y, peer(x), x, weight)


def test_learnable_b_against_the_peer():
    peer = bcos.modules.BcosLinear(7, 5, b=1.75).double()
    peer.b = torch.nn.Parameter(doubles(1.75))
    x = harness.randn((6, 7), 1, torch.float64)
    y = reference.linear(x, peer.linear.weight, b=peer.b, normalize_weight=True)
    (db,), (db_peer,) = torch.autograd.grad(y.sum(), peer.b), torch.autograd.grad(peer(x).sum(), peer.b)
    assert_equal("db", db, db_peer)


def test_nothing_flows_to_b_when_explaining():
    """Where the peer's learnable B has a gradient."""
    b = doubles(1.75, grad=True)
    x, weight = harness.randn((6, 7), 1, torch.float64).requires_grad_(), harness.randn((3, 7), 2, torch.float64)
    y = reference.linear(x, weight, b=b, detach=True)
    assert torch.autograd.grad(y.sum(), b, allow_unused=True) == (None,)


@pytest.mark.parametrize("explaining", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "batch"])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_against_the_peer(bias, training, explaining):
    peer = bcos.modules.norms.BatchNormUncentered2d(5).double().train(training)
    with torch.no_grad():
        peer.weight.copy_(1 + harness.randn((5,), 2, torch.float64, 0.3))
        peer.bias.copy_(harness.randn((5,), 3, torch.float64))
        peer.running_var.copy_(harness.randn((5,), 4, torch.float64).square() + 0.5)
    if not bias:
        peer.bias = None
    peer.set_explanation_mode(explaining)
    x = (harness.randn((4, 5, 3, 3), 1, torch.float64) + 1).requires_grad_()
    running_var = peer.running_var.clone()
    y = reference.batch_norm_uncentered(
        x, running_var, peer.weight, peer.bias, training=training, detach=explaining
    )  # fmt: skip
    _compare(y, peer(x), x, peer.weight)
    assert_equal("running_var", running_var, peer.running_var)


# The written-out gradients, which every backend has, against autograd through the definitions ------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5, "tensor"])
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_written_out_gradients(op, b, max_out, normalize, detach, recompute):
    b_tensor = doubles(1.7, grad=True) if b == "tensor" else None
    exponent = 0.0 if b == "tensor" else b
    shape, weight_shape = ((7, 6), (8, 6)) if op == "linear" else ((2, 6, 7, 8), (8, 3, 3, 2))
    window = () if op == "linear" else ((2, 1), (1, 2), (1, 2), 2)
    x, weight = harness.randn(shape, 1, torch.float64), harness.randn(weight_shape, 2, torch.float64)
    bias = harness.randn((8,), 3, torch.float64)
    x[0] = 0  # a zero patch or row; its bias is
    bias[:4] = 0
    leaves = [t.requires_grad_() for t in (x, weight, bias)] + ([b_tensor] if b == "tensor" else [])

    y = getattr(reference, op)(
        x, weight, bias, *window, b=b_tensor if b == "tensor" else b, normalize_weight=normalize, max_out=max_out,
        detach=detach,
    )  # fmt: skip
    dy = harness.randn(tuple(y.shape), 4, torch.float64)
    if op == "linear":
        dy[0] = 0  # y = β|β|/1e-12 there
    expected = torch.autograd.grad(y, leaves, dy, allow_unused=True)

    with torch.no_grad():
        options = (exponent, b_tensor, normalize, max_out)
        out, n, a, index = getattr(reference, f"{op}_forward")(x, weight, bias, *window, *options, True)
        assert_equal("y", out, y)
        held = (None, n, a[:0] if b != "tensor" and b in (1, 2) else a, index) if recompute else (out, n, a, index)
        got = getattr(reference, f"{op}_backward")(
            dy, x, weight, bias, *window, *options[:2], *held, *options[2:], detach, True, True, True, b == "tensor"
        )
    for name, mine, theirs in zip(("dx", "dw", "dbias", "db"), got, expected, strict=False):
        if theirs is None:
            assert name == "db" and not mine.any()
        else:
            assert_equal(name, mine, theirs)


@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "batch"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_written_out_gradients_of_batch_norm(activation, training, detach):
    x = harness.randn((3, 4, 5, 2), 1, torch.float64) + 0.5
    weight, bias = 1 + harness.randn((4,), 2, torch.float64, 0.3), harness.randn((4,), 3, torch.float64)
    residual, running_var = harness.randn((3, 4, 5, 2), 5, torch.float64), doubles([0.5, 1.0, 2.0, 3.0])
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y = reference.batch_norm_uncentered(
        x, running_var.clone(), weight, bias, training=training, activation=activation, residual=residual,
        detach=detach,
    )  # fmt: skip
    dy = harness.randn(tuple(y.shape), 4, torch.float64)
    expected = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        out, mean, var = reference.batch_norm_uncentered_forward(
            x, weight, bias, residual, None if training else running_var, training, 1e-5, activation
        )
        got = reference.batch_norm_uncentered_backward(
            dy, x, out, weight, bias, mean, var, training, 1e-5, activation, detach, True, True, True, True
        )
    assert_equal("y", out, y)
    if training:
        assert_equal("mean", mean, x.mean((0, 2, 3)))
        assert_equal("var", var, x.var((0, 2, 3), unbiased=False))
    for name, mine, theirs in zip(("dx", "dweight", "dbias", "dresidual"), got, expected, strict=True):
        assert_equal(name, mine, theirs)


@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_written_out_gradients_of_layer_norm(affine, dims, detach):
    shape = (3, 4, 5)
    features = shape[3 - dims :]
    x = (harness.randn(shape, 1, torch.float64) + 0.5).requires_grad_()
    weight, bias = (harness.randn(features, i, torch.float64).requires_grad_() if affine else None for i in (2, 3))
    y = reference.layer_norm(x, features, weight, bias, 1e-3, detach=detach)
    dy = harness.randn(shape, 4, torch.float64)
    leaves = [t for t in (x, weight, bias) if t is not None]
    expected = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        out, mean, rstd = reference.layer_norm_forward(x, dims, weight, bias, 1e-3)
        got = reference.layer_norm_backward(dy, x, dims, weight, bias, mean, rstd, detach, True, affine, affine)
    over = tuple(range(3 - dims, 3))
    assert_equal("y", out, y)
    assert_equal("mean", mean, x.mean(over))
    assert_equal("rstd", rstd, (x.var(over, unbiased=False) + 1e-3).rsqrt())
    for name, mine, theirs in zip(("dx", "dweight", "dbias"), got, expected, strict=False):
        assert_equal(name, mine, theirs)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_library_s_layer_norm_has_these_forms(dims, monkeypatch):
    """What runs on GPUs: torch's kernels, called as they are here, give what the passes written out give."""
    shape = (3, 4, 5)
    features = shape[3 - dims :]
    x, dy = (harness.randn(shape, i, torch.float64) for i in (1, 4))
    weight, bias = (harness.randn(features, i, torch.float64) for i in (2, 3))

    def run():
        y, mean, rstd = reference.layer_norm_forward(x, dims, weight, bias, 1e-3)
        gradients = reference.layer_norm_backward(dy, x, dims, weight, bias, mean, rstd, False, True, True, True)
        return y, mean, rstd, *gradients

    written_out = run()
    monkeypatch.setattr(reference, "_library_normalizes", lambda *arguments: True)
    for mine, theirs in zip(run(), written_out, strict=True):
        assert_equal("library", mine, theirs)
