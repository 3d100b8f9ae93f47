"""The autograd Functions around the ops: what is kept for the backward, second order, vmap.

An autograd Function (with `setup_context` and a vmap rule) wraps each op: the forward's Function, and the backward's
Function, whose own backward is autograd through the definition in reference.py.

What the forward's Function keeps for B = 2 is y and n. y is handed to the user, who may change it in place
(``out += identity``), and `save_for_backward` of an output then raises; so eager code holds ``y.detach()`` together
with its version, uses it while it is unchanged and recomputes from x and w otherwise. Compiled code keeps a clone
(which the compiler drops where nothing writes to y). Under torch.func transforms and active saved-tensor hooks
(activation checkpointing, offload) y is not held at all.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import Tensor

from . import dispatch, ops, reference
from .layouts import canonical
from .ops import forward_mode, functorch_active, run
from .recompute import Recipe, recipe_of


@cache
def _without_setup_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function in the older form, whose context is set up inside forward, for plain eager code.

    What torch.func and the compiler need `setup_context` for costs 140 µs a call in eager: torch binds the arguments
    to forward's signature. And they need everything that is kept to be an output; here y alone is one of a layer's.
    """
    keep = getattr(function, "keep", None)

    def forward(ctx, *arguments):
        if keep is None:
            output = function.forward(*arguments)
            function.setup_context(ctx, arguments, output)
            return output
        y, *kept = function.launch(*arguments)
        keep(ctx, arguments, y, *kept)
        return y

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), members)


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply`` in the form that serves the moment: traced or transformed, or plain eager."""
    if forward_mode():
        return _apply_in_forward_mode(function, *arguments)
    if torch.compiler.is_compiling() or functorch_active():
        return function.apply(*arguments)
    return _without_setup_context(function).apply(*arguments)


def _apply_in_forward_mode(function: type[torch.autograd.Function], *arguments):
    """``function.apply``, which serves what has no tangents; torch's message about the others names no op.

    The Functions cannot say it themselves, in a ``jvp`` that raises: the compiler takes none that has one.
    """
    try:
        return function.apply(*arguments)
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        op = re.sub("(?<!^)(?=[A-Z])", "_", function.__name__).lower()
        raise NotImplementedError(
            f"{op}: expected reverse-mode differentiation (backward, vjp, jacrev, jacrev of jacrev), got forward mode "
            "(jvp, jacfwd, torch.func.hessian, forward_ad), which is not built"
        ) from None


def apply_layer(function: type[torch.autograd.Function], *arguments) -> Tensor:
    """The output of `Linear` or `Conv2d`."""
    if forward_mode():
        return _apply_in_forward_mode(function, *arguments)[0]
    if torch.compiler.is_compiling() or functorch_active():
        return function.apply(*arguments)[0]
    return _without_setup_context(function).apply(*arguments)


def backward_of(function: type[torch.autograd.Function], name: str, *arguments):
    """A backward: through its own Function only where somebody may differentiate it again."""
    if torch.compiler.is_compiling() or functorch_active() or torch.is_grad_enabled() or forward_mode():
        return apply(function, *arguments)
    return run(name, *arguments, fill=False)


def saved_tensor_hooks_active() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def hold(ctx, y: Tensor, wanted: bool) -> None:
    """Hold the output for the backward without pinning its version (see the module docstring)."""
    ctx.held = None
    if wanted and not functorch_active() and not saved_tensor_hooks_active():
        ctx.held = y.detach()
        ctx.held_version = y._version


def _release(ctx) -> Tensor | None:
    """The held output if it is unchanged. It is let go with the graph's other buffers unless the graph is retained."""
    held = ctx.held
    if isinstance(held, Recipe):
        value = held.take()
    else:
        value = held if held is None or held._version == ctx.held_version else None
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.held = None
    return value


def unchanged(ctx, op: str) -> Tensor:
    """The held output of a ReLU, which has to be as it was."""
    output = _release(ctx)
    if output is None:  # as with torch's own ReLU
        raise RuntimeError(
            f"{op}: expected its output unchanged, as its ReLU's gradient needs it, got one that was modified by an "
            "inplace operation"
        )
    return output


def kept_input(ctx, x: Tensor) -> Tensor | None:
    """x as it is to be saved: None where its recipe is kept instead."""
    ctx.recipe = None if ctx.compiled or saved_tensor_hooks_active() else recipe_of(x)
    if ctx.recipe is None:
        return x
    ctx.recipe.holders += 1
    return None


def input_of(ctx, saved: Tensor | None) -> Tensor:
    """The input, saved or computed again."""
    return saved if ctx.recipe is None else again(ctx, "recipe")


def again(ctx, name: str) -> Tensor:
    """What the recipe under this name in the context gives."""
    recipe = getattr(ctx, name)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "recomputed: expected a backward without create_graph, as an activation that is computed again is no part "
            "of a graph; got one with it (memory='low' of bcosification.fuse does this: use memory='default')"
        )
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        setattr(ctx, name, None)
    return recipe.take()


def edges(*inputs) -> tuple[int, ...]:
    """Which of a node's edges belongs to each input: those that are no tensors have none (−1)."""
    edges, count = [], 0
    for t in inputs:
        edges.append(count if isinstance(t, Tensor) else -1)
        count += isinstance(t, Tensor)
    return tuple(edges)


def needed(ctx) -> list[bool]:
    """Which inputs' gradients this backward is asked for: of those that require one, those that lead to what
    ``torch.autograd.grad`` or ``backward(inputs=…)`` names. An input gradient does not pay for weight gradients."""
    needs = [bool(ctx.needs_input_grad[i]) for i in range(len(ctx.edges))]
    if ctx.compiled or torch.compiler.is_compiling() or functorch_active() or torch._C._current_graph_task_id() == -1:
        return needs
    nodes = ctx.next_functions
    return [need and _runs(nodes[edge][0]) for need, edge in zip(needs, ctx.edges, strict=True)]


def _runs(node) -> bool:
    """Whether the engine, in the backward that is running, goes on to ``node``."""
    if node is None:
        return True
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what torch answers of a leaf that autograd.grad was asked for
        return True


def no_autocast(device: torch.device):
    """For what is computed in its tensors' types: a derivative in its forward's, also inside an autocast region."""
    enabled = dispatch.autocast_enabled(device)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def second_order(definition, inputs: tuple, needs, dy: Tensor, cotangents: tuple) -> tuple:
    """Gradient of a backward: autograd through ``definition(*inputs)``. Returns gradients of (dy, *inputs).

    Inputs that are part of a graph stay connected to it, so that gradients of any further order follow.
    """
    wanted = [i for i, need in enumerate(needs) if need and cotangents[i] is not None]
    if not wanted:
        return (None,) * (1 + len(inputs))
    with no_autocast(dy.device):
        if functorch_active():
            return _second_order_transformed(definition, inputs, wanted, dy, cotangents)
        return _second_order_by_graph(definition, inputs, wanted, dy, cotangents)


def _second_order_by_graph(definition, inputs, wanted, dy, cotangents) -> tuple:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (dy, *inputs)
        ]
        y = definition(*aliases[1:])
        first = torch.autograd.grad(
            y, [aliases[1 + i] for i in wanted], aliases[0], create_graph=True, allow_unused=True
        )  # fmt: skip
        pairs = [(g, cotangents[i]) for g, i in zip(first, wanted, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return (None,) * len(aliases)
        present = [t for t in aliases if t is not None]
        gradients = torch.autograd.grad(
            [g for g, _ in pairs], present, [c for _, c in pairs], create_graph=create_graph, allow_unused=True
        )
    found = iter(gradients)
    return tuple(None if t is None else next(found) for t in aliases)


def _second_order_transformed(definition, inputs, wanted, dy, cotangents) -> tuple:
    """The same inside torch.func transforms, which know no requires_grad_()."""
    places = [i for i, t in enumerate(inputs) if t is not None]

    def of_present(*present):
        arguments = dict(zip(places, present, strict=True))
        return definition(*(arguments.get(i) for i in range(len(inputs))))

    def first_order(dy, *present):
        _, pull_back = torch.func.vjp(of_present, *present)
        gradients = dict(zip(places, pull_back(dy), strict=True))
        return tuple(gradients[i] for i in wanted)

    _, pull_back = torch.func.vjp(first_order, dy, *(inputs[i] for i in places))
    of_dy, *others = pull_back(tuple(cotangents[i] for i in wanted))
    found = dict(zip(places, others, strict=True))
    return (of_dy, *(found.get(i) for i in range(len(inputs))))


def exponent(b: float, b_tensor: Tensor | None) -> float | Tensor:
    return b if b_tensor is None else b_tensor


def _keep_y(y: Tensor, b: float, b_tensor: Tensor | None, keep: bool) -> bool:
    return keep and b_tensor is None and b == 2 and y.dtype != torch.float16


def _compiled_copy(y: Tensor, keep: bool) -> Tensor:
    return y.clone() if keep and torch.compiler.is_compiling() else y.new_empty((0,))


MASK_FROM_INPUT = ("cpu", "triton", "cuda")
"""Backends whose kernels find a ReLU's mask again from what they normalise."""


def ran_backend() -> str:
    """What ran the forward, for a context; "" where it is being traced: it would stay in the graph."""
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return "" if tracing else dispatch.last_backend()


def _sliced(function, info, in_dims, arguments, dimensions: int) -> tuple:
    """vmap by a loop over the batch: for what cannot be folded into an existing dimension."""
    results = []
    for i in range(info.batch_size):
        # options that are lists have a list of dimensions, all None
        slices = (v.select(d, i) if isinstance(d, int) else v for v, d in zip(arguments, in_dims, strict=True))
        results.append(function(*slices))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * dimensions


def _folded(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Batch dimension of vmap folded into dimension 0 (a tensor without one is repeated)."""
    if t is None or t.numel() == 0 and t.dim() <= 2 and dim is None:
        return t
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1) if t.dim() > 1 else t


def _unfold(results, size: int) -> tuple:
    """Undo `_folded` on outputs; tensors that stand for "nothing" (shape (0,)) stay unbatched."""
    values, dims = [], []
    for t in results:
        nothing = t.dim() == 1 and t.numel() == 0
        values.append(t if nothing else t.unflatten(0, (size, t.shape[0] // size if size else 0)))
        dims.append(None if nothing else 0)
    return tuple(values), tuple(dims)


class Linear(torch.autograd.Function):
    """(x, weight, bias, b_tensor, b, normalize_weight, max_out, detach, keep, squares) → y, n, a, index, copy of y."""

    @staticmethod
    def launch(x, weight, bias, b_tensor, b, normalize_weight, max_out, detach, keep, squares):
        return run("linear", x, weight, bias, b_tensor, b, normalize_weight, max_out, keep, detach, squares)

    @staticmethod
    def forward(x, weight, bias, b_tensor, b, normalize_weight, max_out, detach, keep, squares):
        y, n, a, index = Linear.launch(x, weight, bias, b_tensor, b, normalize_weight, max_out, detach, keep, squares)
        return y, n, a, index, _compiled_copy(y, _keep_y(y, b, b_tensor, keep))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        Linear.keep(ctx, inputs, *output)

    @staticmethod
    def keep(ctx, inputs, y, n, a, index, copy=None):
        x, weight, bias, b_tensor, ctx.b, ctx.normalize_weight, ctx.max_out, ctx.detach, keep, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.edges = edges(x, weight, bias, b_tensor)
        ctx.save_for_backward(kept_input(ctx, x), weight, bias, b_tensor, n, a, index, copy)
        ctx.backend = ran_backend()
        if not ctx.compiled:
            hold(ctx, y, _keep_y(y, ctx.b, b_tensor, keep))

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 10
        x, weight, bias, b_tensor, n, a, index, copy = ctx.saved_tensors
        x = input_of(ctx, x)
        y = (copy if copy.numel() else None) if ctx.compiled else _release(ctx)
        needs = needed(ctx)
        dx, dw, dbias, db = backward_of(
            LinearBackward, "linear_backward", dy, x, weight, bias, b_tensor, y, n, a, index, ctx.b,
            ctx.normalize_weight, ctx.max_out, ctx.detach, needs, ctx.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip((dx, dw, dbias, db), needs, strict=True)]
        return (*grads, *(None,) * 6)

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, b_tensor, *options):
        arguments = (x, weight, bias, b_tensor, *options)
        if any(d is not None for d in in_dims[1:4]):
            return _sliced(Linear.apply, info, in_dims, arguments, 5)
        folded = _folded(x, in_dims[0], info.batch_size)
        return _unfold(Linear.apply(folded, weight, bias, b_tensor, *options), info.batch_size)


class LinearBackward(torch.autograd.Function):
    """Gradients of `Linear`; differentiable through the definition, from x and weight."""

    @staticmethod
    def forward(dy, x, weight, bias, b_tensor, y, n, a, index, b, normalize_weight, max_out, detach, needs, backend):
        return run(
            "linear_backward",
            dy,
            x,
            weight,
            bias,
            b_tensor,
            y,
            n,
            a,
            index,
            b,
            normalize_weight,
            max_out,
            detach,
            needs,
            backend,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, weight, bias, b_tensor = inputs[:5]
        ctx.b, ctx.normalize_weight, ctx.max_out, ctx.detach, ctx.needs = inputs[9:14]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, bias, b_tensor)

    @staticmethod
    def backward(ctx, *cotangents):
        dy, x, weight, bias, b_tensor = ctx.saved_tensors

        def definition(x, weight, bias, b_tensor):
            return reference.linear(
                x, weight, bias, b=exponent(ctx.b, b_tensor), normalize_weight=ctx.normalize_weight,
                max_out=ctx.max_out, detach=ctx.detach,
            )  # fmt: skip

        gradients = second_order(definition, (x, weight, bias, b_tensor), ctx.needs, dy, cotangents)
        return (*gradients, *(None,) * 10)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        needs = arguments[13]
        if any(d is not None for d in in_dims[2:5]) or any(needs[1:]):
            return _sliced(LinearBackward.apply, info, in_dims, arguments, 4)
        size = info.batch_size
        fold = [_folded(t, d, size) for t, d in zip(arguments[:9], in_dims[:9], strict=True)]
        fold[2:5] = arguments[2:5]
        return _unfold(LinearBackward.apply(*fold, *arguments[9:]), size)


class Conv2d(torch.autograd.Function):
    """(x, weight, bias, b_tensor, stride, …, detach, keep, squares) → y, n, a, index, copy of y."""

    @staticmethod
    def launch(
        x,
        weight,
        bias,
        b_tensor,
        stride,
        padding,
        dilation,
        groups,
        b,
        normalize_weight,
        max_out,
        detach,
        keep,
        squares,
    ):
        return run(
            "conv2d", x, weight, bias, b_tensor, stride, padding, dilation, groups, b, normalize_weight, max_out, keep,
            detach, squares,
        )  # fmt: skip

    @staticmethod
    def forward(
        x,
        weight,
        bias,
        b_tensor,
        stride,
        padding,
        dilation,
        groups,
        b,
        normalize_weight,
        max_out,
        detach,
        keep,
        squares,
    ):
        y, n, a, index = Conv2d.launch(
            x, weight, bias, b_tensor, stride, padding, dilation, groups, b, normalize_weight, max_out, detach, keep,
            squares,
        )  # fmt: skip
        return y, n, a, index, _compiled_copy(y, _keep_y(y, b, b_tensor, keep))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        Conv2d.keep(ctx, inputs, *output)

    @staticmethod
    def keep(ctx, inputs, y, n, a, index, copy=None):
        x, weight, bias, b_tensor = inputs[:4]
        ctx.window = inputs[4:8]
        ctx.b, ctx.normalize_weight, ctx.max_out, ctx.detach, keep, _ = inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.edges = edges(x, weight, bias, b_tensor)
        ctx.save_for_backward(kept_input(ctx, x), weight, bias, b_tensor, n, a, index, copy)
        ctx.backend = ran_backend()
        if not ctx.compiled:
            hold(ctx, y, _keep_y(y, ctx.b, b_tensor, keep))

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 14
        x, weight, bias, b_tensor, n, a, index, copy = ctx.saved_tensors
        x = input_of(ctx, x)
        y = (copy if copy.numel() else None) if ctx.compiled else _release(ctx)
        needs = needed(ctx)
        dx, dw, dbias, db = backward_of(
            Conv2dBackward, "conv2d_backward", dy, x, weight, bias, b_tensor, y, n, a, index, *ctx.window, ctx.b,
            ctx.normalize_weight,
            ctx.max_out, ctx.detach, needs, ctx.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip((dx, dw, dbias, db), needs, strict=True)]
        return (*grads, *(None,) * 10)

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, b_tensor, *options):
        arguments = (x, weight, bias, b_tensor, *options)
        if any(d is not None for d in in_dims[1:4]):
            return _sliced(Conv2d.apply, info, in_dims, arguments, 5)
        folded = _folded(x, in_dims[0], info.batch_size)
        return _unfold(Conv2d.apply(folded, weight, bias, b_tensor, *options), info.batch_size)


class Conv2dBackward(torch.autograd.Function):
    """Gradients of `Conv2d`; differentiable through the definition, from x and weight."""

    @staticmethod
    def forward(
        dy, x, weight, bias, b_tensor, y, n, a, index, stride, padding, dilation, groups, b, normalize_weight, max_out,
        detach, needs, backend,
    ):  # fmt: skip
        return run(
            "conv2d_backward", dy, x, weight, bias, b_tensor, y, n, a, index, stride, padding, dilation, groups, b,
            normalize_weight, max_out, detach, needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, weight, bias, b_tensor = inputs[:5]
        ctx.window = inputs[9:13]
        ctx.b, ctx.normalize_weight, ctx.max_out, ctx.detach, ctx.needs = inputs[13:18]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight, bias, b_tensor)

    @staticmethod
    def backward(ctx, *cotangents):
        dy, x, weight, bias, b_tensor = ctx.saved_tensors

        def definition(x, weight, bias, b_tensor):
            return reference.conv2d(
                canonical(x), canonical(weight), bias, *ctx.window, b=exponent(ctx.b, b_tensor),
                normalize_weight=ctx.normalize_weight, max_out=ctx.max_out, detach=ctx.detach,
            )  # fmt: skip

        gradients = second_order(definition, (x, weight, bias, b_tensor), ctx.needs, dy, cotangents)
        return (*gradients, *(None,) * 14)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        needs = arguments[17]
        if any(d is not None for d in in_dims[2:5]) or any(needs[1:]):
            return _sliced(Conv2dBackward.apply, info, in_dims, arguments, 4)
        size = info.batch_size
        fold = [_folded(t, d, size) for t, d in zip(arguments[:9], in_dims[:9], strict=True)]
        fold[2:5] = arguments[2:5]
        return _unfold(Conv2dBackward.apply(*fold, *arguments[9:]), size)


class BatchNormUncentered(torch.autograd.Function):
    """(x, weight, bias, residual, running_var, training, eps, activation, detach, emits_squares) → y, mean, var,
    squares."""

    @staticmethod
    def forward(x, weight, bias, residual, running_var, training, eps, activation, detach, emits_squares):
        return run(
            "batch_norm_uncentered", x, weight, bias, residual, running_var, training, eps, activation, detach,
            emits_squares,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, running_var, ctx.training, ctx.eps, ctx.activation, ctx.detach, _ = inputs
        y, mean, var, squares = output
        ctx.mark_non_differentiable(mean, var, squares)
        ctx.set_materialize_grads(False)
        ctx.compiled = torch.compiler.is_compiling()
        ctx.edges = edges(x, weight, bias, residual)
        ctx.backend = ran_backend()
        # y is read for the ReLU's mask only; without a residual kernels take that from x, which is kept anyway
        masked = ctx.activation is not None and not (residual is None and ctx.backend.endswith(MASK_FROM_INPUT))
        hold(ctx, y, masked and not ctx.compiled)
        ctx.save_for_backward(kept_input(ctx, x), weight, bias, y if masked and ctx.held is None else None, mean, var)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 10
        x, weight, bias, y, mean, var = ctx.saved_tensors
        x = input_of(ctx, x)
        if ctx.held is not None:
            y = unchanged(ctx, "batch_norm_uncentered")
        needs = needed(ctx)
        passes_on = needs[3] and ctx.activation is None  # the residual's gradient is dy itself
        asked = [*needs[:3], needs[3] and not passes_on]
        gradients = backward_of(
            BatchNormUncenteredBackward, "batch_norm_uncentered_backward", dy, x, y, weight, bias, mean, var,
            ctx.training, ctx.eps, ctx.activation, ctx.detach, asked, ctx.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip(gradients, asked, strict=True)]
        if passes_on:
            grads[3] = dy
        return (*grads, *(None,) * 6)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return sliced_keeping_empty(BatchNormUncentered.apply, info, in_dims, arguments)


class BatchNormUncenteredBackward(torch.autograd.Function):
    """Gradients of `BatchNormUncentered`; differentiable through the definition."""

    @staticmethod
    def forward(dy, x, y, weight, bias, mean, var, training, eps, activation, detach, needs, backend):
        return run(
            "batch_norm_uncentered_backward",
            dy,
            x,
            y,
            weight,
            bias,
            mean,
            var,
            training,
            eps,
            activation,
            detach,
            needs,
            backend,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, y, weight, bias, _, var, ctx.training, ctx.eps, ctx.activation, ctx.detach, ctx.needs, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, y, weight, bias, var)

    @staticmethod
    def backward(ctx, *cotangents):
        dy, x, y, weight, bias, var = ctx.saved_tensors
        residual = torch.zeros_like(x) if ctx.needs[3] else None

        def definition(x, weight, bias, residual):
            # the ReLU's mask is piecewise constant: multiplying by it has the ReLU's derivatives of every order
            out = reference.batch_norm_uncentered(
                x, None if ctx.training else var, weight, bias, training=ctx.training, eps=ctx.eps, residual=residual,
                detach=ctx.detach,
            )  # fmt: skip
            if ctx.activation is None:
                return out
            return torch.where((out if y is None else y).detach() <= 0, 0.0, out)

        gradients = second_order(definition, (x, weight, bias, residual), ctx.needs, dy, cotangents)
        # (dy, x, y, weight, bias, …); the residual enters the gradients through the mask alone
        return (gradients[0], gradients[1], None, gradients[2], gradients[3], *(None,) * 8)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return sliced_keeping_empty(BatchNormUncenteredBackward.apply, info, in_dims, arguments)


def sliced_keeping_empty(function, info, in_dims, arguments) -> tuple:
    values, dims = _sliced(function, info, in_dims, arguments, 1)
    return values, (0,) * len(values)


# The ops themselves are differentiable too (exported graphs, callers of torch.ops): the Autograd key leads to the
# Functions, and from inside their forward, where gradients are off, below autograd.


def register_autograd(name: str, differentiable) -> None:
    op = getattr(torch.ops.bcos_kernels, name).default

    def kernel(*arguments):
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
            return differentiable(*arguments)
        if forward_mode() and torch._C._is_fwd_grad_enabled():  # not inside a Function's forward
            return differentiable(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    ops.library.impl(name, kernel, "Autograd")
    # transforms of torch.func take Functions, level by level
    ops.library.impl(name, differentiable, "FuncTorchDynamicLayerFrontMode")


def whole(function: type[torch.autograd.Function], *arguments) -> tuple[Tensor, ...]:
    """All that the op returns, not y alone as `apply` does for a layer in eager code."""
    return _apply_in_forward_mode(function, *arguments) if forward_mode() else function.apply(*arguments)


def constant(b_tensor: Tensor | None, detach: bool) -> Tensor | None:
    return b_tensor.detach() if detach and b_tensor is not None else b_tensor


def _linear(x, weight, bias, b_tensor, b, normalize_weight, max_out, keep, detach=False, squares=None):
    b_tensor = constant(b_tensor, detach)
    return whole(Linear, x, weight, bias, b_tensor, b, normalize_weight, max_out, detach, True, squares)[:4]


def _conv2d(
    x, weight, bias, b_tensor, stride, padding, dilation, groups, b, normalize_weight, max_out, keep, detach=False,
    squares=None,
):  # fmt: skip
    window = (stride, padding, dilation, groups)
    b_tensor = constant(b_tensor, detach)
    return whole(Conv2d, x, weight, bias, b_tensor, *window, b, normalize_weight, max_out, detach, True, squares)[:4]


def _batch_norm(x, weight, bias, residual, running_var, training, eps, activation, detach=False, emits_squares=False):
    options = (training, eps, activation, detach, emits_squares)
    return whole(BatchNormUncentered, x, weight, bias, residual, running_var, *options)


register_autograd("linear", _linear)
register_autograd("conv2d", _conv2d)
register_autograd("batch_norm_uncentered", _batch_norm)
register_autograd("linear_backward", partial(whole, LinearBackward))
register_autograd("conv2d_backward", partial(whole, Conv2dBackward))
register_autograd("batch_norm_uncentered_backward", partial(whole, BatchNormUncenteredBackward))
