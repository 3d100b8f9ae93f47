"""Bad input: every message names the op, what was expected and what came, before anything has run."""

from __future__ import annotations

import pytest
import torch

import bcos_kernels
from bcos_kernels import dispatch

NAN, INF = float("nan"), float("inf")


def linear(x=(2, 4), weight=(6, 4), bias=None, dtypes=(torch.float32,) * 3, **options):
    x, weight, bias = (
        torch.zeros(v, dtype=t) if isinstance(v, tuple) else v for v, t in zip((x, weight, bias), dtypes, strict=True)
    )
    return bcos_kernels.linear(x, weight, bias, **options)


def conv2d(x=(2, 4, 5, 5), weight=(6, 4, 3, 3), bias=None, dtypes=(torch.float32,) * 3, **options):
    x, weight, bias = (
        torch.zeros(v, dtype=t) if isinstance(v, tuple) else v for v, t in zip((x, weight, bias), dtypes, strict=True)
    )
    return bcos_kernels.conv2d(x, weight, bias, **options)


def batch_norm(x=(2, 3, 4, 4), running_var=(3,), dtype=torch.float32, training=True, **options):
    x = torch.zeros(x, dtype=dtype) if isinstance(x, tuple) else x
    running_var = torch.ones(running_var) if isinstance(running_var, tuple) else running_var
    options = {k: torch.ones(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return bcos_kernels.batch_norm_uncentered(x, running_var, training=training, **options)


def conv2d_batch_norm(x=(2, 4, 5, 5), weight=(6, 4, 3, 3), running_var=(6,), training=True, **options):
    x, weight = (torch.zeros(v) if isinstance(v, tuple) else v for v in (x, weight))
    running_var = torch.ones(running_var) if isinstance(running_var, tuple) else running_var
    tensors = {k: torch.ones(options[k]) for k in ("norm_weight", "norm_bias", "residual") if k in options}
    return bcos_kernels.conv2d_batch_norm(x, weight, running_var=running_var, training=training, **options | tensors)


def layer_norm(x=(2, 3, 4), normalized_shape=(4,), dtype=torch.float32, **options):
    x = torch.zeros(x, dtype=dtype) if isinstance(x, tuple) else x
    options = {k: torch.ones(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return bcos_kernels.layer_norm(x, normalized_shape, **options)


half, single, whole = torch.float16, torch.float32, torch.int64
meta = torch.zeros(6, 4, device="meta")

# (call, exception, expected, got): both texts are in the message, which begins with the op's name
CASES = {
    # linear: shapes
    "x of other width": (lambda: linear(x=(2, 5)), ValueError, "x.size(-1) == weight.size(1) (4)", "(2, 5)"),
    "x without dimensions": (lambda: linear(x=()), ValueError, "x.size(-1) == weight.size(1)", "()"),
    "weight of one dimension": (
        lambda: linear(weight=(4,)),
        ValueError,
        "(out_features * max_out, in_features)",
        "(4,)",
    ),
    "weight of four": (lambda: linear(weight=(6, 4, 1, 1)), ValueError, "(out_features", "(6, 4, 1, 1)"),
    "bias of other size": (lambda: linear(bias=(5,)), ValueError, "bias of shape (6,)", "(5,)"),
    "bias of two dimensions": (lambda: linear(bias=(6, 1)), ValueError, "bias of shape (6,)", "(6, 1)"),
    "units not divisible": (lambda: linear(max_out=4), ValueError, "divisible by max_out", "6 and 4"),
    "max_out 0": (lambda: linear(max_out=0), ValueError, "max_out >= 1", "0"),
    "max_out of 257": (lambda: linear(weight=(514, 4), max_out=257), ValueError, "max_out <= 256", "257"),
    "max_out 1.5": (lambda: linear(max_out=1.5), TypeError, "max_out to be an int", "float"),
    # linear: dtypes and types
    "x a list": (lambda: linear(x=[[1.0] * 4]), TypeError, "x to be a tensor", "list"),
    "weight None": (lambda: linear(weight=None), TypeError, "weight to be a tensor", "NoneType"),
    "bias a number": (lambda: linear(bias=1.0), TypeError, "bias to be a tensor", "float"),
    "x of integers": (lambda: linear(dtypes=(whole,) * 3), TypeError, "float32, float64, bfloat16, float16", "int64"),
    "x complex": (lambda: linear(dtypes=(torch.complex64,) * 3), TypeError, "x.dtype to be one of", "complex64"),
    "weight of other dtype": (
        lambda: linear(dtypes=(single, half, single)),
        TypeError,
        "weight.dtype == x.dtype (torch.float32)",
        "float16",
    ),
    "bias of other dtype": (
        lambda: linear(bias=(6,), dtypes=(single, single, half)),
        TypeError,
        "bias.dtype == x.dtype",
        "float16",
    ),
    "weight on other device": (lambda: linear(weight=meta), ValueError, "weight on x's device (cpu)", "meta"),
    # b
    "b 0.5": (lambda: linear(b=0.5), ValueError, "b >= 1", "0.5"),
    "b nan": (lambda: linear(b=NAN), ValueError, "b >= 1", "nan"),
    "b infinite": (lambda: linear(b=INF), ValueError, "finite", "inf"),
    "b a string": (lambda: linear(b="2"), TypeError, "number or a 0-dim tensor", "str"),
    "b None": (lambda: linear(b=None), TypeError, "number or a 0-dim tensor", "NoneType"),
    "b a truth value": (lambda: linear(b=True), TypeError, "number or a 0-dim tensor", "bool"),
    "b a vector": (lambda: linear(b=torch.ones(2)), ValueError, "0-dim tensor", "(2,)"),
    "b a tensor of integers": (lambda: linear(b=torch.tensor(2)), TypeError, "b.dtype to be one of", "int64"),
    "b on other device": (
        lambda: linear(b=torch.tensor(2.0, device="meta")),
        ValueError,
        "b on x's device (cpu)",
        "meta",
    ),
    # conv2d: shapes
    "image of two dimensions": (lambda: conv2d(x=(5, 5)), ValueError, "(N, C, H, W) or (C, H, W)", "(5, 5)"),
    "image of five": (lambda: conv2d(x=(1, 2, 4, 5, 5)), ValueError, "(N, C, H, W)", "(1, 2, 4, 5, 5)"),
    "kernel of two dimensions": (lambda: conv2d(weight=(6, 4)), ValueError, "in_channels // groups, kh, kw)", "(6, 4)"),
    "kernel of size 0": (lambda: conv2d(weight=(6, 4, 0, 3)), ValueError, "kernel of at least 1x1", "(0, 3)"),
    "other channels": (
        lambda: conv2d(x=(2, 32, 5, 5)),
        ValueError,
        "weight.size(1) * groups == in_channels",
        "4 * 1 and 32",
    ),
    "groups that do not divide the input": (
        lambda: conv2d(groups=3),
        ValueError,
        "weight.size(1) * groups",
        "4 * 3 and 4",
    ),
    "groups that do not divide the output": (
        lambda: conv2d(weight=(5, 2, 3, 3), groups=2),
        ValueError,
        "out_channels divisible by groups",
        "5 and 2",
    ),
    "groups of units": (
        lambda: conv2d(weight=(6, 2, 3, 3), groups=2, max_out=2),
        ValueError,
        "out_channels divisible by groups",
        "3 and 2",
    ),
    "groups 0": (lambda: conv2d(groups=0), ValueError, "groups >= 1", "0"),
    "groups 2.0": (lambda: conv2d(groups=2.0), TypeError, "groups to be an int", "float"),
    "window beyond the image": (
        lambda: conv2d(weight=(6, 4, 3, 7), padding=(0, 0)),
        ValueError,
        "padded width >= the dilated kernel's 7",
        "5",
    ),
    "dilated window beyond the image": (
        lambda: conv2d(dilation=(3, 1), padding=(0, 3)),
        ValueError,
        "padded height >= the dilated kernel's 7",
        "5",
    ),
    "conv2d, max_out": (lambda: conv2d(max_out=4), ValueError, "divisible by max_out", "6 and 4"),
    "conv2d, bias": (lambda: conv2d(bias=(3,)), ValueError, "bias of shape (6,)", "(3,)"),
    "conv2d, dtypes": (
        lambda: conv2d(dtypes=(half, single, single)),
        TypeError,
        "weight.dtype == x.dtype (torch.float16)",
        "float32",
    ),
    "conv2d, integers": (lambda: conv2d(dtypes=(whole,) * 3), TypeError, "x.dtype to be one of", "int64"),
    "conv2d, b": (lambda: conv2d(b=0), ValueError, "b >= 1", "0"),
    # conv2d: stride, padding, dilation
    "stride 0": (lambda: conv2d(stride=0), ValueError, "stride >= 1", "0"),
    "stride -1": (lambda: conv2d(stride=(1, -1)), ValueError, "stride >= 1", "-1"),
    "stride of three": (lambda: conv2d(stride=(1, 1, 1)), ValueError, "stride to be an int or a pair", "(1, 1, 1)"),
    "stride 1.5": (lambda: conv2d(stride=1.5), TypeError, "stride to be an int", "float"),
    "stride None": (lambda: conv2d(stride=None), TypeError, "stride to be an int", "NoneType"),
    "dilation 0": (lambda: conv2d(dilation=(0, 1)), ValueError, "dilation >= 1", "0"),
    "padding -1": (lambda: conv2d(padding=-1), ValueError, "padding >= 0", "-1"),
    "padding of three": (lambda: conv2d(padding=(1, 1, 1)), ValueError, "padding to be an int or a pair", "(1, 1, 1)"),
    "padding 0.5": (lambda: conv2d(padding=0.5), TypeError, "padding to be an int", "float"),
    "padding full": (lambda: conv2d(padding="full"), ValueError, "'same' or 'valid'", "'full'"),
    "same with stride 2": (
        lambda: conv2d(padding="same", stride=2),
        ValueError,
        "stride 1 with padding 'same'",
        "(2, 2)",
    ),
    "unknown padding mode": (
        lambda: conv2d(padding_mode="mirror"),
        ValueError,
        "zeros, reflect, replicate, circular",
        "'mirror'",
    ),
    "padding mode None": (lambda: conv2d(padding_mode=None), ValueError, "padding_mode to be one of", "None"),
    "reflect beyond the image": (
        lambda: conv2d(padding=5, padding_mode="reflect"),
        ValueError,
        "reflect padding of at most (4, 4)",
        "(5, 5)",
    ),
    "circular beyond the image": (
        lambda: conv2d(padding=(0, 6), padding_mode="circular"),
        ValueError,
        "circular padding of at most (5, 5)",
        "(0, 6)",
    ),
    # batch_norm_uncentered
    "one dimension": (lambda: batch_norm(x=(3,)), ValueError, "(N, C, ...)", "(3,)"),
    "running_var of other size": (
        lambda: batch_norm(running_var=(4,)),
        ValueError,
        "running_var of shape (3,)",
        "(4,)",
    ),
    "no running_var in eval": (
        lambda: batch_norm(running_var=None, training=False),
        ValueError,
        "running_var in eval mode",
        "None",
    ),
    "running_var a number": (lambda: batch_norm(running_var=1.0), TypeError, "running_var to be a tensor", "float"),
    "running_var of integers": (
        lambda: batch_norm(running_var=torch.ones(3, dtype=whole)),
        TypeError,
        "running_var.dtype to be one of",
        "int64",
    ),
    "running_var on other device": (
        lambda: batch_norm(running_var=torch.ones(3, device="meta")),
        ValueError,
        "running_var on x's device",
        "meta",
    ),
    "weight of other size": (lambda: batch_norm(weight=(3, 1)), ValueError, "weight of shape (3,)", "(3, 1)"),
    "BatchNorm's bias": (lambda: batch_norm(bias=(2,)), ValueError, "bias of shape (3,)", "(2,)"),
    "BatchNorm of integers": (lambda: batch_norm(dtype=whole), TypeError, "x.dtype to be one of", "int64"),
    "BatchNorm of None": (lambda: batch_norm(x=None), TypeError, "x to be a tensor", "NoneType"),
    "residual of other shape": (
        lambda: batch_norm(residual=(2, 3, 4, 1)),
        ValueError,
        "residual of x's shape (2, 3, 4, 4)",
        "(2, 3, 4, 1)",
    ),
    "residual of other dtype": (
        lambda: batch_norm(residual=torch.ones(2, 3, 4, 4, dtype=half)),
        TypeError,
        "residual.dtype == x.dtype",
        "float16",
    ),
    "unknown activation": (lambda: batch_norm(activation="gelu"), ValueError, "None or 'relu'", "'gelu'"),
    "eps < 0": (lambda: batch_norm(eps=-1.0), ValueError, "eps >= 0", "-1.0"),
    "eps nan": (lambda: batch_norm(eps=NAN), ValueError, "eps >= 0", "nan"),
    "eps a string": (lambda: batch_norm(eps="1e-5"), TypeError, "eps to be a number", "str"),
    "momentum 2": (lambda: batch_norm(momentum=2.0), ValueError, "momentum in [0, 1]", "2.0"),
    "momentum None": (lambda: batch_norm(momentum=None), TypeError, "momentum to be a number", "NoneType"),
    # layer_norm
    "features of other size": (
        lambda: layer_norm(normalized_shape=(5,)),
        ValueError,
        "(..., *normalized_shape)",
        "(5,)",
    ),
    "more features than dimensions": (
        lambda: layer_norm(normalized_shape=(1, 2, 3, 4)),
        ValueError,
        "(..., *normalized_shape)",
        "(1, 2, 3, 4)",
    ),
    "no features": (lambda: layer_norm(normalized_shape=()), ValueError, "(..., *normalized_shape)", "()"),
    "normalized_shape a float": (
        lambda: layer_norm(normalized_shape=4.0),
        TypeError,
        "normalized_shape to be an int",
        "float",
    ),
    "LayerNorm of None": (lambda: layer_norm(x=None), TypeError, "x to be a tensor", "NoneType"),
    "LayerNorm of integers": (lambda: layer_norm(dtype=whole), TypeError, "x.dtype to be one of", "int64"),
    "LayerNorm's weight": (lambda: layer_norm(weight=(3,)), ValueError, "weight of shape (4,)", "(3,)"),
    "LayerNorm's bias": (lambda: layer_norm(bias=(4, 1)), ValueError, "bias of shape (4,)", "(4, 1)"),
    "LayerNorm's weight elsewhere": (
        lambda: layer_norm(weight=torch.ones(4, device="meta")),
        ValueError,
        "weight on x's device",
        "meta",
    ),
    "LayerNorm's eps < 0": (lambda: layer_norm(eps=-1.0), ValueError, "eps >= 0", "-1.0"),
    "LayerNorm's eps None": (lambda: layer_norm(eps=None), TypeError, "eps to be a number", "NoneType"),
    "channels first of other size": (
        lambda: layer_norm(channels_first=True),
        ValueError,
        "(N, channels, ...) and normalized_shape (channels,)",
        "(2, 3, 4) and (4,)",
    ),
    # conv2d_batch_norm: what both check, by its name and of the shape of the output
    "fused, no batch": (lambda: conv2d_batch_norm(x=(4, 5, 5)), ValueError, "(N, C, H, W)", "(4, 5, 5)"),
    "fused, x None": (lambda: conv2d_batch_norm(x=None), TypeError, "x to be a tensor", "NoneType"),
    "fused, other channels": (
        lambda: conv2d_batch_norm(x=(2, 3, 5, 5)),
        ValueError,
        "weight.size(1) * groups == in_channels",
        "4 * 1 and 3",
    ),
    "fused, b": (lambda: conv2d_batch_norm(b=0.5), ValueError, "b >= 1", "0.5"),
    "fused, stride": (lambda: conv2d_batch_norm(stride=0), ValueError, "stride >= 1", "0"),
    "fused, padding -1": (lambda: conv2d_batch_norm(padding=-1), ValueError, "padding >= 0", "-1"),
    "fused, same with stride 2": (
        lambda: conv2d_batch_norm(padding="same", stride=2),
        ValueError,
        "stride 1 with padding 'same'",
        "(2, 2)",
    ),
    "fused, reflect beyond the image": (
        lambda: conv2d_batch_norm(padding=5, padding_mode="reflect"),
        ValueError,
        "reflect padding of at most (4, 4)",
        "(5, 5)",
    ),
    "fused, window beyond the image": (
        lambda: conv2d_batch_norm(dilation=(1, 3)),
        ValueError,
        "padded width >= the dilated kernel's 7",
        "5",
    ),
    "fused, max_out": (lambda: conv2d_batch_norm(max_out=4), ValueError, "divisible by max_out", "6 and 4"),
    "fused, running_var of the units": (
        lambda: conv2d_batch_norm(max_out=2),
        ValueError,
        "running_var of shape (3,)",
        "(6,)",
    ),
    "fused, norm_weight": (lambda: conv2d_batch_norm(norm_weight=(4,)), ValueError, "norm_weight of shape", "(4,)"),
    "fused, norm_bias": (lambda: conv2d_batch_norm(norm_bias=(6, 1)), ValueError, "norm_bias of shape (6,)", "(6, 1)"),
    "fused, no running_var in eval": (
        lambda: conv2d_batch_norm(running_var=None, training=False),
        ValueError,
        "running_var in eval mode",
        "None",
    ),
    "fused, residual of x's shape": (
        lambda: conv2d_batch_norm(residual=(2, 4, 5, 5)),
        ValueError,
        "residual of the output's shape (2, 6, 3, 3)",
        "(2, 4, 5, 5)",
    ),
    "fused, activation": (lambda: conv2d_batch_norm(activation="gelu"), ValueError, "None or 'relu'", "'gelu'"),
    "fused, eps": (lambda: conv2d_batch_norm(eps=-1.0), ValueError, "eps >= 0", "-1.0"),
    "fused, momentum": (lambda: conv2d_batch_norm(momentum="0.1"), TypeError, "momentum to be a number", "str"),
    "fused, recompute": (lambda: conv2d_batch_norm(recompute=True), ValueError, "recompute to be None", "True"),
    "fused, recompute behind a residual": (
        lambda: conv2d_batch_norm(residual=(2, 6, 3, 3), recompute="output"),
        ValueError,
        "recompute to be None, 'inner'",
        "'output'",
    ),
}


def op_of(case: str) -> str:
    source = CASES[case][0].__code__.co_names[0]
    return {"batch_norm": "batch_norm_uncentered"}.get(source, source)


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, exception, expected, got = CASES[case]
    dispatch._last_run.clear()
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    assert caught.type is exception
    assert message.startswith(f"{op_of(case)}: expected "), message
    before, _, after = message.rpartition("got ")
    assert expected in before and got in after, message
    assert not bcos_kernels.dispatched()


def test_running_var_is_untouched_by_an_error():
    running_var = torch.ones(3)
    with pytest.raises(ValueError, match="activation"):
        bcos_kernels.batch_norm_uncentered(torch.randn(4, 3), running_var, training=True, activation="tanh")
    assert torch.equal(running_var, torch.ones(3))


def test_accepted():
    """What looks odd and is not: pairs as lists or of one value, NumPy's numbers, b an integer, keyword arguments."""
    import numpy as np

    x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    expected = bcos_kernels.conv2d(x, weight, stride=(2, 2), padding=(1, 1), b=2.0)
    assert torch.equal(bcos_kernels.conv2d(x, weight, stride=[2], padding=[1, 1], b=2), expected)
    assert torch.equal(bcos_kernels.conv2d(x, weight, None, 2, 1, 1, 1, b=np.float32(2)), expected)
    assert torch.equal(bcos_kernels.linear(x, torch.ones(1, 5), b=np.int64(1)), x @ torch.ones(5, 1))
