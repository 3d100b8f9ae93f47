"""The autograd Functions of a B-cos linear layer with a GELU behind it.

What lies between the two, y, is seen by nobody and simply saved.
"""

from __future__ import annotations

from functools import partial

import torch

from . import dispatch, reference
from .autograd import (
    backward_of,
    constant,
    edges,
    exponent,
    input_of,
    kept_input,
    needed,
    ran_backend,
    register_autograd,
    saved_tensor_hooks_active,
    second_order,
    sliced_keeping_empty,
    whole,
)
from .ops import functorch_active, run
from .recompute import Recipe

RECOMPUTES = (None, "output")


def _declare_recipe(ctx, inputs, output) -> None:
    """Leave with h how to compute it again from what is kept."""
    h, _, y, n, *_ = output
    again = dispatch.kept_by(dispatch.backend_of(ctx.backend), "linear_gelu_again")  # where the forward ran
    plain = inputs[3] is None and ctx.b == 2 and ctx.max_out == 1
    h._bcos_recipe = (Recipe(partial(again, plain=plain), (y, n)), h._version)


class LinearGelu(torch.autograd.Function):
    """(x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares, recompute) → h,
    squares, y, n, a, index. `recompute`, one of RECOMPUTES, says what is not kept."""

    @staticmethod
    def forward(
        x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares, recompute,
    ):  # fmt: skip
        return run(
            "linear_gelu", x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, b_tensor, _, ctx.b, ctx.normalize_weight, ctx.max_out, _, ctx.detach, _, recompute = inputs
        _, _, y, n, a, index = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.edges = edges(x, weight, bias, b_tensor)
        ctx.backend = ran_backend()
        if recompute is not None and not (ctx.compiled or functorch_active() or saved_tensor_hooks_active()):
            _declare_recipe(ctx, inputs, output)
        ctx.save_for_backward(kept_input(ctx, x), weight, bias, b_tensor, y, n, a, index)

    @staticmethod
    def backward(ctx, dh, *_):
        if dh is None:
            return (None,) * 12
        x, weight, bias, b_tensor, y, n, a, index = ctx.saved_tensors
        x = input_of(ctx, x)
        needs = needed(ctx)
        gradients = backward_of(
            LinearGeluBackward, "linear_gelu_backward", dh, x, weight, bias, b_tensor, y, n, a, index, ctx.b,
            ctx.normalize_weight, ctx.max_out, ctx.detach, needs, ctx.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return (*grads, *(None,) * 8)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return sliced_keeping_empty(LinearGelu.apply, info, in_dims, arguments)


class LinearGeluBackward(torch.autograd.Function):
    """Gradients of `LinearGelu`; differentiable through the definition, from x and weight."""

    @staticmethod
    def forward(dh, x, weight, bias, b_tensor, y, n, a, index, b, normalize_weight, max_out, detach, needs, backend):
        return run(
            "linear_gelu_backward", dh, x, weight, bias, b_tensor, y, n, a, index, b, normalize_weight, max_out, detach,
            needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        dh, x, weight, bias, b_tensor = inputs[:5]
        ctx.b, ctx.normalize_weight, ctx.max_out, ctx.detach, ctx.needs, _ = inputs[9:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dh, x, weight, bias, b_tensor)

    @staticmethod
    def backward(ctx, *cotangents):
        dh, x, weight, bias, b_tensor = ctx.saved_tensors

        def definition(x, weight, bias, b_tensor):
            y = reference.linear(
                x, weight, bias, b=exponent(ctx.b, b_tensor), normalize_weight=ctx.normalize_weight,
                max_out=ctx.max_out, detach=ctx.detach,
            )  # fmt: skip
            return reference.gelu(y, detach=ctx.detach)

        gradients = second_order(definition, (x, weight, bias, b_tensor), ctx.needs, dh, cotangents)
        return (*gradients, *(None,) * 10)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return sliced_keeping_empty(LinearGeluBackward.apply, info, in_dims, arguments)


def _linear_gelu(x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares):
    """What a backward takes is kept whether ``keep`` says so or not."""
    options = (squares, b, normalize_weight, max_out, True, detach, emits_squares, None)
    return whole(LinearGelu, x, weight, bias, constant(b_tensor, detach), *options)


register_autograd("linear_gelu", _linear_gelu)
register_autograd("linear_gelu_backward", partial(whole, LinearGeluBackward))
