"""The autograd Functions of layer normalisation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import reference
from .autograd import (
    backward_of,
    edges,
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


class LayerNorm(torch.autograd.Function):
    """(x, weight, bias, dims, eps, detach, emits_squares) → y, mean, rstd, squares."""

    @staticmethod
    def forward(x, weight, bias, dims, eps, detach, emits_squares):
        return run("layer_norm", x, dims, weight, bias, eps, detach, emits_squares)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.dims, ctx.eps, ctx.detach, _ = inputs
        _, mean, rstd, squares = output
        ctx.mark_non_differentiable(mean, rstd, squares)
        ctx.set_materialize_grads(False)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.edges = edges(x, weight, bias)
        ctx.backend = ran_backend()
        ctx.save_for_backward(kept_input(ctx, x), weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 7
        x, weight, bias, mean, rstd = ctx.saved_tensors
        x = input_of(ctx, x)
        needs = needed(ctx)
        gradients = backward_of(
            LayerNormBackward, "layer_norm_backward", dy, x, ctx.dims, weight, bias, mean, rstd, ctx.eps, ctx.detach,
            needs, ctx.backend,
        )  # fmt: skip
        return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, *options):
        if any(d is not None for d in in_dims[1:3]):
            return sliced_keeping_empty(LayerNorm.apply, info, in_dims, (x, weight, bias, *options))
        results = LayerNorm.apply(x.movedim(in_dims[0], 0), weight, bias, *options)
        return results, (0, 0, 0, 0 if options[-1] else None)


class LayerNormBackward(torch.autograd.Function):
    """Gradients of `LayerNorm`; differentiable through the definition."""

    @staticmethod
    def forward(dy, x, dims, weight, bias, mean, rstd, eps, detach, needs, backend):
        return run("layer_norm_backward", dy, x, dims, weight, bias, mean, rstd, eps, detach, needs, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, ctx.dims, weight, bias, _, _, ctx.eps, ctx.detach, ctx.needs, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, bias)

    @staticmethod
    def backward(ctx, *cotangents):
        dy, x, weight, bias = ctx.saved_tensors
        shape = x.shape[x.dim() - ctx.dims :]

        def definition(x, weight, bias):
            return reference.layer_norm(x, shape, weight, bias, ctx.eps, detach=ctx.detach)

        gradients = second_order(definition, (x, weight, bias), ctx.needs, dy, cotangents)
        # (dy, x, dims, weight, bias, mean, …)
        return (gradients[0], gradients[1], None, gradients[2], gradients[3], *(None,) * 6)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        needs = arguments[9]
        if any(d is not None for d in in_dims[3:5]) or any(needs[1:]):
            return sliced_keeping_empty(LayerNormBackward.apply, info, in_dims, arguments)

        def batched(i: int) -> Tensor:
            t, dim = arguments[i], in_dims[i]
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        dy, x, mean, rstd = map(batched, (0, 1, 5, 6))
        results = LayerNormBackward.apply(dy, x, *arguments[2:5], mean, rstd, *arguments[7:])
        return results, (0 if needs[0] else None, None, None)


def _layer_norm(x, dims, weight, bias, eps, detach=False, emits_squares=False):
    return whole(LayerNorm, x, weight, bias, dims, eps, detach, emits_squares)


register_autograd("layer_norm", _layer_norm)
register_autograd("layer_norm_backward", partial(whole, LayerNormBackward))
