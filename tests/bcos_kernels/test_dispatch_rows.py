"""Which backend runs what on a GPU: rows of the tuning tables decide, and what fails is replaced."""

from __future__ import annotations

import contextlib
import types
import warnings

import pytest
import torch

import bcos_kernels
import bcos_kernels.cpu
from bcos_kernels import dispatch, tuning
from tests.bcos_kernels import harness
from tests.bcos_kernels.dispatch_cases import forget  # noqa: F401  (for every test)

# On a GPU: by the tuning table ----------------------------------------------------------------------------------------
#
# A tensor's device decides, and launchers do not ask for it: what stands for a tensor here says that it lies on a GPU,
# and the launchers are given tensors in host memory.

ON_GPU = types.SimpleNamespace(device=torch.device("cuda", 0))
X, W = harness.randn((5, 6), 1, torch.bfloat16), harness.randn((4, 6), 2, torch.bfloat16)
FORWARD = (X, W, None, 2.0, None, False, 1, True, None)


class Kernels(types.SimpleNamespace):
    """A backend whose launchers are the reference's, noting every call; ``failing`` raises instead. Its variant
    "cutlass" takes what `takes` says, and leaves the rest to the backend's own launchers."""

    STRICT_LAYOUTS = True

    def __init__(self, failing=None):
        super().__init__(calls=[], variants=[], takes=lambda: True, variant_failing=None, why_no_variant=None)
        variant = types.SimpleNamespace(unusable_reason=lambda: self.why_no_variant, running=self.running)
        self.VARIANTS = {"cutlass": variant}
        for name in tuning._CLASSES:
            setattr(self, "_".join(name), self._launcher("_".join(name), failing))

    def _launcher(self, name, failing):
        def launch(*arguments):
            self.calls.append((name, arguments))
            if failing is not None:
                raise failing
            if self.variants and self.variants[-1] == "inside" and self.variant_failing is not None:
                raise self.variant_failing
            return dispatch_launcher("reference", name)(*arguments)

        return launch

    def unusable_reason(self):
        return None

    @contextlib.contextmanager
    def running(self):
        self.variants.append("inside")
        try:
            yield types.SimpleNamespace(ran=self.takes())
        finally:
            self.variants[-1] = "cutlass"


dispatch_launcher = dispatch._launcher


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with a table, and two backends for it: (table, {"triton": …, "cuda": …})."""
    table, backends, module = {}, {"triton": Kernels(), "cuda": Kernels()}, dispatch._module
    monkeypatch.setattr(tuning, "_tables", {0: table})
    monkeypatch.setattr(dispatch, "_module", lambda name: backends[name] if name in backends else module(name))
    return table, backends


def key(direction="forward", arguments=FORWARD, op="linear"):
    return tuning.key(op, direction, arguments)


def backward_arguments():
    y, n, a, index = dispatch_launcher("reference", "linear_forward")(*FORWARD)
    return (torch.ones_like(y), X, W, None, 2.0, None, y, n, a, index, False, 1, False, True, True, False, False)


def expected_y():
    return dispatch_launcher("reference", "linear_forward")(*FORWARD)[0]


def test_without_a_verified_row_the_library_serves(gpu):
    with pytest.warns(RuntimeWarning, match="no verified kernels for this GPU yet: .*python -m bcos_kernels selftest"):
        y = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert torch.equal(y, expected_y())
    assert bcos_kernels.dispatched() == {"linear": "reference"}
    assert not gpu[1]["triton"].calls and not gpu[1]["cuda"].calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.run("linear", "forward", ON_GPU, FORWARD)


def test_a_shape_that_was_not_measured_is_told_once(gpu):
    gpu[0]["another"] = ("triton", "reference")
    with pytest.warns(RuntimeWarning, match="never measured on this GPU .*python -m bcos_kernels tune"):
        dispatch.run("linear", "forward", ON_GPU, FORWARD)
    assert bcos_kernels.dispatched() == {"linear": "reference"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["triton", "cuda", "reference"])
def test_the_fastest_verified_backend_serves(gpu, name):
    gpu[0][key()] = (name, "reference")
    y = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert torch.equal(y, expected_y()) and bcos_kernels.dispatched() == {"linear": name}


@pytest.mark.filterwarnings("error")
def test_inference_goes_by_its_own_row(gpu):
    """A forward that keeps nothing; a kernel that fails there still serves where something is kept."""
    table, backends = gpu
    inference = (*FORWARD[:7], False, None)
    table[key()], table[key(arguments=inference)] = ("triton", "reference"), ("cuda", "reference")
    assert len(table) == 2
    for arguments, name in ((inference, "cuda"), (FORWARD, "triton")):
        y = dispatch.run("linear", "forward", ON_GPU, arguments)[0]
        assert torch.equal(y, expected_y()) and bcos_kernels.dispatched() == {"linear": name}
    backends["cuda"].__init__(RuntimeError("no kernel image"))
    table[key()] = ("cuda", "reference")
    with pytest.warns(RuntimeWarning, match="linear runs on the library plus eager passes: cuda: .*no kernel image"):
        dispatch.run("linear", "forward", ON_GPU, inference)
    assert table == {key(): ("cuda", "reference"), key(arguments=inference): ("reference",)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("op", ["linear", "conv2d", "conv2d_batch_norm", "linear_gelu"])
def test_what_no_grad_calls_is_inference(op, monkeypatch):
    """The public functions, by the keys of what they launch."""
    seen, run = [], dispatch.run

    def noting(name, direction, tensor, arguments, recorded=""):
        seen.append(tuning.key(name, direction, arguments)[:2])
        return run(name, direction, tensor, arguments, recorded)

    monkeypatch.setattr(dispatch, "run", noting)
    x, w = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3, requires_grad=True)
    if op.startswith("linear"):
        x, w = torch.randn(2, 3), torch.randn(5, 3, requires_grad=True)
    options = {"running_var": torch.ones(5), "training": False} if op == "conv2d_batch_norm" else {}
    function = getattr(bcos_kernels, op)
    y = function(x, w, **options)
    with torch.no_grad():
        assert torch.allclose(function(x, w, **options), y, rtol=1e-5, atol=1e-6)
    function(x, w.detach(), **options)
    assert seen == [(op, "forward"), (op, "inference"), (op, "inference")]


@pytest.mark.filterwarnings("error")
def test_a_backward_goes_by_its_own_row(gpu):
    arguments = backward_arguments()
    gpu[0][key("backward", arguments)] = ("cuda", "reference")
    dispatch.run("linear", "backward", ON_GPU, arguments, "triton")
    assert bcos_kernels.dispatched() == {"linear_backward": "cuda"}


@pytest.mark.filterwarnings("error")
def test_a_backward_without_a_row_runs_where_its_forward_ran(gpu):
    dispatch.run("linear", "backward", ON_GPU, backward_arguments(), "triton")
    assert bcos_kernels.dispatched() == {"linear_backward": "triton"}


@pytest.mark.filterwarnings("error")
def test_a_named_backend_needs_no_row(gpu):
    with bcos_kernels.backend("triton"):
        dispatch.run("linear", "forward", ON_GPU, FORWARD)
    arguments = backward_arguments()
    gpu[0][key("backward", arguments)] = ("cuda", "reference")
    dispatch.run("linear", "backward", ON_GPU, arguments, dispatch.last_backend())
    assert bcos_kernels.dispatched() == {"linear": "triton", "linear_backward": "triton"}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("PassManager::run failed\nat length"), OSError("no C compiler"), NotImplementedError("not this")],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_fails_is_replaced_with_one_warning(gpu, error):
    table, backends = gpu
    backends["triton"].__init__(error)
    table[key()] = ("triton", "cuda", "reference")
    with pytest.warns(RuntimeWarning, match="linear runs on cuda: triton: ") as warned:
        first = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
        second = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert len(warned) == 1 and str(error).partition("\n")[0] in str(warned[0].message)
    assert torch.equal(first, expected_y()) and torch.equal(second, first)
    assert bcos_kernels.dispatched() == {"linear": "cuda"}
    # a kernel that does not compile is not compiled again; what is not built for a combination may be for the next
    assert len(backends["triton"].calls) == (2 if isinstance(error, NotImplementedError) else 1)


def test_where_all_kernels_fail_the_library_serves(gpu):
    table, backends = gpu
    for name in backends:
        backends[name].__init__(RuntimeError(f"{name} is broken"))
    table[key()] = ("triton", "cuda", "reference")
    with pytest.warns(RuntimeWarning, match="linear runs on the library plus eager passes: cuda: .*cuda is broken"):
        y = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert torch.equal(y, expected_y()) and table[key()] == ("reference",)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory"), MemoryError()]
)
def test_too_little_memory_is_no_reason_to_do_without_a_kernel(gpu, error):
    table, backends = gpu
    backends["triton"].__init__(error)
    table[key()] = ("triton", "reference")
    dispatch._thread.last = "before"
    with pytest.raises(type(error)):
        dispatch.run("linear", "forward", ON_GPU, FORWARD)
    assert table[key()] == ("triton", "reference")
    assert not bcos_kernels.dispatched() and dispatch.last_backend() == "before" and not dispatch._warned
    backends["triton"].__init__()
    assert torch.equal(dispatch.run("linear", "forward", ON_GPU, FORWARD)[0], expected_y())


def test_an_error_of_the_library_is_not_swallowed(gpu, monkeypatch):
    monkeypatch.setattr(bcos_kernels.reference, "linear_forward", refuse_values)
    gpu[0][key()] = ("reference",)
    with pytest.raises(ValueError, match="these values"):
        dispatch.run("linear", "forward", ON_GPU, FORWARD)


def refuse_values(*arguments):
    raise ValueError("not with these values")


def test_a_backend_that_became_unusable_is_passed_over(gpu, monkeypatch):
    table, backends = gpu
    backends["triton"].unusable_reason = lambda: "no driver"
    table[key()] = ("triton", "reference")
    with pytest.warns(RuntimeWarning, match="linear runs on the library plus eager passes: triton: no driver"):
        y = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert torch.equal(y, expected_y())


@pytest.mark.filterwarnings("ignore:no verified kernels")
def test_a_corrupt_table_changes_no_numbers(gpu, monkeypatch, tmp_path):
    (tmp_path / "gpu.json").write_text("{")
    monkeypatch.setattr(tuning, "_tables", {})
    monkeypatch.setattr(tuning, "_warned", set())
    monkeypatch.setattr(tuning, "identity", lambda device: ("GPU", "sm_99"))
    monkeypatch.setenv("BCOS_TUNING_CACHE", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="gpu.json is ignored"):
        y = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert torch.equal(y, expected_y())


# Variants of a backend ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_a_row_names_a_variant(gpu):
    table, backends = gpu
    table[key()] = ("cuda:cutlass", "cuda", "reference")
    y = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert torch.equal(y, expected_y()) and backends["cuda"].variants == ["cutlass"]
    assert bcos_kernels.dispatched() == {"linear": "cuda:cutlass"} and dispatch.last_backend() == "cuda:cutlass"


@pytest.mark.filterwarnings("error")
def test_what_a_variant_leaves_to_its_backend_is_told_as_that(gpu):
    table, backends = gpu
    table[key()] = ("cuda:cutlass", "reference")
    backends["cuda"].takes = lambda: False
    dispatch.run("linear", "forward", ON_GPU, FORWARD)
    assert bcos_kernels.dispatched() == {"linear": "cuda"} and backends["cuda"].variants == ["cutlass"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("cuda", ("cuda:cutlass", "cuda", "reference"), "cuda:cutlass"),
        ("cuda", ("triton", "cuda:cutlass", "cuda", "reference"), "cuda:cutlass"),  # the first of the backend's own
        ("cuda", ("cuda", "cuda:cutlass", "reference"), "cuda"),
        ("cuda", ("triton", "reference"), "cuda"),
        ("cuda", None, "cuda"),
        ("cuda:library", ("cuda:cutlass", "cuda", "reference"), "cuda"),
        ("cuda:cutlass", ("cuda", "reference"), "cuda:cutlass"),
        ("cuda:cutlass", None, "cuda:cutlass"),
    ],
)
def test_a_named_backend_runs_in_the_row_s_variant(gpu, name, row, expected):
    if row is not None:
        gpu[0][key()] = row
    with bcos_kernels.backend(name):
        y = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert torch.equal(y, expected_y()) and bcos_kernels.dispatched() == {"linear": expected}


@pytest.mark.filterwarnings("error")
def test_a_named_backend_s_variant_that_cannot_run_is_the_library_s(gpu):
    gpu[0][key()] = ("cuda:cutlass", "cuda", "reference")
    gpu[1]["cuda"].why_no_variant = "not built"
    with bcos_kernels.backend("cuda"):
        dispatch.run("linear", "forward", ON_GPU, FORWARD)
    assert bcos_kernels.dispatched() == {"linear": "cuda"}
    assert bcos_kernels.backends()["cuda"] is None and bcos_kernels.backends()["cuda:cutlass"] == "not built"
    assert list(bcos_kernels.backends()) == list(dispatch.NAMES)
    with pytest.raises(RuntimeError, match="'cuda:cutlass' cannot be used here: not built"):
        with bcos_kernels.backend("cuda:cutlass"):
            pass
    with pytest.raises(KeyError):
        bcos_kernels.backends()["cuda:abacus"]


@pytest.mark.parametrize("named", [False, True])
def test_a_variant_that_fails_is_replaced_with_one_warning(gpu, named):
    table, backends = gpu
    table[key()] = ("cuda:cutlass", "cuda", "reference")
    backends["cuda"].variant_failing = RuntimeError("the driver refused a tensor map\nin full")
    with contextlib.ExitStack() as stack:
        if named:
            stack.enter_context(bcos_kernels.backend("cuda"))
        with pytest.warns(RuntimeWarning, match="runs on cuda.*: cuda:cutlass: RuntimeError: the driver") as told:
            first = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
            second = dispatch.run("linear", "forward", ON_GPU, FORWARD)[0]
    assert len(told) == 1 and torch.equal(first, expected_y()) and torch.equal(second, first)
    assert bcos_kernels.dispatched() == {"linear": "cuda"} and table[key()] == ("cuda", "reference")
    assert len(backends["cuda"].variants) == 1


def test_too_little_memory_is_no_reason_to_do_without_a_named_backend_s_variant(gpu):
    gpu[0][key()] = ("cuda:cutlass", "cuda", "reference")
    gpu[1]["cuda"].variant_failing = torch.OutOfMemoryError("no room")
    with bcos_kernels.backend("cuda"), pytest.raises(torch.OutOfMemoryError):
        dispatch.run("linear", "forward", ON_GPU, FORWARD)
    assert gpu[0][key()] == ("cuda:cutlass", "cuda", "reference")


@pytest.mark.filterwarnings("error")
def test_a_backward_goes_by_its_own_row_or_by_its_forward_s_variant(gpu):
    table, backends = gpu
    arguments = backward_arguments()
    dispatch.run("linear", "backward", ON_GPU, arguments, "cuda:cutlass")
    assert bcos_kernels.dispatched() == {"linear_backward": "cuda:cutlass"}
    table[key("backward", arguments)] = ("cuda", "reference")
    dispatch.run("linear", "backward", ON_GPU, arguments, "cuda:cutlass")
    assert bcos_kernels.dispatched() == {"linear_backward": "cuda"}


def test_without_a_row_of_its_own_a_backward_s_failing_variant_is_its_backend_s(gpu):
    gpu[1]["cuda"].variant_failing = RuntimeError("the launch failed")
    with pytest.warns(RuntimeWarning, match="linear_backward runs on cuda: cuda:cutlass: RuntimeError: the launch"):
        dispatch.run("linear", "backward", ON_GPU, backward_arguments(), "cuda:cutlass")
    assert bcos_kernels.dispatched() == {"linear_backward": "cuda"}


def test_variants_keep_the_same_in_y_s_place(gpu):
    """What a fused op's forward kept in one variant serves the backward in the other: nothing is computed again."""
    table, backends = gpu
    forward, backward = linear_gelu_calls()
    table[key("forward", forward, "linear_gelu")] = ("cuda:cutlass", "cuda", "reference")
    arguments = backward(*dispatch.run("linear_gelu", "forward", ON_GPU, forward))
    backends["cuda"].variant_failing = RuntimeError("the launch failed")
    backends["cuda"].calls.clear()
    with pytest.warns(RuntimeWarning, match="linear_gelu_backward runs on cuda: cuda:cutlass"):
        dispatch.run("linear_gelu", "backward", ON_GPU, arguments, "cuda:cutlass")
    assert [name for name, _ in backends["cuda"].calls] == ["linear_gelu_backward"] * 2
    assert backends["cuda"].calls[1][1][4] is arguments[4]


def test_what_is_computed_again_for_a_backward_is_the_library_s():
    """Bit for bit what the forward kept: of a fused op that is a, or in float16 y with a, and no variant's."""
    for recorded in ("cuda", "cuda:cutlass", "named cuda", "named cuda:cutlass"):
        assert dispatch.backend_of(recorded) == "cuda:library"
    assert dispatch.backend_of("named triton") == "triton" and dispatch.backend_of("") == "auto"


# What fused ops keep is their backend's own affair --------------------------------------------------------------------


def conv2d_batch_norm_calls():
    """(forward's arguments, a function of the forward's results to the backward's)."""
    x = harness.randn((2, 4, 5, 5), 1, torch.float32).to(memory_format=torch.channels_last)
    w, var = harness.randn((3, 4, 3, 3), 2, torch.float32), torch.rand(3) + 0.5
    layer = ((1, 1), (1, 1), (1, 1), 1, 2.0, None, False, 1)
    forward = (x, w, None, None, None, None, var, None, *layer, False, 1e-5, "relu", True, False, False)

    def backward(z, squares, y, n, a, index, mean, var):
        norm = (False, 1e-5, "relu", False)
        return (torch.ones_like(z), x, w, None, None, None, z, y, n, a, index, mean, var, *layer, *norm,
                True, True, False, False, False, False, False)  # fmt: skip

    return forward, backward


def linear_gelu_calls():
    forward = (X.float(), W.float(), None, None, 2.0, None, False, 1, True, False)

    def backward(h, squares, y, n, a, index):
        return (torch.ones_like(h), X.float(), W.float(), None, y, n, a, index, 2.0, None, False, 1, False,
                True, True, False, False)  # fmt: skip

    return forward, backward


@pytest.mark.parametrize(
    "op, calls", [("conv2d_batch_norm", conv2d_batch_norm_calls), ("linear_gelu", linear_gelu_calls)]
)
def test_of_fused_ops_the_backward_runs_where_the_forward_ran(gpu, op, calls):
    """And elsewhere only with what every backend understands: what stands in y's place is computed again."""
    table, backends = gpu
    forward, backward = calls()
    table[key("forward", forward, op)] = ("triton", "reference")
    results = dispatch.run(op, "forward", ON_GPU, forward)
    arguments = backward(*results)
    expected = dispatch.run(op, "backward", ON_GPU, arguments, "triton")
    assert bcos_kernels.dispatched() == {op: "triton", f"{op}_backward": "triton"}

    place = 7 if op == "conv2d_batch_norm" else 4
    own = (*arguments[:place], torch.full_like(arguments[place], 7.0), *arguments[place + 1 :])  # no y
    backends["triton"].__init__(RuntimeError("does not compile"))
    with pytest.warns(RuntimeWarning, match=f"{op}_backward runs on the library plus eager passes"):
        got = dispatch.run(op, "backward", ON_GPU, own, "triton")
    for g, e in zip(got, expected, strict=True):
        assert (g is None and e is None) or torch.allclose(g, e, 1e-5, 1e-6)


def test_the_cuda_backend_says_itself_whether_it_runs(gpu):
    gpu[1]["cuda"].unusable_reason = lambda: "its library is elsewhere"
    assert bcos_kernels.backends()["cuda"] == "its library is elsewhere"
