"""The training module: schedule, weight decay groups, clipping, metrics, against torch by hand."""

import math

import pytest
import torch
from torch import nn

from bcosification.train.data import ImageDataModule, ImageTensors, digits
from bcosification.train.lightning_module import ClassificationModule, cosine_with_warmup, parameter_groups
from bcosification.train.losses import UniformOffLabelsBCE
from bcosification.train.training import train


def _network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def _data(count=40, batch_size=10):
    part = digits("train")
    data = ImageTensors(part.images[:count], part.labels[:count], part.class_names)
    return ImageDataModule(data, data, part.class_names, batch_size=batch_size)


def test_learning_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    schedule = cosine_with_warmup(optimizer, 20, 5, start_factor=0.1)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    warmup = [0.5 * (0.1 + 0.9 * step / 5) for step in range(5)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    assert rates == pytest.approx(warmup + cosine)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"0 <= warm-up steps < steps \(4\), got 4"):
        cosine_with_warmup(optimizer, 4, 4)


def test_weight_decay_spares_vectors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    with_decay, without = parameter_groups(model, 0.1)
    assert [p.shape for p in with_decay["params"]] == [(4, 3, 3, 3)] and with_decay["weight_decay"] == 0.1
    assert {p.shape for p in without["params"]} == {(4,), (2,)} and without["weight_decay"] == 0
    (everything,) = parameter_groups(model, 0.0)
    assert len(everything["params"]) == 5


def test_training_is_the_loop_written_by_hand():
    model, reference = _network(), _network()
    data = _data()
    rows = train(ClassificationModule(model, 10, lr=1e-2), data, epochs=2, progress=False)
    loss = UniformOffLabelsBCE()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    schedule = cosine_with_warmup(optimizer, 8)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        losses, right = [], 0
        for images, labels in loader:
            logits = reference(images)
            value = loss(logits, labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            right += (logits.argmax(1) == labels).sum().item()
        assert rows[epoch]["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
        assert rows[epoch]["train_top1"] == pytest.approx(right / 40)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    with torch.no_grad():
        images, labels = data.val.tensors()
        logits = reference(images)
    assert rows[-1]["val_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert rows[-1]["val_top5"] == pytest.approx(top5)
    one_hot = nn.functional.one_hot(labels, 10).float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, one_hot).item()
    assert rows[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_adaptive_clipping_bounds_every_unit():
    model = _network()
    module = ClassificationModule(model, 10, agc=0.01)
    module.clip_gradients = lambda *arguments: None  # needs a Trainer; not asked for here
    (model(torch.rand(4, 3, 32, 32)) * 100).square().sum().backward()
    weight = model[1].weight
    before = weight.grad.clone()
    module.configure_gradient_clipping(None)
    limit = 0.01 * weight.detach().norm(dim=1).clamp(min=1e-3)
    assert (before.norm(dim=1) > limit).all()
    assert torch.allclose(weight.grad.norm(dim=1), limit, rtol=1e-4)
    directions = nn.functional.cosine_similarity(weight.grad, before, dim=1)
    assert torch.allclose(directions, torch.ones(10), atol=1e-5)


def test_norm_clipping_limits_the_step():
    class Plain(ClassificationModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    def moved(clip):
        model = _network()
        start = [p.detach().clone() for p in model.parameters()]
        train(Plain(model, 10), _data(10), epochs=1, clip_norm=clip, progress=False)
        return torch.cat([(a - b).flatten() for a, b in zip(start, model.parameters(), strict=True)]).norm().item()

    assert moved(None) > 0.02
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"expected one of \('adam', 'adamw'\), got 'sgd'"):
        ClassificationModule(_network(), 10, optimizer="sgd")
