"""The calls that the selftest checks and times: options and shapes that kernels treat apart, and layers of networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: name of the public function. name: what is particular about the case.
        tensors: name → shape of every tensor argument.
        options: every other argument.
        values: "normal"; "zeros", the first sample without values; "large", inputs of 1e4; "whole", inputs and products
            that every dtype holds exactly, so that rounding decides no maximum.
        channels_last: layout of the 4-dimensional tensors.
    """

    op: str
    name: str
    tensors: dict[str, tuple[int, ...]]
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    values: str = "normal"
    channels_last: bool = True

    def __str__(self) -> str:
        x, weight = self.tensors["x"], self.tensors.get("weight", ())
        return f"{self.name}: x {'x'.join(map(str, x))}" + (f", weight {'x'.join(map(str, weight))}" if weight else "")


def linear(name: str, rows: int, k: int, n: int, *, op: str = "linear", values: str = "normal", **options) -> Case:
    """x (rows, k), weight (n·max_out, k); ``bias`` and ``learnable`` (an exponent with a gradient) are flags."""
    units = n * options.get("max_out", 1)
    tensors = {"x": (rows, k), "weight": (units, k)}
    return _case(op, name, tensors, units, values, True, options)


def conv2d(
    name: str, x: tuple[int, ...], o: int, kernel: int, *, op: str = "conv2d", values: str = "normal",
    channels_last: bool = True, **options,
) -> Case:  # fmt: skip
    """weight (o·max_out, C/groups, kernel, kernel); flags as of `linear`; of conv2d_batch_norm also ``residual``."""
    units = o * options.get("max_out", 1)
    tensors = {"x": x, "weight": (units, x[1] // options.get("groups", 1), kernel, kernel)}
    if op == "conv2d_batch_norm":
        tensors |= {"running_var": (o,), "norm_weight": (o,), "norm_bias": (o,)}
        if options.pop("residual", False):
            stride, padding = options.get("stride", 1), options.get("padding", 0)
            tensors["residual"] = (x[0], o, *((size + 2 * padding - kernel) // stride + 1 for size in x[2:]))
    return _case(op, name, tensors, units, values, channels_last, options)


def batch_norm(name: str, x: tuple[int, ...], *, channels_last: bool = True, residual: bool = False, **options) -> Case:
    tensors = {"x": x, "running_var": x[1:2], "weight": x[1:2], "bias": x[1:2]}
    if residual:
        tensors["residual"] = x
    return Case("batch_norm_uncentered", name, tensors, options, channels_last=channels_last)


def layer_norm(name: str, x: tuple[int, ...], dims: int = 1, *, values: str = "normal", **options) -> Case:
    """Over the last ``dims`` dimensions of x, or with channels_first over the second."""
    first = options.get("channels_first", False)
    shape = x[1:2] if first else x[len(x) - dims :]
    tensors, options = {"x": x, "weight": shape, "bias": shape}, {"normalized_shape": shape} | options
    return Case("layer_norm", name, tensors, options, values, channels_last=first)


def _case(op, name, tensors, units, values, channels_last, options) -> Case:
    if options.pop("bias", False):
        tensors["bias"] = (units,)
    if options.pop("learnable", False):
        tensors["b"] = ()
    return Case(op, name, tensors, options, values, channels_last)


def cases(quick: bool = False) -> list[Case]:
    """Small calls over the options and shapes that kernels treat apart; ``quick``: those that most often matter."""
    relu = {"activation": "relu"}
    most = [
        linear("B = 2", 37, 45, 29),
        linear("B = 2, unit weights, bias", 37, 45, 29, bias=True, normalize_weight=True),
        linear("B = 1.5, explanation", 37, 45, 29, b=1.5, detach=True),
        conv2d("B = 2", (2, 16, 9, 7), 13, 3, padding=1),
        conv2d("B = 2, unit weights, bias, stride 2", (2, 16, 9, 7), 13, 3, stride=2, bias=True, normalize_weight=True),
        conv2d("B = 1.5, explanation, 1x1", (2, 24, 5, 5), 40, 1, b=1.5, detach=True),
        batch_norm("training", (3, 12, 5, 7), training=True, residual=True, **relu),
        batch_norm("evaluation", (3, 12, 5, 7), training=False, **relu),
        conv2d("training", (2, 16, 9, 7), 13, 3, op="conv2d_batch_norm", padding=1, training=True, **relu),
        linear("B = 2", 37, 45, 29, op="linear_gelu"),
        # sizes that kernels with copies of 16 bytes ask for
        linear("multiples of 8, unit weights", 40, 64, 48, normalize_weight=True),
        conv2d("multiples of 8, unit weights", (2, 16, 9, 7), 24, 3, padding=1, normalize_weight=True),
        layer_norm("training", (37, 384)),
    ]
    if quick:
        return most
    fused = {"op": "conv2d_batch_norm", "padding": 1}
    return [
        *most,
        linear("B = 2, whole tiles", 256, 128, 128),
        linear("explanation", 37, 45, 29, detach=True),
        linear("B = 1, bias", 37, 45, 29, b=1, bias=True),
        linear("learnable B, bias", 37, 45, 29, learnable=True, bias=True),
        linear("max_out 2, unit weights", 37, 45, 29, max_out=2, normalize_weight=True, values="whole"),
        linear("max_out 3, B = 1.5", 37, 45, 29, max_out=3, b=1.5, values="whole"),
        linear("one row", 1, 200, 10),
        linear("no rows", 0, 16, 8),
        linear("zeros", 5, 45, 29, values="zeros"),
        linear("inputs of 1e4", 37, 45, 29, values="large"),
        conv2d("pixels innermost", (2, 16, 9, 7), 13, 3, padding=1, channels_last=False),
        conv2d("whole tiles, 1x1", (2, 64, 16, 16), 128, 1),
        conv2d("multiples of 8, stride 2, explanation", (2, 16, 9, 7), 24, 3, stride=2, padding=1, detach=True),
        conv2d("multiples of 8, dilation 2", (2, 16, 9, 9), 24, 3, dilation=2, padding=2),
        conv2d("7x7, stride 2, 6 channels", (2, 6, 23, 23), 16, 7, stride=2, padding=3),
        conv2d("explanation, unit weights", (2, 16, 9, 7), 13, 3, detach=True, normalize_weight=True),
        conv2d("B = 1", (2, 16, 9, 7), 13, 3, b=1, padding=1),
        conv2d("learnable B, bias", (2, 16, 9, 7), 13, 3, learnable=True, bias=True),
        conv2d("max_out 2", (2, 16, 9, 7), 12, 3, max_out=2, values="whole"),
        conv2d("2 groups, dilation 2", (2, 16, 9, 9), 12, 3, groups=2, dilation=2, padding=2),
        conv2d("depthwise, 7x7", (2, 24, 9, 9), 24, 7, groups=24, padding=3),
        conv2d("depthwise, stride 2, unit weights", (2, 40, 9, 7), 40, 3, groups=40, stride=2, normalize_weight=True),
        conv2d("depthwise, bias", (2, 40, 9, 7), 40, 3, groups=40, padding=1, bias=True),
        conv2d("depthwise, pixels innermost, B = 1.5", (2, 24, 9, 9), 24, 3, groups=24, b=1.5, channels_last=False),
        conv2d("depthwise, 2 outputs of max_out 2", (2, 24, 9, 9), 48, 3, groups=24, max_out=2, values="whole"),
        conv2d("depthwise, explanation", (2, 24, 9, 9), 24, 5, groups=24, padding=2, detach=True),
        conv2d("8 groups of 4", (2, 32, 9, 7), 32, 3, groups=8, padding=1),
        conv2d("stride beyond the kernel", (2, 16, 11, 11), 12, 2, stride=3),
        conv2d("one pixel", (1, 16, 1, 1), 12, 1),
        conv2d("empty batch", (0, 16, 9, 7), 13, 3),
        conv2d("zeros", (3, 16, 9, 7), 13, 3, padding=1, values="zeros"),
        conv2d("inputs of 1e4", (2, 16, 9, 7), 13, 3, values="large"),
        batch_norm("training, pixels innermost", (3, 12, 5, 7), training=True, channels_last=False),
        batch_norm("training, explanation", (3, 12, 5, 7), training=True, detach=True, **relu),
        batch_norm("evaluation, explanation, residual", (3, 130, 5, 7), training=False, detach=True, residual=True),
        conv2d("training, residual", (2, 16, 9, 7), 13, 3, training=True, residual=True, **fused, **relu),
        conv2d("training, multiples of 8", (2, 16, 9, 7), 24, 3, training=True, **fused, **relu),
        conv2d("evaluation, explanation", (2, 16, 9, 7), 13, 3, training=False, detach=True, **fused, **relu),
        conv2d("evaluation, B = 1.5", (2, 16, 9, 7), 13, 3, training=False, b=1.5, **fused),
        conv2d("depthwise, training", (2, 24, 9, 7), 24, 3, groups=24, training=True, **fused, **relu),
        conv2d("depthwise, evaluation", (2, 24, 9, 7), 24, 3, groups=24, training=False, residual=True, **fused),
        linear("explanation, unit weights", 37, 45, 29, op="linear_gelu", detach=True, normalize_weight=True),
        linear("B = 1.5, bias", 37, 45, 29, op="linear_gelu", b=1.5, bias=True),
        layer_norm("explanation", (3, 13, 45), detach=True),
        layer_norm("channels first", (2, 40, 5, 7), channels_first=True),
        layer_norm("two dimensions", (4, 5, 33), 2),
        layer_norm("long rows", (3, 40, 25, 25), 3),
        layer_norm("one feature", (9, 1)),
        layer_norm("no rows", (0, 16)),
        layer_norm("inputs of 1e4", (37, 96), values="large"),
    ]


def timed_cases(quick: bool = False, batch: int = 64) -> list[Case]:
    """What is timed without anything being asked for: layers of a ResNet-50, of ViTs, and depthwise ones of a ConvNeXt
    and an EfficientNet."""
    tokens = 197 * batch
    most = [
        conv2d("3x3", (batch, 64, 56, 56), 64, 3, padding=1),
        conv2d("1x1", (batch, 64, 56, 56), 256, 1),
        linear("MLP 1", tokens, 384, 1536),
    ]
    if quick:
        return most
    block = {"op": "conv2d_batch_norm", "activation": "relu"}
    fused, known = {**block, "training": True}, {**block, "training": False}
    return [
        *most,
        conv2d("1x1", (batch, 256, 56, 56), 64, 1),
        conv2d("3x3 /2", (batch, 128, 56, 56), 128, 3, stride=2, padding=1),
        conv2d("3x3", (batch, 256, 14, 14), 256, 3, padding=1),
        conv2d("1x1", (batch, 1024, 14, 14), 256, 1),
        conv2d("3x3", (batch, 512, 7, 7), 512, 3, padding=1),
        conv2d("7x7 /2", (batch, 6, 224, 224), 64, 7, stride=2, padding=3),
        conv2d("3x3, B = 1.5", (batch, 64, 56, 56), 64, 3, padding=1, b=1.5),
        conv2d("depthwise 7x7", (batch, 96, 56, 56), 96, 7, groups=96, padding=3),
        conv2d("3x3, BatchNorm", (batch, 64, 56, 56), 64, 3, padding=1, **fused),
        conv2d("3x3, BatchNorm, evaluation", (batch, 64, 56, 56), 64, 3, padding=1, **known),
        conv2d("1x1, BatchNorm", (batch, 64, 56, 56), 256, 1, residual=True, **fused),
        conv2d("1x1, BatchNorm, evaluation", (batch, 64, 56, 56), 256, 1, residual=True, **known),
        conv2d("depthwise 3x3, BatchNorm", (batch, 144, 56, 56), 144, 3, groups=144, padding=1, **fused),
        conv2d("depthwise 3x3, BatchNorm, evaluation", (batch, 144, 56, 56), 144, 3, groups=144, padding=1, **known),
        batch_norm("BatchNorm", (batch, 64, 56, 56), training=True, activation="relu"),
        batch_norm("BatchNorm", (batch, 256, 56, 56), training=True, activation="relu", residual=True),
        linear("MLP 2", tokens, 1536, 384),
        linear("MLP 1", tokens, 768, 3072),
        linear("MLP 1, GELU", tokens, 384, 1536, op="linear_gelu"),
        layer_norm("ViT-S", (tokens, 384)),
        layer_norm("ConvNeXt-T", (batch, 56, 56, 96)),
    ]


def network_cases(name: str, batch: int, size: int = 224) -> list[Case]:
    """The distinct calls that a B-cos model made of a torchvision network makes: its convolutions (a first one of 3
    channels takes 6), alone or with the BatchNorm behind it, its linear layers, alone or with the GELU. What has a
    BatchNorm comes twice, in training and, with its statistics known, in evaluation."""
    import torchvision
    from torch import nn

    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).train()
    ran: list[tuple[nn.Module, Tensor, Tensor]] = []
    hook = [
        m.register_forward_hook(lambda m, arguments, y: ran.append((m, arguments[0], y)))
        for m in model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GELU))
    ]
    with torch.no_grad():
        model(torch.empty((batch, 3, size, size), device="meta"))
    for handle in hook:
        handle.remove()
    reads = {id(x): m for m, x, _ in ran}
    made = {id(y) for m, _, y in ran if isinstance(m, nn.Conv2d)}
    found: dict[str, Case] = {}
    for m, x, y in ran:
        case = None
        if isinstance(m, nn.Conv2d) and m.kernel_size[0] == m.kernel_size[1] and isinstance(m.padding, tuple):
            channels = 6 if x.shape[1] == 3 else x.shape[1]
            options = dict(stride=m.stride[0], padding=m.padding[0], dilation=m.dilation[0], groups=m.groups)
            if isinstance(reads.get(id(y)), nn.BatchNorm2d):
                options |= {"op": "conv2d_batch_norm", "training": True, "activation": "relu"}
            case = conv2d(name, (x.shape[0], channels, *x.shape[2:]), m.out_channels, m.kernel_size[0], **options)
        elif isinstance(m, nn.Linear):
            op = "linear_gelu" if isinstance(reads.get(id(y)), nn.GELU) else "linear"
            case = linear(name, x.numel() // x.shape[-1], x.shape[-1], m.out_features, op=op)
        elif isinstance(m, nn.BatchNorm2d) and id(x) not in made:
            case = batch_norm(name, tuple(x.shape), training=True, activation="relu")
        elif isinstance(m, nn.LayerNorm):
            over_channels = isinstance(m, torchvision.models.convnext.LayerNorm2d)
            options = {"channels_first": True} if over_channels else {}
            case = layer_norm(name, tuple(x.shape), len(m.normalized_shape), **options)
        if case is None:
            continue
        both = [case]
        if "training" in case.options:
            known = {**case.options, "training": False}
            both.append(dataclasses.replace(case, name=f"{name}, evaluation", options=known))
        for each in both:
            found.setdefault(f"{each.op} {each.tensors} {each.options}", each)
    return list(found.values())


_MAKERS = {"linear": linear, "linear_gelu": linear, "conv2d": conv2d, "conv2d_batch_norm": conv2d}


def cases_of_file(path: Path) -> list[Case]:
    """Cases of a JSON file: a list of {"op", "x", "weight" (not of a normalisation), further arguments of the
    function; "dims" of a layer_norm, the number of its dimensions}."""
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        options = dict(entry)
        try:
            op, x = options.pop("op"), tuple(options.pop("x"))
            if op == "batch_norm_uncentered":
                found.append(batch_norm(path.stem, x, **options))
                continue
            if op == "layer_norm":
                found.append(layer_norm(path.stem, x, **options))
                continue
            units, _, *kernel = options.pop("weight")
            units //= options.get("max_out", 1)
            if _MAKERS[op] is linear:
                found.append(linear(path.stem, *x, units, op=op, **options))
            else:
                found.append(conv2d(path.stem, x, units, kernel[0], op=op, **options))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected op, x, weight and arguments of the function, got {entry}") from error
    return found
