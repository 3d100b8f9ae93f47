"""Which backend runs what: named ones and no other, the fastest otherwise, and it is told."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch

import bcos_kernels
import bcos_kernels.cpu
from bcos_kernels import dispatch
from tests.bcos_kernels import harness
from tests.bcos_kernels.dispatch_cases import (  # noqa: F401  (forget: for every test)
    CPU,
    OPS,
    batch_norm_uncentered,
    conv2d,
    forget,
    linear,
)

# backends() and backend() ---------------------------------------------------------------------------------------------


def test_backends():
    found = bcos_kernels.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in found.values())


@pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler here")
def test_the_cpu_backend_is_built_where_a_compiler_is():
    assert bcos_kernels.backends()["cpu"] is None


@pytest.mark.parametrize("name", ["CPU", "", "gpu", None, 1])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda, auto, got "):
        with bcos_kernels.backend(name):
            pass


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_an_unusable_backend_is_an_error_that_says_why(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_unusable", lambda asked: "its parts are elsewhere" if asked == name else None)
    with pytest.raises(RuntimeError, match=f"backend: '{name}' cannot be used here: its parts are elsewhere"):
        with bcos_kernels.backend(name):
            pass
    assert bcos_kernels.backends()[name] == "its parts are elsewhere"


def test_a_missing_library_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(bcos_kernels.cpu, "_LIBRARY", tmp_path / "libbcos_kernels_cpu.so")
    monkeypatch.setattr(dispatch, "build_report", lambda: {"cpu": "no C++ compiler at build time"})
    assert bcos_kernels.cpu.unusable_reason.__wrapped__() == "no C++ compiler at build time"
    monkeypatch.setattr(dispatch, "build_report", lambda: {"cpu": None})
    assert "libbcos_kernels_cpu.so is missing" in bcos_kernels.cpu.unusable_reason.__wrapped__()
    (tmp_path / "libbcos_kernels_cpu.so").write_bytes(b"no library")
    assert "does not load" in bcos_kernels.cpu.unusable_reason.__wrapped__()


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_a_named_backend_runs_everything(backend):
    with bcos_kernels.backend(backend):
        for op in OPS.values():
            op().sum().backward()
    expected = {name for op in OPS for name in (op, f"{op}_backward")}
    assert bcos_kernels.dispatched() == dict.fromkeys(expected, backend)


@pytest.mark.parametrize("backend", [CPU])
def test_without_a_name_the_fastest_runs(backend):
    linear().sum().backward()
    assert bcos_kernels.dispatched() == {"linear": backend, "linear_backward": backend}
    with bcos_kernels.backend("reference"), bcos_kernels.backend("auto"):
        conv2d()
    assert bcos_kernels.dispatched()["conv2d"] == backend


@pytest.mark.parametrize("backend", [CPU])
def test_nested_contexts(backend):
    def ran():
        linear()
        return bcos_kernels.dispatched()["linear"]

    with bcos_kernels.backend("reference"):
        assert ran() == "reference"
        with bcos_kernels.backend(backend):
            assert ran() == backend
            with bcos_kernels.backend("reference"):
                assert ran() == "reference"
            with pytest.raises(ValueError):
                with bcos_kernels.backend("nonsense"):
                    pass
            assert ran() == backend
        assert ran() == "reference"
        with pytest.raises(ZeroDivisionError):
            with bcos_kernels.backend(backend):
                1 / 0  # noqa: B018
        assert ran() == "reference"
    assert ran() == backend


@pytest.mark.parametrize("backend", [CPU])
def test_contexts_are_a_thread_s_own(backend):
    inside, done = threading.Event(), threading.Event()

    def work():
        with bcos_kernels.backend("reference"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    try:
        linear()
        assert bcos_kernels.dispatched()["linear"] == backend
    finally:
        done.set()
        thread.join()


# No fallback where a backend is named, a told one where none is ------------------------------------------------------


def refuse(*arguments):
    raise NotImplementedError("linear: the cpu backend builds other things, got this")


@pytest.mark.parametrize("backend", [CPU])
def test_a_named_backend_never_falls_back(backend, monkeypatch):
    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", refuse)
    with bcos_kernels.backend(backend):
        with pytest.raises(NotImplementedError, match="builds other things, got this"):
            linear()
    assert not bcos_kernels.dispatched()


@pytest.mark.parametrize("backend", [CPU])
def test_a_named_backend_never_falls_back_in_the_backward(backend, monkeypatch):
    monkeypatch.setattr(bcos_kernels.cpu, "linear_backward", refuse)
    with bcos_kernels.backend(backend):
        y = linear()
        with pytest.raises(NotImplementedError, match="builds other things, got this"):
            y.sum().backward()


@pytest.mark.parametrize("backend", [CPU])
def test_a_named_backend_never_falls_back_in_a_backward_outside_its_context(backend, monkeypatch):
    monkeypatch.setattr(bcos_kernels.cpu, "linear_backward", refuse)
    with bcos_kernels.backend(backend):
        y = linear()
    with pytest.raises(NotImplementedError, match="builds other things, got this"):
        y.sum().backward()


def test_a_named_backend_refuses_tensors_of_other_devices():
    x = torch.zeros(2, 3, device="meta")
    with bcos_kernels.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' does not run on meta tensors"):
        bcos_kernels.linear(x, x)


def test_the_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", refuse)
    expected = linear_on_reference()
    with pytest.warns(RuntimeWarning, match="linear runs on the reference implementation: cpu: .*got this"):
        y = linear()
    assert torch.equal(y, expected)
    assert bcos_kernels.dispatched()["linear"] == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear()


def linear_on_reference():
    with bcos_kernels.backend("reference"):
        return linear()


def test_an_unusable_backend_is_passed_over_with_a_warning(monkeypatch):
    monkeypatch.setattr(dispatch, "_unusable", lambda name: "not built" if name == "cpu" else None)
    with pytest.warns(RuntimeWarning, match="cpu: not built"):
        y = conv2d()
    y.sum().backward()
    assert bcos_kernels.dispatched() == {"conv2d": "reference", "conv2d_backward": "reference"}


@pytest.mark.parametrize("backend", [CPU])
def test_a_backward_that_its_forward_s_backend_lacks(backend, monkeypatch):
    """Chosen without a name, the forward's backend is no promise: the reference serves, and it is told."""
    monkeypatch.setattr(bcos_kernels.cpu, "linear_backward", refuse)
    y = linear()
    with pytest.warns(RuntimeWarning, match="linear_backward runs on the reference implementation"):
        y.sum().backward()
    assert bcos_kernels.dispatched() == {"linear": backend, "linear_backward": "reference"}


def test_an_error_of_a_kernel_is_not_swallowed(monkeypatch):
    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", fail)
    with pytest.raises(MemoryError, match="no room"):
        linear()


# The backward runs where its forward ran -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("first, second", [("reference", "auto"), ("reference", "cpu"), ("cpu", "reference")])
def test_backward_uses_the_forward_s_backend(first, second, op):
    with bcos_kernels.backend(first):
        y = OPS[op]()
    with bcos_kernels.backend(second):
        y.sum().backward()
    assert bcos_kernels.dispatched() == {op: first, f"{op}_backward": first}


@pytest.mark.parametrize("op, option", [("linear", 2.0), ("linear", 1.0), ("linear", 1.5), ("conv2d", 2.0),
                                        ("conv2d", 1.0), ("batch_norm_uncentered", True),
                                        ("batch_norm_uncentered", False), ("conv2d_batch_norm", True),
                                        ("conv2d_batch_norm", False), ("layer_norm", False),
                                        ("layer_norm", True)])  # fmt: skip
def test_compiled_graphs_obey(op, option):
    """One graph for all backends, chosen when it runs; its backward follows its forward."""
    torch.compiler.reset()
    tensors = {
        "linear": [harness.randn((5, 6), 1, torch.float32), harness.randn((4, 6), 2, torch.float32)],
        "conv2d": [harness.randn((2, 4, 6, 6), 1, torch.float32), harness.randn((5, 4, 3, 3), 2, torch.float32)],
        "batch_norm_uncentered": [harness.randn((2, 4, 3, 3), 1, torch.float32)],
        "layer_norm": [harness.randn((5, 6), 1, torch.float32)],
    }
    tensors["conv2d_batch_norm"] = [tensors["conv2d"][0].to(memory_format=torch.channels_last), tensors["conv2d"][1]]
    tensors = tensors[op]
    leaves = [t.requires_grad_() for t in tensors]

    def function(*leaves):
        if op == "batch_norm_uncentered":
            return bcos_kernels.batch_norm_uncentered(*leaves, torch.ones(4), training=option)
        if op == "conv2d_batch_norm":
            return bcos_kernels.conv2d_batch_norm(*leaves, running_var=torch.ones(5), training=option, detach=True)
        if op == "layer_norm":
            return bcos_kernels.layer_norm(*leaves, 6, detach=option)
        return getattr(bcos_kernels, op)(*leaves, b=option)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    compiled(*leaves).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for name, other in (("reference", "cpu"), ("cpu", "reference"), ("reference", "auto")):
            dispatch._last_run.clear()
            with bcos_kernels.backend(name):
                y = compiled(*leaves)
            assert bcos_kernels.dispatched() == {op: name}
            with bcos_kernels.backend(other):
                y.sum().backward()
            assert bcos_kernels.dispatched()[f"{op}_backward"] == name


# dispatched() ---------------------------------------------------------------------------------------------------------


def test_the_table():
    assert str(bcos_kernels.dispatched()) == "no op has run yet"
    with bcos_kernels.backend("reference"):
        linear().sum().backward()
        batch_norm_uncentered()
    assert str(bcos_kernels.dispatched()).splitlines() == [
        "batch_norm_uncentered  reference",
        "linear                 reference",
        "linear_backward        reference",
    ]


def test_the_table_is_a_copy():
    linear()
    table = bcos_kernels.dispatched()
    table["linear"] = "elsewhere"
    assert bcos_kernels.dispatched()["linear"] != "elsewhere"


# timed() --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_time_is_counted_per_op_and_backend(name):
    with bcos_kernels.timed() as seconds:
        assert seconds == {}
        with bcos_kernels.backend("reference"):
            OPS[name]().sum().backward()
    expected = {(name, "reference"), (f"{name}_backward", "reference")}
    assert set(seconds) == expected == {(op, backend) for op, backend in bcos_kernels.dispatched().items()}
    assert all(0 < value < 10 for value in seconds.values())
    OPS[name]()  # outside: not counted
    assert set(seconds) == expected


def test_a_fallbacks_time_is_the_fallbacks(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("not built")

    def slow(*arguments):
        time.sleep(0.05)
        return launch(*arguments)

    launch = dispatch._module("reference").linear_forward
    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", refuse)
    monkeypatch.setattr(dispatch._module("reference"), "linear_forward", slow)
    with warnings.catch_warnings(), bcos_kernels.timed() as seconds:
        warnings.simplefilter("ignore")
        linear()
        linear()
    assert set(seconds) == {("linear", "reference")} and 0.1 <= seconds["linear", "reference"] < 1


def test_only_one_timing_at_a_time():
    with bcos_kernels.timed():
        with pytest.raises(RuntimeError, match="timed: expected one at a time"), bcos_kernels.timed():
            pass
    with pytest.raises(ZeroDivisionError), bcos_kernels.timed():
        raise ZeroDivisionError
    with bcos_kernels.timed() as seconds:  # it is over after an error, too
        linear()
    assert len(seconds) == 1
