"""The autograd Functions of a B-cos convolution with a batch normalisation behind it, and what they recompute.

What lies between the two, y, is seen by nobody and simply saved; of z, which the user may change, what autograd.py says
of outputs holds.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import composed, dispatch, reference
from .autograd import (
    MASK_FROM_INPUT,
    again,
    backward_of,
    constant,
    edges,
    exponent,
    hold,
    input_of,
    kept_input,
    needed,
    ran_backend,
    register_autograd,
    saved_tensor_hooks_active,
    second_order,
    sliced_keeping_empty,
    unchanged,
    whole,
)
from .layouts import canonical
from .ops import functorch_active, run
from .recompute import Recipe

RECOMPUTES = {None: (False, False), "output": (True, False), "inner": (False, True), "both": (True, True)}


def _declare_recipes(ctx, inputs, output, recompute: str) -> None:
    """Leave with z how to compute it again from y, and with the context how to compute y again from x, where wanted."""
    of_z, of_y = RECOMPUTES[recompute]
    x, weight, bias, b_tensor, norm_weight, norm_bias = inputs[:6]
    squares, layer, (eps, activation) = inputs[8], list(inputs[9:16]), inputs[17:19]
    z, _, y, n, *_, var = output
    if ctx.detach and not ctx.training:
        return  # the slope is kept instead of y
    name = dispatch.backend_of(ctx.backend)  # where the forward ran, for the same bits
    pre_scale = composed.keeps_pre_scale(name, x.dtype, layer[4], b_tensor, layer[6])
    if pre_scale:
        layer[4] = 1.0  # y is a
    # the functions must not capture a tensor: they live as long as the graph
    if of_y:
        has = tuple(t is not None for t in (bias, b_tensor, squares))

        def convolved(x, weight, *given):
            bias, b_tensor, squares = _fill(given, has)
            with dispatch.backend(name):
                return run("conv2d", x, weight, bias, b_tensor, *layer, False, False, squares)[0]

        ctx.y_recipe = Recipe(convolved, (x, weight, *_present(bias, b_tensor, squares)))
        ctx.y_recipe.holders += 1
        y._bcos_recipe = (ctx.y_recipe, y._version)
    if of_z:
        affine = (norm_weight is not None, norm_bias is not None)

        def normalized(y, n, var, *given):
            norm_weight, norm_bias = _fill(given, affine)
            if pre_scale:
                y = composed.scaled(y, n)
            with dispatch.backend(name):
                return run("batch_norm_uncentered", y, norm_weight, norm_bias, None, var, False, eps, activation)[0]

        z._bcos_recipe = (Recipe(normalized, (y, n, var, *_present(norm_weight, norm_bias))), z._version)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _fill(present: tuple[Tensor, ...], has: tuple[bool, ...]) -> list[Tensor | None]:
    """The tensors that are there, with None where there is none."""
    rest = iter(present)
    return [next(rest) if there else None for there in has]


class Conv2dBatchNorm(torch.autograd.Function):
    """(x, weight, bias, b_tensor, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation,
    groups, b, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares, recompute) → z,
    squares, y, n, a, index, mean, var. `recompute`, a key of RECOMPUTES, says what is not kept."""

    @staticmethod
    def forward(
        x, weight, bias, b_tensor, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation,
        groups, b, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares, recompute,
    ):  # fmt: skip
        return run(
            "conv2d_batch_norm",
            x, weight, bias, b_tensor, norm_weight, norm_bias, residual, running_var, squares, stride, padding,
            dilation, groups, b, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, b_tensor, norm_weight, norm_bias, residual = inputs[:7]
        ctx.layer = inputs[9:16]  # stride … max_out
        ctx.training, ctx.eps, ctx.activation, _, ctx.detach, _, recompute = inputs[16:]
        z, squares, y, n, a, index, mean, var = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.edges = edges(x, weight, bias, b_tensor, norm_weight, norm_bias, residual)
        ctx.backend = ran_backend()
        # z is read for the ReLU's mask only; without a residual the kernels take that from y
        masked = ctx.activation is not None and not (residual is None and ctx.backend.endswith(MASK_FROM_INPUT))
        hold(ctx, z, masked and not ctx.compiled)
        ctx.y_recipe = None
        if recompute is not None and not (ctx.compiled or functorch_active() or saved_tensor_hooks_active()):
            _declare_recipes(ctx, inputs, output, recompute)
        ctx.save_for_backward(
            kept_input(ctx, x), weight, bias, b_tensor, norm_weight, norm_bias,
            z if masked and ctx.held is None else None, y if ctx.y_recipe is None else None, n, a, index, mean, var,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dz, *_):
        if dz is None:
            return (None,) * 23
        x, weight, bias, b_tensor, norm_weight, norm_bias, z, y, n, a, index, mean, var = ctx.saved_tensors
        x = input_of(ctx, x)
        if ctx.y_recipe is not None:
            y = again(ctx, "y_recipe")
        if ctx.held is not None:
            z = unchanged(ctx, "conv2d_batch_norm")
        needs = needed(ctx)
        passes_on = needs[6] and ctx.activation is None  # the residual's gradient is dz itself
        asked = [*needs[:6], needs[6] and not passes_on]
        gradients = backward_of(
            Conv2dBatchNormBackward, "conv2d_batch_norm_backward", dz, x, weight, bias, b_tensor, norm_weight,
            norm_bias, z, y, n, a, index, mean, var, *ctx.layer, ctx.training, ctx.eps, ctx.activation, ctx.detach,
            asked, ctx.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip(gradients, asked, strict=True)]
        if passes_on:
            grads[6] = dz
        return (*grads, *(None,) * 16)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return sliced_keeping_empty(Conv2dBatchNorm.apply, info, in_dims, arguments)


class Conv2dBatchNormBackward(torch.autograd.Function):
    """Gradients of `Conv2dBatchNorm`; differentiable through the definition, from x and the parameters."""

    @staticmethod
    def forward(
        dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation,
        groups, b, normalize_weight, max_out, training, eps, activation, detach, needs, backend,
    ):  # fmt: skip
        return run(
            "conv2d_batch_norm_backward",
            dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding,
            dilation, groups, b, normalize_weight, max_out, training, eps, activation, detach, needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z = inputs[:8]
        var = inputs[13]
        ctx.window, (ctx.b, ctx.normalize_weight, ctx.max_out) = inputs[14:18], inputs[18:21]
        ctx.training, ctx.eps, ctx.activation, ctx.detach, ctx.needs, _ = inputs[21:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z, var)

    @staticmethod
    def backward(ctx, *cotangents):
        dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z, var = ctx.saved_tensors
        residual = torch.zeros_like(dz) if ctx.needs[6] else None

        def definition(x, weight, bias, b_tensor, norm_weight, norm_bias, residual):
            y = reference.conv2d(
                canonical(x), canonical(weight), bias, *ctx.window, b=exponent(ctx.b, b_tensor),
                normalize_weight=ctx.normalize_weight, max_out=ctx.max_out, detach=ctx.detach,
            )  # fmt: skip
            out = reference.batch_norm_uncentered(
                y, None if ctx.training else var, norm_weight, norm_bias, training=ctx.training, eps=ctx.eps,
                residual=residual, detach=ctx.detach,
            )  # fmt: skip
            # the mask is piecewise constant; where there was a residual it is in z alone
            return out if ctx.activation is None else torch.where((out if z is None else z).detach() <= 0, 0.0, out)

        inputs = (x, weight, bias, b_tensor, norm_weight, norm_bias, residual)
        gradients = second_order(definition, inputs, ctx.needs, dz, cotangents)
        # (dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z, …)
        return (*gradients[:7], *(None,) * 20)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return sliced_keeping_empty(Conv2dBatchNormBackward.apply, info, in_dims, arguments)


def _conv2d_batch_norm(x, weight, bias, b_tensor, *options):
    """As the others: what a backward takes is kept whether ``keep`` says so or not."""
    options = list(options)
    options[15] = True
    return whole(Conv2dBatchNorm, x, weight, bias, constant(b_tensor, options[16]), *options, None)


register_autograd("conv2d_batch_norm", _conv2d_batch_norm)
register_autograd("conv2d_batch_norm_backward", partial(whole, Conv2dBatchNormBackward))
