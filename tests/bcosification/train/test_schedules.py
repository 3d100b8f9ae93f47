"""Schedules of B and of the biases, inside a real Trainer."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

import bcosification
from bcosification.train.lightning_module import ClassificationModule
from bcosification.train.schedules import BiasDecay, LinearB, linear_ramp, scale_biases
from bcosification.train.training import train
from tests.bcosification.train.small import STATISTICS, small_data, small_network


class Recorder(Callback):
    """What a step is computed with, seen after all other callbacks' on_train_batch_start."""

    def __init__(self, read):
        self.read, self.seen = read, []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append(self.read(pl_module.model))


def test_linear_ramp():
    assert [linear_ramp(step, 4, 1.0, 2.0) for step in range(6)] == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0]


def test_b_rises_with_the_steps_and_ends_as_a_number():
    model = bcosification.bcosify(small_network(), **STATISTICS)
    layers = [module for module in model.modules() if hasattr(module, "set_b")]
    assert len(layers) == 3
    recorder = Recorder(lambda m: [float(layer.b) for layer in layers])
    kinds = Recorder(lambda m: {isinstance(layer.b, torch.Tensor) for layer in layers})
    module = ClassificationModule(model, 10, lr=1e-3)
    schedule = LinearB(1.5, start=1.0, end=2.5)
    rows = train(module, small_data(), epochs=3, callbacks=[schedule, recorder, kinds], progress=False)
    # Four steps an epoch, six of them rising: 1, 1.25, … 2.25, then 2.5.
    expected = [1 + 1.5 * min(step, 6) / 6 for step in range(12)]
    assert [values[0] for values in recorder.seen] == pytest.approx(expected)
    assert all(len(set(values)) == 1 for values in recorder.seen)
    assert kinds.seen == [{True}] * 6 + [{False}] * 6
    assert [row["b"] for row in rows] == [pytest.approx(2.0), 2.5, 2.5]
    assert all(type(layer.b) is float for layer in layers)
    assert not any(name.endswith(".b") for name in model.state_dict())


def test_a_step_with_a_rising_b_is_the_step_at_that_b():
    """The first epoch at B = 1.25 in the middle: the gradients are those of a model that has this B throughout."""
    network = small_network()
    scheduled = bcosification.bcosify(network, **STATISTICS)
    fixed = bcosification.bcosify(network, b=1.0, **STATISTICS)
    data = small_data(count=12)
    rows = train(ClassificationModule(scheduled, 10, lr=1e-3), data, epochs=1, callbacks=[LinearB(1.0)], progress=False)
    expected = train(ClassificationModule(fixed, 10, lr=1e-3), data, epochs=1, progress=False)
    assert rows[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-5)


def test_biases_shrink_to_nothing_and_go():
    model = bcosification.bcosify(small_network(), bias="decay", **STATISTICS)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(before) == 4
    module = ClassificationModule(model, 10, lr=1e-30)  # the optimiser moves nothing: what is left is the decay
    recorder = Recorder(lambda m: {n: p.detach().clone() for n, p in m.named_parameters() if n.endswith("bias")})
    rows = train(module, small_data(), epochs=2, callbacks=[BiasDecay(1.0), recorder], progress=False)
    for step, seen in enumerate(recorder.seen[:4]):
        assert seen.keys() == before.keys()
        for name, value in seen.items():
            assert torch.allclose(value, before[name] * (1 - step / 4), rtol=1e-5), (step, name)
    assert recorder.seen[4:] == [{}] * 4
    assert [row["bias_factor"] for row in rows] == [0.0, 0.0]
    assert not any(name.endswith("bias") for name in model.state_dict())
    assert model.config["options"]["bias"] == "remove"


def test_the_optimiser_forgets_removed_biases():
    model = bcosification.bcosify(small_network(), bias="decay", **STATISTICS)
    groups = Recorder(lambda m: None)

    class Groups(Callback):
        def on_train_end(self, trainer, pl_module):
            groups.held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
            groups.states = {id(p) for p in trainer.optimizers[0].state}

    module = ClassificationModule(model, 10, lr=1e-3, optimizer="adamw", weight_decay=0.1)
    train(module, small_data(), epochs=2, callbacks=[BiasDecay(1.5), Groups()], progress=False)
    assert groups.held == groups.states == {id(p) for p in model.parameters()}


def test_scale_biases_leaves_weights_alone():
    model = small_network()
    other = copy.deepcopy(model)
    scale_biases(other, 0.25)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(b, a * 0.25 if name.endswith("bias") else a), name


def test_errors():
    for wrong in (dict(epochs=0), dict(epochs=1, start=0.5), dict(epochs=1, start=2.0, end=1.5)):
        with pytest.raises(ValueError, match="LinearB: expected"):
            LinearB(**wrong)
    with pytest.raises(ValueError, match="BiasDecay: expected epochs > 0, got -1"):
        BiasDecay(-1)
    with pytest.raises(ValueError, match="expected a model with B-cos layers"):
        train(ClassificationModule(small_network(), 10), small_data(), epochs=1, callbacks=[LinearB(1)], progress=False)
    with pytest.raises(ValueError, match="found no bias in it"):
        model = bcosification.bcosify(small_network(), **STATISTICS)
        train(ClassificationModule(model, 10), small_data(), epochs=1, callbacks=[BiasDecay(1)], progress=False)
