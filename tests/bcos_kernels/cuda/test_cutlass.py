"""The variant "cutlass" of the CUDA backend, without a GPU: which calls its kernels take, what they are given, and the
numbers, with Python for the kernels (their documented mathematics) and the backend's passes emulated."""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bcos_kernels
from bcos_kernels import cuda, cutlass, cutlass_build, dispatch, reference, selftest, selftest_cases, tuning
from tests.bcos_kernels import harness
from tests.bcos_kernels.cuda.emulated import emulated
from tests.bcos_kernels.tolerances import assert_close_to_reference

needs_compiler = pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler here")
CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
HOPPER, SM80 = "", "_sm80"  # what names of kernels end in


# --- Python in the place of the kernels: float32 inside, one rounding, as their files say -----------------------------


def _scaled(a: Tensor, reciprocal_n: Tensor, dtype: torch.dtype) -> Tensor:
    return (a * a.abs() * reciprocal_n).to(dtype)


def _columns(reciprocal_weight_norm: Tensor | None, a: Tensor) -> Tensor:
    return a if reciprocal_weight_norm is None else a * reciprocal_weight_norm


def linear_forward(x, weight, reciprocal_n, reciprocal_weight_norm):
    assert reciprocal_n.dtype == torch.float32 and reciprocal_n.shape == x.shape[:1]
    a = _columns(reciprocal_weight_norm, x.float() @ weight.float().t())
    return _scaled(a, reciprocal_n[:, None], x.dtype)


def linear_norm_forward(x, weight, reciprocal_weight_norm):
    a = _columns(reciprocal_weight_norm, x.float() @ weight.float().t())
    return _scaled(a, 1 / (x.float().norm(dim=1, keepdim=True) + 1e-12), x.dtype)


def linear_backward_dx(da, weight, x, q):
    assert q.shape == x.shape[:1] and q.dtype == torch.float32 and da.is_contiguous() and x.is_contiguous()
    return (da.float() @ weight.float() + x.float() * q[:, None]).to(x.dtype)


def conv2d_forward(x, weight, reciprocal_n, reciprocal_weight_norm, *window):
    stride, padding, dilation = window[:2], window[2:4], window[4:]
    a = F.conv2d(x.float(), weight.float(), None, stride, padding, dilation)
    a = _columns(reciprocal_weight_norm, a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert reciprocal_n.shape == (a.shape[0], 1, *a.shape[2:]) and reciprocal_n.dtype == torch.float32
    return _scaled(a, reciprocal_n, x.dtype).contiguous(memory_format=torch.channels_last)


def conv2d_backward_dx(da, weight, x, q, *window):
    stride, padding, dilation = window[:2], window[2:4], window[4:]
    assert stride == (1, 1) and q.shape == (x.shape[0], 1, *x.shape[2:]) and q.dtype == torch.float32
    dx = F.conv_transpose2d(da.float(), weight.float(), None, stride, padding, 0, 1, dilation)
    return (dx + x.float() * q).to(x.dtype).contiguous(memory_format=torch.channels_last)


KERNELS = {
    f.__name__: f
    for f in (linear_forward, linear_norm_forward, linear_backward_dx, conv2d_forward, conv2d_backward_dx)
}


@contextlib.contextmanager
def python_kernels(kinds=frozenset(cutlass_build.KINDS), reason=None, suffix=HOPPER):
    """Inside, the variant can be used, its kernels are those above, of the architecture that ``suffix`` stands for, and
    the list that is given names what ran."""
    ran: list[str] = []

    def op(name):
        assert any(f"{name}_{element}" in cutlass_build.KINDS for element in ("bfloat16", "float16")), name

        def launch(*arguments):
            ran.append(name.removesuffix(suffix))
            return KERNELS[ran[-1]](*arguments)

        return launch

    with (
        mock.patch.object(cutlass, "_suffix", lambda device: suffix),
        mock.patch.object(cutlass, "_op", op),
        mock.patch.object(cutlass, "_kinds", lambda: kinds),
        mock.patch.object(cutlass, "unusable_reason", lambda: reason),
    ):
        yield ran


@contextlib.contextmanager
def variant(**options):
    with emulated(), python_kernels(**options) as ran, bcos_kernels.backend("cuda:cutlass"):
        dispatch._last_run.clear()
        yield ran


def images(*shape, seed=1, dtype=BF16):
    return harness.randn(shape, seed, dtype).contiguous(memory_format=torch.channels_last)


# --- numbers ----------------------------------------------------------------------------------------------------------

LINEAR, CONV2D = ["linear_forward", "linear_backward_dx"], ["conv2d_forward", "conv2d_backward_dx"]
CALLS = {  # op, shapes of x and weight, options, kernels of a training step in bfloat16
    "linear": ("linear", (24, 40), (32, 40), {}, LINEAR),
    "linear, unit weights": ("linear", (24, 40), (32, 40), {"normalize_weight": True}, LINEAR),
    "linear, explanation": ("linear", (24, 40), (32, 40), {"detach": True}, ["linear_forward"]),
    "3x3": ("conv2d", (2, 16, 7, 6), (24, 16, 3, 3), {"padding": 1}, CONV2D),
    "1x1": ("conv2d", (2, 16, 7, 6), (24, 16, 1, 1), {}, LINEAR),
    "1x1, unit weights": ("conv2d", (2, 16, 7, 6), (24, 16, 1, 1), {"normalize_weight": True}, LINEAR),
    "1x1, padded": ("conv2d", (2, 16, 7, 6), (24, 16, 1, 1), {"padding": 1}, CONV2D),
    "1x1, explanation": ("conv2d", (2, 16, 7, 6), (24, 16, 1, 1), {"detach": True}, ["linear_forward"]),
    "1x1, strided": ("conv2d", (2, 16, 7, 6), (24, 16, 1, 1), {"stride": 2}, ["conv2d_forward"]),
    "one pixel": ("conv2d", (3, 16, 1, 1), (24, 16, 1, 1), {}, LINEAR),
    "3x3, unit weights": ("conv2d", (2, 16, 7, 6), (24, 16, 3, 3), {"normalize_weight": True}, CONV2D),
    "dilated": ("conv2d", (1, 8, 11, 12), (16, 8, 3, 3), {"padding": 2, "dilation": (2, 3)}, CONV2D),
    "strided": ("conv2d", (2, 16, 7, 6), (24, 16, 3, 3), {"padding": 1, "stride": 2}, ["conv2d_forward"]),
    "3x3, explanation": ("conv2d", (2, 16, 7, 6), (24, 16, 3, 3), {"detach": True}, ["conv2d_forward"]),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("dtype", "suffix"), [(BF16, HOPPER), (FP16, HOPPER), (BF16, SM80)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_numbers(name, dtype, suffix):
    """y with and without gradients and every gradient, against the definition in float64; which kernels ran."""
    op, x_shape, w_shape, options, expected = CALLS[name]
    x = harness.randn(x_shape, 1, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    inputs = dict(x=x, weight=harness.randn(w_shape, 2, dtype, 0.3))

    def run(module, wide=False):
        leaves = harness.leaves_of(inputs, torch.float64 if wide else None)
        y = getattr(module, op)(**leaves, **options)
        return {"y": y.detach(), **harness.gradients(y, leaves, harness.randn(tuple(y.shape), 9, dtype))}

    with variant(suffix=suffix) as ran:
        got = run(bcos_kernels)
        told = dict(bcos_kernels.dispatched())
        in_training = list(ran)
        with torch.no_grad():
            got["y, inference"] = getattr(bcos_kernels, op)(**inputs, **options)
        inferred = ran[len(in_training) :]
    eager, exact = run(reference), run(reference, wide=True)
    for results in (eager, exact):
        results["y, inference"] = results["y"]
    for key, value in got.items():
        assert_close_to_reference(f"{name} {key}, {dtype}", value, eager[key], exact[key], dtype)
    if dtype == FP16:  # a is kept there, which the kernels do not give
        expected = [kernel for kernel in expected if "forward" not in kernel]
    assert in_training == expected
    assert inferred == ["linear_norm_forward" if op == "linear" and suffix == HOPPER else CALLS[name][4][0]]
    directions = {op: "forward", f"{op}_backward": "backward"}
    for key, direction in directions.items():
        assert told[key] == ("cuda:cutlass" if any(direction in kernel for kernel in expected) else "cuda")


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_block_goes_through_the_kernel(training):
    """With a BatchNorm behind the convolution the forward keeps a, which the library computes."""
    inputs = dict(x=images(2, 16, 7, 6), weight=harness.randn((24, 16, 3, 3), 2, BF16, 0.3))
    inputs |= dict(norm_weight=torch.rand(24) + 0.5, norm_bias=torch.randn(24))

    def gradients(name):
        with bcos_kernels.backend(name):
            leaves = harness.leaves_of(inputs)
            z = bcos_kernels.conv2d_batch_norm(
                **leaves, padding=1, running_var=torch.full((24,), 0.3), training=training, activation="relu"
            )
            return harness.gradients(z, leaves, harness.randn(tuple(z.shape), 9, BF16))

    with emulated(), python_kernels() as ran:
        expected = gradients("cuda")
        assert not ran and bcos_kernels.dispatched()["conv2d_batch_norm_backward"] == "cuda"
        got = gradients("cuda:cutlass")
    assert ran == ["conv2d_backward_dx"]
    assert bcos_kernels.dispatched()["conv2d_batch_norm"] == "cuda"
    assert bcos_kernels.dispatched()["conv2d_batch_norm_backward"] == "cuda:cutlass"
    for key, value in got.items():
        error = (value.double() - expected[key].double()).norm() / expected[key].double().norm()
        assert error < (5e-3 if key == "dx" else 1e-6), (key, error)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_gradient_of_a_layer_with_gelu_goes_through_the_kernel(dtype):
    """In bfloat16 the forward keeps a, which the library computes; float16 is composed of the ops apart."""
    inputs = dict(x=harness.randn((24, 40), 1, dtype), weight=harness.randn((32, 40), 2, dtype, 0.3))

    def run(module, wide=False):
        leaves = harness.leaves_of(inputs, torch.float64 if wide else None)
        h = harness.linear_gelu(module)(**leaves)
        return {"h": h.detach(), **harness.gradients(h, leaves, harness.randn(tuple(h.shape), 9, dtype))}

    with variant() as ran:
        got = run(bcos_kernels)
        assert ran == ["linear_backward_dx"]
        assert bcos_kernels.dispatched() == {"linear_gelu": "cuda", "linear_gelu_backward": "cuda:cutlass"}
    eager, exact = run(reference), run(reference, wide=True)
    for key, value in got.items():
        assert_close_to_reference(f"{key}, {dtype}", value, eager[key], exact[key], dtype)


@needs_compiler
def test_a_pointwise_convolution_takes_the_convolutions_kernels_where_the_products_are_not_built():
    kinds = frozenset(f"{stem}_bfloat16" for stem in CONV2D)
    leaves = harness.leaves_of(dict(x=images(2, 16, 7, 6), weight=harness.randn((24, 16, 1, 1), 2, BF16, 0.3)))
    with variant(kinds=kinds) as ran:
        y = bcos_kernels.conv2d(**leaves)
        got = harness.gradients(y, leaves, harness.randn(tuple(y.shape), 9, BF16))
    assert ran == CONV2D
    wide = harness.leaves_of(leaves, torch.float64)
    exact = harness.gradients(reference.conv2d(**wide), wide, harness.randn(tuple(y.shape), 9, BF16))
    assert_close_to_reference("dx", got["dx"], None, exact["dx"], BF16)


@needs_compiler
def test_a_unit_without_weights_gives_zeros():
    x, weight = harness.randn((16, 8), 1, BF16), harness.randn((8, 8), 2, BF16)
    weight[3] = 0
    leaves = dict(x=x.requires_grad_(), weight=weight.requires_grad_())
    with variant() as ran:
        y = bcos_kernels.linear(**leaves, normalize_weight=True)
        dx, dw = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    assert ran == LINEAR and not y[:, 3].any() and not dw[3].any()
    assert torch.isfinite(y).all() and torch.isfinite(dx).all() and torch.isfinite(dw).all()


@needs_compiler
def test_squares_that_a_producer_left_are_taken():
    """Then no pass over x is left for the kernel that sums squares beside the products."""
    x, weight = harness.randn((16, 8), 1, BF16), harness.randn((8, 8), 2, BF16)
    squares = x.float().square().sum(1)
    with emulated(), python_kernels() as ran, cutlass.running() as use:
        y, n, a, index = cuda.linear_forward(x, weight, None, 2.0, None, False, 1, False, squares)
    assert ran == ["linear_forward"] and use.ran and not a.numel() and not index.numel()
    assert torch.allclose(n, squares.sqrt() + 1e-12)
    assert_close_to_reference("y", y, None, reference.linear(x.double(), weight.double()), BF16)


# --- which calls are the library's ------------------------------------------------------------------------------------

OTHERS = {
    "float32": lambda: bcos_kernels.linear(*(harness.randn((8, 8), i, torch.float32) for i in (1, 2))),
    "B = 1": lambda: bcos_kernels.linear(harness.randn((8, 8), 1, BF16), harness.randn((8, 8), 2, BF16), b=1),
    "B = 1.5": lambda: bcos_kernels.linear(harness.randn((8, 8), 1, BF16), harness.randn((8, 8), 2, BF16), b=1.5),
    "bias": lambda: bcos_kernels.linear(*(harness.randn(shape, 1, BF16) for shape in ((8, 8), (8, 8), (8,)))),
    "max_out": lambda: bcos_kernels.linear(*(harness.randn((8, 8), i, BF16) for i in (1, 2)), max_out=2),
    "7 features": lambda: bcos_kernels.linear(harness.randn((8, 7), 1, BF16), harness.randn((8, 7), 2, BF16)),
    "7 units": lambda: bcos_kernels.linear(harness.randn((8, 8), 1, BF16), harness.randn((7, 8), 2, BF16)),
    "no rows": lambda: bcos_kernels.linear(torch.empty(0, 8, dtype=BF16), harness.randn((8, 8), 2, BF16)),
    "an odd address": lambda: bcos_kernels.linear(
        harness.lay_out(harness.randn((8, 8), 1, BF16), "offset"), harness.randn((8, 8), 2, BF16)
    ),
    "6 channels": lambda: bcos_kernels.conv2d(images(1, 6, 5, 5), harness.randn((8, 6, 3, 3), 2, BF16)),
    "groups": lambda: bcos_kernels.conv2d(images(1, 16, 5, 5), harness.randn((16, 8, 3, 3), 2, BF16), groups=2),
    "stride 9": lambda: bcos_kernels.conv2d(images(1, 8, 12, 12), harness.randn((8, 8, 3, 3), 2, BF16), stride=9),
    "a window of 33": lambda: bcos_kernels.conv2d(images(1, 8, 2, 34), harness.randn((8, 8, 1, 33), 2, BF16)),
}
ONE_ARCHITECTURE = {"stride 9": SM80, "a window of 33": HOPPER}  # has a kernel for what the other leaves


@needs_compiler
@pytest.mark.parametrize("suffix", [HOPPER, SM80])
@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernels_do_not_take_is_the_library_s(name, suffix):
    with variant(suffix=suffix) as ran, torch.no_grad():
        got = OTHERS[name]()
        if ONE_ARCHITECTURE.get(name) == suffix:
            assert ran == ["conv2d_forward"]
            return
        assert not ran and set(bcos_kernels.dispatched().values()) == {"cuda"}
    with emulated(), bcos_kernels.backend("cuda"), torch.no_grad():
        expected = OTHERS[name]()
    assert torch.equal(got, expected)


@needs_compiler
def test_a_library_holds_what_was_built():
    """Of bfloat16 alone, say: float16 is the library's, as is what lacks a kernel of its own."""
    kinds = frozenset({"linear_forward_bfloat16"})
    x, weight = harness.randn((8, 8), 1, BF16), harness.randn((8, 8), 2, BF16)
    with variant(kinds=kinds) as ran, torch.no_grad():
        bcos_kernels.linear(x, weight)  # without the kernel that sums squares beside the products
        bcos_kernels.linear(x.half(), weight.half())
        bcos_kernels.conv2d(images(1, 8, 5, 5), harness.randn((8, 8, 3, 3), 2, BF16))
    assert ran == ["linear_forward"]


def _refuses(call) -> bool:
    try:
        call()
    except RuntimeError as error:
        assert "expected" in str(error)
        return True
    return False


@pytest.mark.skipif(cutlass_build.unbuildable_reason() is not None, reason="CUTLASS's ops cannot be built here")
def test_the_checks_are_those_of_the_ops():
    """On the meta device: what is taken here is accepted there, and what is not taken for its shape is refused."""
    torch.ops.load_library(str(cutlass_build.build([])))
    ops = torch.ops.bcos_kernels_cutlass
    taken = set()

    def values(*shape):
        return torch.empty(shape, device="meta")

    for suffix in (HOPPER, SM80):
        linear, conv2d = (getattr(ops, f"{stem}{suffix}") for stem in ("linear_forward", "conv2d_forward"))
        is_sm80 = suffix == SM80
        for dtype, features, units, dense in itertools.product(
            (BF16, torch.float32), (8, 12, 64), (8, 20), (True, False)
        ):
            x = torch.empty(6, features if dense else 2 * features, dtype=dtype, device="meta")[:, :features]
            weight = torch.empty(units, features, dtype=dtype, device="meta")
            takes = dtype in cutlass._DTYPES and cutlass.takes_linear(x, weight)
            assert takes != _refuses(lambda x=x, w=weight, op=linear: op(x, w, values(6), None)), (x.shape, weight)
            taken.add(takes)
        for channels, units, stride, groups, format_, size in itertools.product(
            (8, 12), (16, 20), (1, 8, 9), (1, 2), (torch.channels_last, torch.contiguous_format), (3, 35)
        ):
            x = torch.empty(2, channels * groups, 19, 18, dtype=BF16, device="meta", memory_format=format_)
            weight = torch.empty(units, channels, size, 3, dtype=BF16, device="meta", memory_format=torch.channels_last)
            outputs = tuple((size - 1) // stride + 1 for size in (19, 18))
            window = (stride, stride, size // 2, 1, 1, 1)
            takes = cutlass.takes_conv2d(x, weight, outputs, (stride, stride), groups, is_sm80)
            norms = values(2, 1, *outputs)
            refused = _refuses(lambda x=x, w=weight, n=norms, s=window, op=conv2d: op(x, w, n, None, *s))
            assert takes != refused, (suffix, x.shape, weight.shape, window)
            taken.add(takes)
        # too many pixels; of sm_80 too many bytes of x, of y and of the weight
        for n, c, o, h, w, size, takes in (
            (1, 8, 8, 2**16, 2**15, 1, set()),
            (1, 2**10, 8, 2**10, 2**10, 1, {HOPPER}),
            (1, 8, 2**10, 2**10, 2**10, 1, {HOPPER}),
            (1, 2**14, 2**13, 3, 3, 3, {HOPPER}),
            (1, 2**9, 2**9, 2**10, 2**10, 1, {HOPPER, SM80}),
        ):
            x = torch.empty(n, c, h, w, dtype=BF16, device="meta", memory_format=torch.channels_last)
            weight = torch.empty(o, c, size, size, dtype=BF16, device="meta", memory_format=torch.channels_last)
            outputs = (h - size + 1, w - size + 1)
            assert cutlass.takes_conv2d(x, weight, outputs, (1, 1), 1, is_sm80) == (suffix in takes), (suffix, x.shape)
            norms = values(n, 1, *outputs)
            refused = _refuses(lambda x=x, w=weight, n=norms, op=conv2d: op(x, w, n, None, 1, 1, 0, 0, 1, 1))
            assert refused == (suffix not in takes), (suffix, x.shape, weight.shape)
    assert taken == {True, False}


def test_a_device_s_kernels_are_those_of_its_architecture(monkeypatch):
    found = {}
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        cutlass._suffix.cache_clear()
        found[capability] = cutlass._suffix(torch.device("cuda", 0))
        kinds = cutlass_build.kinds_for(capability)
        assert all(("_sm80" in kind) == (found[capability] == SM80) for kind in kinds)
        assert len(kinds) == (0 if capability < (8, 0) else 10 if capability == (9, 0) else 8)
    cutlass._suffix.cache_clear()
    assert [capability for capability, suffix in found.items() if suffix == HOPPER] == [(9, 0)]
    assert set(cutlass_build.kinds_for(None)) == set(cutlass_build.KINDS)


# --- choosing it ------------------------------------------------------------------------------------------------------


def test_nothing_is_built_unasked(monkeypatch, tmp_path):
    """Where the library is not in the cache, the variant says so, and how it is made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cutlass_build, "build", lambda *arguments: pytest.fail("built"))
    monkeypatch.setattr(cuda, "unusable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cutlass_build, "unbuildable_reason", lambda: None)
    reason = cutlass.unusable_reason.__wrapped__
    assert reason() == "not built: python -m bcos_kernels.cutlass_build, minutes of nvcc"
    monkeypatch.setattr(cutlass_build, "unbuildable_reason", lambda: "expected nvcc")
    assert reason() == "expected nvcc"
    library = tmp_path / "library.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(cutlass_build, "built", lambda: library)
    assert "does not load" in reason()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cutlass, "_kinds", lambda: frozenset({"linear_forward_sm80_bfloat16"}))
    assert reason() == "its library holds no kernel for compute capability 9.0: python -m bcos_kernels.cutlass_build"
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert reason() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert reason() == "its kernels are for compute capability 8.0 and later, got 7.5"
    monkeypatch.setattr(cuda, "unusable_reason", lambda: "no CUDA device")
    assert reason() == "no CUDA device"


@needs_compiler
def test_the_selftest_checks_and_times_both(monkeypatch):
    """A row for the directions in which the variant's kernels ran, and none for those that it left to the library."""
    case = selftest_cases.conv2d("3x3 /2", (2, 16, 7, 6), 24, 3, stride=2, padding=1)
    names = ["reference", "cuda", "cuda:cutlass"]

    def milliseconds(runs, rounds, warmup=3):
        for run in runs.values():
            run()
        return {name: {"reference": 3.0, "cuda": 2.0, "cuda:cutlass": 1.0}[name] for name in runs}

    monkeypatch.setattr(selftest, "_milliseconds", milliseconds)
    with emulated(), python_kernels() as ran:
        found = {result.backend: result for result in selftest.check(case, "bfloat16", names, CPU)}
        assert {result.status for result in found.values()} == {"right"}, found
        assert found["cuda:cutlass"].served == {"forward"} and found["cuda"].served == {"forward", "backward"}
        assert set(ran) == {"conv2d_forward"}
        measured = {what[1]: times for what, times in selftest.measure(case, "bfloat16", names, CPU)}
    assert measured["forward"] == {"reference": 3.0, "cuda": 2.0, "cuda:cutlass": 1.0}
    assert measured["backward"] == {"reference": 3.0, "cuda": 2.0}
    row = tuning.row(("conv2d", "forward", "bfloat16", ()), measured["forward"], "")
    assert row["backends"] == ["cuda:cutlass", "cuda", "reference"] and set(row["kernels"]) == {"cuda", "cuda:cutlass"}


@needs_compiler
@pytest.mark.parametrize(
    ("precision", "suffix"), [("bfloat16", HOPPER), ("float16", HOPPER), ("bfloat16", SM80)], ids=str
)
def test_the_selftest_s_calls_reach_every_kernel(precision, suffix):
    """The few that the checkers see, too."""
    with emulated(), python_kernels(suffix=suffix) as ran:
        for quick in (True, False):
            ran.clear()
            for case in selftest_cases.cases(quick):
                if case.op != "batch_norm_uncentered":
                    (result,) = selftest.check(case, precision, ["cuda:cutlass"], CPU)
                    assert result.status == "right", (case, result.detail)
            if precision == "bfloat16":
                assert {f"{stem}{suffix}_bfloat16" for stem in ran} == {
                    kind for kind in cutlass_build.kinds_for((8, 0) if suffix else (9, 0)) if kind.endswith("_bfloat16")
                }


@needs_compiler
def test_wrong_numbers_of_the_variant_are_its_own(monkeypatch):
    monkeypatch.setitem(KERNELS, "linear_forward", lambda *arguments: linear_forward(*arguments) * 1.1)
    with emulated(), python_kernels():
        case = selftest_cases.linear("layer", 24, 40, 32)
        found = selftest.check(case, "bfloat16", ["cuda", "cuda:cutlass"], CPU)
    assert [(result.backend, result.status) for result in found] == [("cuda", "right"), ("cuda:cutlass", "wrong")]
