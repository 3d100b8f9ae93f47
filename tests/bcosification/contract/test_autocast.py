"""Autocast on the CPU: types of outputs, gradients and statistics, and numbers as good as the plain form's."""

import copy

import pytest
import torch
import torch.nn.functional as F

import bcosification
from tests.bcosification.contract import networks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def trained(model, x, dtype):
    """Loss, logits and scaled gradients of one step under autocast (None: without), statistics afterwards."""
    twin = copy.deepcopy(model)
    scale = 2.0**10  # as a gradient scaler does: small gradients are no numbers in float16
    targets = torch.eye(networks.CLASSES, dtype=torch.float32)[: len(x)]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = twin(x)
        loss = F.binary_cross_entropy_with_logits(logits.float() if dtype else logits, targets.to(x.dtype))
    (loss * scale).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    variances = {name: b for name, b in twin.named_buffers() if name.endswith("running_var")}
    return logits.detach(), gradients, variances


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", networks.SMALL)
def test_training_step(name, dtype):
    """The whole gradient is at most twice as far from float64's as that of plain PyTorch under the same autocast."""
    dtype = DTYPES[dtype]
    model, x = networks.converted(name, torch.float32), networks.images(name, 5, dtype=torch.float32)
    networks.set_mode(model, "training")
    logits, gradients, variances = trained(model, x, dtype)
    with networks.definition():
        exact = trained(copy.deepcopy(model).double(), x.double(), None)
        plain = trained(model, x, dtype)
    assert logits.dtype == plain[0].dtype == dtype
    assert error(logits, exact[0]) < max(2 * error(plain[0], exact[0]), 1e-2)
    assert gradients.keys() == exact[1].keys()
    for parameter, g in gradients.items():
        assert g.dtype == torch.float32 and torch.isfinite(g).all(), parameter
    mine, theirs, true = (torch.cat([g.double().flatten() for g in each[1].values()]) for each in
                          ((None, gradients), plain, exact))  # fmt: skip
    assert error(mine, true) < max(2 * error(theirs, true), 1e-2)
    for buffer, variance in variances.items():
        assert variance.dtype == torch.float32
        assert error(variance, exact[2][buffer]) < max(2 * error(plain[2][buffer], exact[2][buffer]), 1e-2), buffer


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_layers(dtype):
    """Layers and norms give autocast's type; their parameters stay, and so does what a norm keeps."""
    dtype, nn = DTYPES[dtype], bcosification.nn
    image, tokens = torch.rand(2, 4, 5, 5), torch.rand(2, 3, 4)
    layers = [
        (nn.BcosConv2d(4, 6, 3, b=torch.nn.Parameter(torch.tensor(1.7)), max_out=2), image, dtype),
        (nn.BcosConv2d(4, 4, 3, groups=4, bias=True, padding=1, padding_mode="reflect"), image, dtype),
        (nn.BcosLinear(4, 6, b=1.5), tokens, dtype),
        (nn.BatchNormUncentered2d(4), image, dtype),
        (nn.MultiheadAttention(4, 2, batch_first=True), tokens, dtype),
        # as torch's own, these run in float32 under autocast
        (nn.LayerNorm(4), tokens, torch.float32),
        (nn.GroupNorm(2, 4), image, torch.float32),
    ]
    for layer, x, expected in layers:
        x = x.clone().requires_grad_()
        inputs = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
        with torch.autocast("cpu", dtype):
            y = layer(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        assert y.dtype == expected, type(layer).__name__
        with torch.no_grad():
            plain = layer(*inputs)
        assert error(y.detach(), (plain[0] if isinstance(plain, tuple) else plain).double()) < 2e-2
        y.float().sum().backward()
        for t in (x, *layer.parameters()):
            assert t.grad.dtype == t.dtype == torch.float32 and torch.isfinite(t.grad).all(), type(layer).__name__
        assert all(b.dtype in (torch.float32, torch.long) for b in layer.buffers())


@pytest.mark.parametrize("dtype", DTYPES)
def test_explanations(dtype):
    """W(x) under autocast is W(x) to the type's accuracy, and comes in the images' type."""
    model, x = networks.converted("resnet", torch.float32), networks.images("resnet", dtype=torch.float32)
    exact = bcosification.explain(copy.deepcopy(model).double(), x.double(), 1)
    with torch.autocast("cpu", DTYPES[dtype]):
        got = bcosification.explain(model, x, 1)
        with networks.definition():
            plain = bcosification.explain(model, x, 1)
    assert got.weights.dtype == torch.float32
    assert error(got.weights, exact.weights) < max(2 * error(plain.weights, exact.weights), 1e-2)
