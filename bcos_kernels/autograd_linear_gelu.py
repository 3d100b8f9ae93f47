"""The autograd Functions of a B-cos linear layer with a GELU behind it.

What lies between the two, y, is seen by nobody and simply saved.
"""

from __future__ import annotations

from functools import partial

import torch

from . import reference
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
    second_order,
    sliced_keeping_empty,
    whole,
)
from .ops import run


class LinearGelu(torch.autograd.Function):
    """(x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares) → h, squares, y,
    n, a, index."""

    @staticmethod
    def forward(x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares):
        return run(
            "linear_gelu", x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, b_tensor, _, ctx.b, ctx.normalize_weight, ctx.max_out, _, ctx.detach, _ = inputs
        _, _, y, n, a, index = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.edges = edges(x, weight, bias, b_tensor)
        ctx.backend = ran_backend()
        ctx.save_for_backward(kept_input(ctx, x), weight, bias, b_tensor, y, n, a, index)

    @staticmethod
    def backward(ctx, dh, *_):
        if dh is None:
            return (None,) * 11
        x, weight, bias, b_tensor, y, n, a, index = ctx.saved_tensors
        x = input_of(ctx, x)
        needs = needed(ctx)
        gradients = backward_of(
            LinearGeluBackward, "linear_gelu_backward", dh, x, weight, bias, b_tensor, y, n, a, index, ctx.b,
            ctx.normalize_weight, ctx.max_out, ctx.detach, needs, ctx.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return (*grads, *(None,) * 7)

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
    options = (squares, b, normalize_weight, max_out, True, detach, emits_squares)
    return whole(LinearGelu, x, weight, bias, constant(b_tensor, detach), *options)


register_autograd("linear_gelu", _linear_gelu)
register_autograd("linear_gelu_backward", partial(whole, LinearGeluBackward))
