"""What the tests of the ops share: awkward inputs, and running a backend with nothing else to fall back on."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import shlex
import shutil
from functools import cache
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import bcos_kernels
from bcos_kernels import dispatch, reference

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

# What the ops' fakes and the public functions take from reference.py: shapes and types, no mathematics of an op.
_HELPERS = {"statistics_dtype", "keeps_pre_scale", "same_padding"}


def has_compiler() -> bool:
    """Whether there is a C++ compiler, by setup.py's rule: CXX, else c++, g++ or clang++."""
    return find_compiler() is not None


def find_compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((c for c in candidates if shutil.which(c[0])), None)


# A missing C++ backend is an error wherever a compiler could have built it.
BACKENDS = [
    "reference",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            bcos_kernels.backends()["cpu"] is not None and not has_compiler(),
            reason="no C++ compiler here, and the C++ backend is not built",
        ),
    ),
]


@contextlib.contextmanager
def only(name: str, *ops: str):
    """Select backend ``name``; nothing of reference.py can be called unless that is the backend; at the end, exactly
    ``ops`` have run, all of them there."""
    with contextlib.ExitStack() as stack:
        if name != "reference":
            for function, value in vars(reference).items():
                if inspect.isfunction(value) and value.__module__ == reference.__name__ and function not in _HELPERS:
                    stack.enter_context(mock.patch.object(reference, function, _forbidden(function)))
        stack.enter_context(bcos_kernels.backend(name))
        dispatch._last_run.clear()
        yield
        assert dict(bcos_kernels.dispatched()) == dict.fromkeys(ops, name)


def _forbidden(function: str):
    def called(*args, **kwargs):
        raise AssertionError(f"reference.{function} was called while another backend was named")

    return called


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers from −4 to 4."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def signs(shape: tuple[int, ...], seed: int, dtype: torch.dtype, nonzeros: int = 16) -> Tensor:
    """Units (dimension 0) of which ``nonzeros`` values are ±1 and the others 0: of norm 4 for 16 of them.

    With `integers` as the input, every pre-scale output is a small whole number (or a quarter of one after weight
    normalisation), exact in every dtype, so that which unit is the largest does not depend on rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    units, size = shape[0], torch.Size(shape[1:]).numel()
    order = torch.rand(units, size, generator=generator).argsort(1)
    values = torch.randint(0, 2, (units, size), generator=generator) * 2 - 1
    return torch.where(order < nonzeros, values, 0).view(shape).to(dtype)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of t in another layout: "contiguous", "channels_last", "strided" (every second element of a tensor
    filled with NaN), "transposed" (the last two dimensions stored the other way round), "expanded" (the first sample
    for all), "offset" (not aligned to more than an element)."""
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
    if layout == "offset":
        return torch.cat([t.new_full((1,), float("nan")), t.reshape(-1)])[1:].view(t.shape)
    raise ValueError(layout)


def leaves_of(inputs: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Every tensor as a leaf that requires a gradient, in its layout, converted to ``dtype`` if given."""
    return {name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for name, t in inputs.items()}


def gradients(y: Tensor, leaves: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor | None]:
    """∂L/∂leaf of each leaf ("dx" for "x"); None for one that nothing flows to."""
    present = {name: t for name, t in leaves.items() if t is not None}
    found = torch.autograd.grad(y, list(present.values()), dy.to(y.dtype), allow_unused=True)
    return {f"d{name}": g for name, g in zip(present, found, strict=True)}


def conv2d_batch_norm(module):
    """``module.conv2d_batch_norm``; of reference.py, which has the two ops alone, what it is equivalent to."""
    if module is not reference:
        return module.conv2d_batch_norm

    def definition(
        x, weight, bias=None, *window, running_var, norm_weight=None, norm_bias=None, training, activation=None,
        residual=None, detach=False, eps=1e-5, momentum=0.1, recompute=None, **convolution,
    ):  # fmt: skip
        y = reference.conv2d(x, weight, bias, *window, detach=detach, **convolution)
        return reference.batch_norm_uncentered(
            y, running_var, norm_weight, norm_bias, training=training, momentum=momentum, eps=eps,
            activation=activation, residual=residual, detach=detach,
        )  # fmt: skip

    return definition


def linear_gelu(module):
    """``module.linear_gelu``; of reference.py, which has its two parts alone, what it is equivalent to."""
    if module is not reference:
        return module.linear_gelu

    def definition(x, weight, bias=None, *, detach=False, recompute=None, **options):
        return reference.gelu(reference.linear(x, weight, bias, detach=detach, **options), detach=detach)

    return definition


def second_derivatives(function, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """First derivatives of a nonlinear function of the outputs, and the second ones along random directions; zeros
    where nothing flows."""
    y = function(*tensors)
    dy = randn(tuple(y.shape), 20, y.dtype).requires_grad_()
    first = torch.autograd.grad(y, tensors, dy, create_graph=True, allow_unused=True)
    first = [torch.zeros_like(t) if g is None else g for g, t in zip(first, tensors, strict=True)]
    along = sum((g * randn(tuple(g.shape), 30 + i, g.dtype)).sum() for i, g in enumerate(first))
    second = torch.autograd.grad(along, [*tensors, dy], allow_unused=True)
    return first, [torch.zeros_like(t) if g is None else g for g, t in zip(second, [*tensors, dy], strict=True)]


@cache
def convolutions_have_second_derivatives_of_symbolic_sizes() -> bool:
    """Whether torch's own do, in graphs with sizes left open. Those of 2.11 raise."""

    def second(x, weight):
        (first,) = torch.autograd.grad(F.conv2d(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    tensors = [torch.ones(shape, requires_grad=True) for shape in ((2, 3, 4, 4), (2, 3, 2, 2))]
    try:
        make_fx(second, tracing_mode="symbolic")(*tensors)
    except RuntimeError as error:
        assert "symbolic sizes" in str(error)
        return False
    return True


def kept_bytes(forward) -> int:
    """Allocator bytes alive after ``forward`` minus before, its result held."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = forward()
    events = profile.profiler.kineto_results.events()
    total = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del result
    return total
