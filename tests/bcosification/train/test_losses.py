"""The losses against the peer's, and against sums written out by hand."""

import math

import pytest
import torch
from bcos.modules.losses import BinaryCrossEntropyLoss, UniformOffLabelsBCEWithLogitsLoss

from bcosification.train.losses import BinaryCrossEntropy, UniformOffLabelsBCE, build_loss

CASES = [(1, 2), (7, 10), (5, 1000)]


def _batch(samples, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator) * 4
    return logits, torch.randint(classes, (samples,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("samples, classes", CASES)
def test_equal_to_the_peer(samples, classes, reduction):
    logits, target = _batch(samples, classes)
    for ours, peer in (
        (BinaryCrossEntropy(reduction), BinaryCrossEntropyLoss(reduction=reduction)),
        (UniformOffLabelsBCE(reduction=reduction), UniformOffLabelsBCEWithLogitsLoss(reduction=reduction)),
        (UniformOffLabelsBCE(0.03, reduction), UniformOffLabelsBCEWithLogitsLoss(reduction, off_label=0.03)),
    ):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = ours(x, target), peer(y, target)
        assert torch.equal(a, b)
        a.sum().backward()
        b.sum().backward()
        assert torch.equal(x.grad, y.grad)


def test_by_hand():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    sigmoid = [1 / (1 + math.exp(-v)) for v in logits[0].tolist()]
    off = 1 / 3

    def term(t, p):
        return -(t * math.log(p) + (1 - t) * math.log(1 - p))

    expected = (term(off, sigmoid[0]) + term(1, sigmoid[1]) + term(off, sigmoid[2])) / 3
    assert UniformOffLabelsBCE()(logits, torch.tensor([1])).item() == pytest.approx(expected, rel=1e-6)
    expected = (term(0, sigmoid[0]) + term(1, sigmoid[1]) + term(0, sigmoid[2])) / 3
    assert BinaryCrossEntropy()(logits, torch.tensor([1])).item() == pytest.approx(expected, rel=1e-6)


def test_dense_targets_are_taken_as_they_are():
    logits, target = _batch(4, 6)
    dense = torch.nn.functional.one_hot(target, 6).double() * 0.7
    expected = UniformOffLabelsBCEWithLogitsLoss()(logits, dense.float())
    assert torch.equal(UniformOffLabelsBCE()(logits, dense), expected)


def test_errors_name_what_came():
    with pytest.raises(ValueError, match=r"expected class numbers of shape \(4,\).*got torch.float32 of shape \(4,\)"):
        BinaryCrossEntropy()(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="0 < off_label <= 1"):
        UniformOffLabelsBCE(0.0)
    with pytest.raises(ValueError, match="bce_uniform.*got 'mse'"):
        build_loss("mse")
