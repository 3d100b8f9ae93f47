"""How many floating-point operations the ops take, for torch.utils.flop_counter.FlopCounterMode.

Counted as torch counts its own layers: two per multiply-add of the matrix product or convolution, nothing for passes
over elements (norms, scaling, normalisations). A backward that has to compute the pre-scale outputs again counts
them again.

The formulas are registered when the counter is imported: importing it here would import Triton too (over a second).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod

import torch

_COUNTER = "torch.utils.flop_counter"


def linear(x, weight, *options, **others) -> int:
    """x (M, K), weight (U, K): 2 M K U."""
    return 2 * x.shape[0] * weight.numel()


def linear_backward(dy, x, weight, bias, b_tensor, y, n, a, index, b, *options, **others) -> int:
    """dx and dw: as many as the forward each."""
    needs = options[3]
    return (needs[0] + needs[1] + _again(b_tensor, b, y, a)) * linear(x, weight)


def conv2d(x, weight, bias, b_tensor, stride, padding, dilation, *options, out_val, **others) -> int:
    """x (N, C, H, W), weight (U, C/G, R, S), P x Q positions: 2 N P Q U C/G R S."""
    return _convolution(weight, out_val[0])


def conv2d_backward(
    dy, x, weight, bias, b_tensor, y, n, a, index, stride, padding, dilation, groups, b, *options, **others
) -> int:
    """dx and dw: as many as the forward each."""
    needs = options[3]
    return (needs[0] + needs[1] + _again(b_tensor, b, y, a)) * _convolution(weight, dy)


def normalization(*arguments, **others) -> int:
    """0: passes over elements are not counted."""
    return 0


def conv2d_batch_norm(x, weight, *options, out_val, **others) -> int:
    """The convolution's."""
    return _convolution(weight, out_val[0])


def conv2d_batch_norm_backward(dz, x, weight, bias, b_tensor, *options, **others) -> int:
    """dx and dw: as many as the forward each, and again where y was not kept."""
    y, needs = options[3], options[20]
    return (needs[0] + needs[1] + (not y.numel())) * _convolution(weight, dz)


def linear_gelu(x, weight, *options, **others) -> int:
    """The linear layer's."""
    return linear(x, weight)


def linear_gelu_backward(dh, x, weight, *options, **others) -> int:
    """dx and dw: as many as the forward each."""
    needs = options[-2]
    return (needs[0] + needs[1]) * linear(x, weight)


def _convolution(weight: torch.Tensor, y: torch.Tensor) -> int:
    return 2 * y.shape[0] * prod(y.shape[2:]) * weight.numel()


def _again(b_tensor, b: float, y, a: torch.Tensor) -> bool:
    """Whether a backward computes the pre-scale outputs again: neither y nor they were kept."""
    linear_in_a = b_tensor is None and b == 1
    return y is None and not a.numel() and not linear_in_a


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {
        "linear": linear,
        "linear_backward": linear_backward,
        "conv2d": conv2d,
        "conv2d_backward": conv2d_backward,
        "conv2d_batch_norm": conv2d_batch_norm,
        "conv2d_batch_norm_backward": conv2d_batch_norm_backward,
        "linear_gelu": linear_gelu,
        "linear_gelu_backward": linear_gelu_backward,
        "batch_norm_uncentered": normalization,
        "batch_norm_uncentered_backward": normalization,
        "layer_norm": normalization,
        "layer_norm_backward": normalization,
    }
    for name, formula in formulas.items():
        op = getattr(torch.ops.bcos_kernels, name)
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)


class _AfterCounter:
    """Import hook that registers the formulas right after the counter's module has run, then takes itself away."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def register_with_counter() -> None:
    """Register the formulas now if the counter is imported, else as soon as it is."""
    if _COUNTER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterCounter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterCounter())
