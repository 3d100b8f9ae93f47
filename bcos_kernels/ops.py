"""The public ops: schemas (here only), fakes, and running one.

Each op is a functional forward and a functional backward, opaque to the compiler; dispatch.py picks the backend when
one runs. autograd.py wraps them. A forward computes the same with and without ``detach``: it is there for graphs, an
exported one's among them, to be differentiated in the mode that they were made in.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, layouts, reference

library = torch.library.Library("bcos_kernels", "DEF")

# Backend of a forward that ran inside a compiled graph, by the address of the norms or variances it made: the graph's
# backward op finds it again there, as long as they are alive no other tensor has that address.
_ran_on: dict[int, str] = {}


_implementations: dict[str, object] = {}


def _define(schema: str, implementation, fake, statistics: int | None = None) -> None:
    """Define an op; ``statistics`` is the place of the norms or variances among a forward's results."""
    name = schema.split("(")[0]
    _implementations[name] = implementation

    def dispatched(*arguments):
        results = implementation(*arguments)
        if statistics is None:
            return _filled(results, arguments[0])
        return *results[:statistics], _remember_backend(results[statistics]), *results[statistics + 1 :]

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bcos_kernels::{name}", fake, lib=library)


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, …) is being applied."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on (torch.func.jvp, torch.autograd.forward_ad), in eager code."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _filled(results: tuple, like: Tensor) -> tuple[Tensor, ...]:
    """Of a backward: what is not needed has no elements."""
    return tuple(like.new_empty((0,)) if g is None else g for g in results)


def run(name: str, x: Tensor, *arguments, fill: bool = True):
    """The op, called by way of the dispatcher only where something there could see it (fakes, tracing, modes,
    subclasses); plain eager calls its implementation and saves the 45 µs of two round trips. Not ``fill``: what a
    backward does not need may be None."""
    if torch.compiler.is_compiling() or functorch_active() or torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.bcos_kernels, name).default(x, *arguments)
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return getattr(torch.ops.bcos_kernels, name).default(x, *arguments)
    results = _implementations[name](x, *arguments)
    return _filled(results, x) if fill else results


def _empty_layout(x: Tensor, shape, memory_format: torch.memory_format, dtype=None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def _remember_backend(statistics: Tensor) -> Tensor:
    """``statistics`` (norms or variances), noted as made by the backend that has just run."""
    if not statistics.numel():
        statistics = statistics.new_empty((1,))[:0].view(statistics.shape)  # nothing is kept: an address all the same
    address = statistics.untyped_storage().data_ptr()
    _ran_on.pop(address, None)  # to the end of the order in which addresses are forgotten
    _ran_on[address] = dispatch.last_backend()
    if len(_ran_on) > 8192:
        with suppress(RuntimeError):  # another thread is forgetting one
            _ran_on.pop(next(iter(_ran_on)), None)
    return statistics


def _remembered_backend(statistics: Tensor) -> str:
    return _ran_on.get(statistics.untyped_storage().data_ptr(), "")


# linear ---------------------------------------------------------------------------------------------------------------


def _linear(x, weight, bias, b_tensor, b, normalize_weight, max_out, keep, detach=False, squares=None):
    return dispatch.run(
        "linear", "forward", x, (x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares)
    )


def _linear_fake(x, weight, bias, b_tensor, b, normalize_weight, max_out, keep, detach=False, squares=None):
    rows, units = x.shape[0], weight.shape[0] // max_out
    y = x.new_empty((rows, units))
    wide = reference.statistics_dtype(x.dtype)
    n = x.new_empty((rows,) if b_tensor is not None or b != 1 else (0,), dtype=wide)
    keeps_a = keep and reference.keeps_pre_scale(x.dtype, b, b_tensor)
    a = x.new_empty((rows, units) if keeps_a else (0,))
    index = x.new_empty((rows, units) if keep and max_out > 1 else (0,), dtype=torch.uint8)
    return y, n, a, index


_define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, float b, bool normalize_weight, SymInt max_out, "
    "bool keep, bool detach=False, Tensor? squares=None) -> (Tensor y, Tensor n, Tensor a, Tensor index)",
    _linear,
    _linear_fake,
    statistics=1,
)


def _linear_backward(
    dy, x, weight, bias, b_tensor, y, n, a, index, b, normalize_weight, max_out, detach, needs, backend
):
    dx, dw, dbias, db = dispatch.run(
        "linear",
        "backward",
        x,
        (dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, *needs),
        backend or _remembered_backend(n),
    )
    return dx, dw, dbias, None if db is None else db.to(b_tensor.dtype)


def _linear_backward_fake(
    dy, x, weight, bias, b_tensor, y, n, a, index, b, normalize_weight, max_out, detach, needs, backend
):
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        bias.new_empty(bias.shape) if needs[2] else x.new_empty((0,)),
        b_tensor.new_empty(()) if needs[3] else x.new_empty((0,)),
    )


_define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, Tensor? y, Tensor n, "
    "Tensor a, Tensor index, float b, bool normalize_weight, SymInt max_out, bool detach, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor db)",
    _linear_backward,
    _linear_backward_fake,
)

# conv2d ---------------------------------------------------------------------------------------------------------------


def _conv2d(
    x, weight, bias, b_tensor, stride, padding, dilation, groups, b, normalize_weight, max_out, keep, detach=False,
    squares=None,
):  # fmt: skip
    return dispatch.run(
        "conv2d",
        "forward",
        x,
        (x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups, b, b_tensor, normalize_weight,
         max_out, keep, squares),
    )  # fmt: skip


def _conv2d_fake(
    x, weight, bias, b_tensor, stride, padding, dilation, groups, b, normalize_weight, max_out, keep, detach=False,
    squares=None,
):  # fmt: skip
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    shape = (x.shape[0], weight.shape[0] // max_out, *size)
    memory_format = layouts.memory_format(x, weight)
    wide = reference.statistics_dtype(x.dtype)
    y = _empty_layout(x, shape, memory_format)
    has_norm = b_tensor is not None or b != 1
    n = x.new_empty((0,), dtype=wide)
    if has_norm:
        n = _empty_layout(x, (x.shape[0], groups, *size), layouts.norms_format(x, weight, groups), wide)
    keeps_a = keep and reference.keeps_pre_scale(x.dtype, b, b_tensor)
    a = _empty_layout(x, shape, memory_format) if keeps_a else x.new_empty((0,))
    keeps_index = keep and max_out > 1
    index = _empty_layout(x, shape, memory_format, torch.uint8) if keeps_index else x.new_empty((0,), dtype=torch.uint8)
    return y, n, a, index


_define(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, SymInt groups, float b, bool normalize_weight, SymInt max_out, bool keep, bool detach=False, "
    "Tensor? squares=None) -> (Tensor y, Tensor n, Tensor a, Tensor index)",
    _conv2d,
    _conv2d_fake,
    statistics=1,
)


def _conv2d_backward(
    dy, x, weight, bias, b_tensor, y, n, a, index, stride, padding, dilation, groups, b, normalize_weight, max_out,
    detach, needs, backend,
):  # fmt: skip
    dx, dw, dbias, db = dispatch.run(
        "conv2d",
        "backward",
        x,
        (dy, x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups, b, b_tensor, y, n, a, index,
         normalize_weight, max_out, detach, *needs),
        backend or _remembered_backend(n),
    )  # fmt: skip
    return dx, dw, dbias, None if db is None else db.to(b_tensor.dtype)


def _conv2d_backward_fake(
    dy, x, weight, bias, b_tensor, y, n, a, index, stride, padding, dilation, groups, b, normalize_weight, max_out,
    detach, needs, backend,
):  # fmt: skip
    return (
        _empty_layout(x, x.shape, layouts.memory_format(x, weight)) if needs[0] else x.new_empty((0,)),
        _empty_layout(weight, weight.shape, layouts.own_format(weight)) if needs[1] else x.new_empty((0,)),
        bias.new_empty(bias.shape) if needs[2] else x.new_empty((0,)),
        b_tensor.new_empty(()) if needs[3] else x.new_empty((0,)),
    )


_define(
    "conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, Tensor? y, Tensor n, "
    "Tensor a, Tensor index, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, float b, "
    "bool normalize_weight, SymInt max_out, bool detach, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor db)",
    _conv2d_backward,
    _conv2d_backward_fake,
)

# batch_norm_uncentered ------------------------------------------------------------------------------------------------


def _batch_norm(x, weight, bias, residual, running_var, training, eps, activation, detach=False, emits_squares=False):
    return dispatch.run(
        "batch_norm_uncentered",
        "forward",
        x,
        (x, weight, bias, residual, running_var, training, eps, activation, emits_squares),
    )


def _squares_fake(y: Tensor, emits_squares: bool) -> Tensor:
    shape = (y.shape[0], *y.shape[2:]) if emits_squares else (0,)
    return y.new_empty(shape, dtype=reference.statistics_dtype(y.dtype))


def _batch_norm_fake(
    x, weight, bias, residual, running_var, training, eps, activation, detach=False, emits_squares=False
):
    wide = reference.statistics_dtype(x.dtype)
    channels = x.shape[1]
    return (
        _empty_layout(x, x.shape, layouts.own_format(x)),
        x.new_empty((channels if training else 0,), dtype=wide),
        x.new_empty((channels,), dtype=wide),
        _squares_fake(x, emits_squares),
    )


_define(
    "batch_norm_uncentered(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_var, "
    "bool training, float eps, str? activation, bool detach=False, bool emits_squares=False) "
    "-> (Tensor y, Tensor mean, Tensor var, Tensor squares)",
    _batch_norm,
    _batch_norm_fake,
    statistics=2,
)


def _batch_norm_backward(dy, x, y, weight, bias, mean, var, training, eps, activation, detach, needs, backend):
    return dispatch.run(
        "batch_norm_uncentered",
        "backward",
        x,
        (dy, x, y, weight, bias, mean, var, training, eps, activation, detach, *needs),
        backend or _remembered_backend(var),
    )


def _batch_norm_backward_fake(dy, x, y, weight, bias, mean, var, training, eps, activation, detach, needs, backend):
    memory_format = layouts.own_format(x)
    return (
        _empty_layout(x, x.shape, memory_format) if needs[0] else x.new_empty((0,)),
        weight.new_empty(weight.shape) if needs[1] else x.new_empty((0,)),
        bias.new_empty(bias.shape) if needs[2] else x.new_empty((0,)),
        _empty_layout(x, x.shape, memory_format) if needs[3] else x.new_empty((0,)),
    )


_define(
    "batch_norm_uncentered_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, bool training, float eps, str? activation, bool detach, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _batch_norm_backward,
    _batch_norm_backward_fake,
)

# conv2d_batch_norm ----------------------------------------------------------------------------------------------------


def _conv2d_batch_norm(
    x, weight, bias, b_tensor, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation,
    groups, b, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
):  # fmt: skip
    return dispatch.run(
        "conv2d_batch_norm",
        "forward",
        x,
        (x, weight, bias, norm_weight, norm_bias, residual, running_var, squares, tuple(stride), tuple(padding),
         tuple(dilation), groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach,
         emits_squares),
    )  # fmt: skip


def _conv2d_batch_norm_fake(
    x, weight, bias, b_tensor, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation,
    groups, b, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
):  # fmt: skip
    y, n, a, index = _conv2d_fake(
        x, weight, bias, b_tensor, stride, padding, dilation, groups, b, normalize_weight, max_out, keep
    )
    z, mean, var, emitted = _batch_norm_fake(
        y, norm_weight, norm_bias, residual, running_var, training, eps, activation, detach, emits_squares
    )
    return z, emitted, y if keep else x.new_empty((0,)), n, a, index, mean, var


_define(
    "conv2d_batch_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? residual, Tensor? running_var, Tensor? squares, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, SymInt groups, float b, bool normalize_weight, SymInt max_out, bool training, float eps, "
    "str? activation, bool keep, bool detach, bool emits_squares) "
    "-> (Tensor z, Tensor squares, Tensor y, Tensor n, Tensor a, Tensor index, Tensor mean, Tensor var)",
    _conv2d_batch_norm,
    _conv2d_batch_norm_fake,
    statistics=7,
)


def _conv2d_batch_norm_backward(
    dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation,
    groups, b, normalize_weight, max_out, training, eps, activation, detach, needs, backend,
):  # fmt: skip
    dx, dw, dbias, db, *others = dispatch.run(
        "conv2d_batch_norm",
        "backward",
        x,
        (dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var, tuple(stride), tuple(padding),
         tuple(dilation), groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, detach, *needs),
        backend or _remembered_backend(var),
    )  # fmt: skip
    dnorm_weight, dnorm_bias, dresidual = others
    if dresidual is not None and not dresidual.numel():  # of an empty one no layout is known
        dresidual = layouts.with_layout(dresidual, layouts.memory_format(x, weight))
    return dx, dw, dbias, None if db is None else db.to(b_tensor.dtype), dnorm_weight, dnorm_bias, dresidual


def _conv2d_batch_norm_backward_fake(
    dz, x, weight, bias, b_tensor, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation,
    groups, b, normalize_weight, max_out, training, eps, activation, detach, needs, backend,
):  # fmt: skip
    of_layer = _conv2d_backward_fake(
        dz, x, weight, bias, b_tensor, None, n, a, index, stride, padding, dilation, groups, b, normalize_weight,
        max_out, detach, needs[:4], backend,
    )  # fmt: skip
    dresidual = _empty_layout(x, dz.shape, layouts.memory_format(x, weight)) if needs[6] else x.new_empty((0,))
    return (
        *of_layer,
        norm_weight.new_empty(norm_weight.shape) if needs[4] else x.new_empty((0,)),
        norm_bias.new_empty(norm_bias.shape) if needs[5] else x.new_empty((0,)),
        dresidual,
    )


_define(
    "conv2d_batch_norm_backward(Tensor dz, Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? z, Tensor y, Tensor n, Tensor a, Tensor index, Tensor mean, "
    "Tensor var, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, float b, "
    "bool normalize_weight, SymInt max_out, bool training, float eps, str? activation, bool detach, bool[] needs, "
    "str backend) -> (Tensor dx, Tensor dw, Tensor dbias, Tensor db, Tensor dnorm_weight, Tensor dnorm_bias, "
    "Tensor dresidual)",
    _conv2d_batch_norm_backward,
    _conv2d_batch_norm_backward_fake,
)

# linear_gelu ----------------------------------------------------------------------------------------------------------


def _linear_gelu(x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares):
    return dispatch.run(
        "linear_gelu",
        "forward",
        x,
        (x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep, emits_squares),
    )


def _linear_gelu_fake(x, weight, bias, b_tensor, squares, b, normalize_weight, max_out, keep, detach, emits_squares):
    y, n, a, index = _linear_fake(x, weight, bias, b_tensor, b, normalize_weight, max_out, keep)
    emitted = x.new_empty((x.shape[0] if emits_squares else 0,), dtype=reference.statistics_dtype(x.dtype))
    return torch.empty_like(y), emitted, y if keep else x.new_empty((0,)), n, a, index


_define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, Tensor? squares, float b, "
    "bool normalize_weight, SymInt max_out, bool keep, bool detach, bool emits_squares) "
    "-> (Tensor h, Tensor squares, Tensor y, Tensor n, Tensor a, Tensor index)",
    _linear_gelu,
    _linear_gelu_fake,
    statistics=3,
)


def _linear_gelu_backward(
    dh, x, weight, bias, b_tensor, y, n, a, index, b, normalize_weight, max_out, detach, needs, backend
):
    dx, dw, dbias, db = dispatch.run(
        "linear_gelu",
        "backward",
        x,
        (dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out, detach, *needs),
        backend or _remembered_backend(n),
    )
    return dx, dw, dbias, None if db is None else db.to(b_tensor.dtype)


_define(
    "linear_gelu_backward(Tensor dh, Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, Tensor y, Tensor n, "
    "Tensor a, Tensor index, float b, bool normalize_weight, SymInt max_out, bool detach, bool[] needs, str backend) "
    "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor db)",
    _linear_gelu_backward,
    _linear_backward_fake,
)

# layer_norm -----------------------------------------------------------------------------------------------------------


def _layer_norm(x, dims, weight, bias, eps, detach=False, emits_squares=False):
    return dispatch.run("layer_norm", "forward", x, (x, dims, weight, bias, eps, emits_squares))


def _layer_norm_fake(x, dims, weight, bias, eps, detach=False, emits_squares=False):
    rows, wide = x.shape[: x.dim() - dims], reference.statistics_dtype(x.dtype)
    mean, rstd = x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)
    return x.new_empty(x.shape), mean, rstd, x.new_empty(rows if emits_squares else (0,), dtype=wide)


_define(
    "layer_norm(Tensor x, int dims, Tensor? weight, Tensor? bias, float eps, bool detach=False, "
    "bool emits_squares=False) -> (Tensor y, Tensor mean, Tensor rstd, Tensor squares)",
    _layer_norm,
    _layer_norm_fake,
    statistics=2,
)


def _layer_norm_backward(dy, x, dims, weight, bias, mean, rstd, eps, detach, needs, backend):
    return dispatch.run(
        "layer_norm",
        "backward",
        x,
        (dy, x, dims, weight, bias, mean, rstd, detach, *needs),
        backend or _remembered_backend(rstd),
    )


def _layer_norm_backward_fake(dy, x, dims, weight, bias, mean, rstd, eps, detach, needs, backend):
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape) if needs[1] else x.new_empty((0,)),
        bias.new_empty(bias.shape) if needs[2] else x.new_empty((0,)),
    )


# eps is there for derivatives of second order, which are the definition's
_define(
    "layer_norm_backward(Tensor dy, Tensor x, int dims, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "float eps, bool detach, bool[] needs, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _layer_norm_backward_fake,
)
