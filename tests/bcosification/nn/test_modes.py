"""The explanation_mode context: counted, restoring, also for the peers' modules."""

import threading

import bcos.modules
import pytest
import torch
from torch import nn

from bcosification.nn import BcosLinear, LayerNorm, explanation_mode


def network():
    return nn.Sequential(BcosLinear(4, 4), nn.Sequential(LayerNorm(4), bcos.modules.BcosLinear(4, 4)), nn.ReLU())


def modes(model):
    return [m.is_in_explanation_mode for m in model.modules() if hasattr(m, "set_explanation_mode")]


def test_restores_the_modes_that_it_found():
    model = network()
    model[1][0].set_explanation_mode()
    model.eval()
    x = torch.randn(2, 4, requires_grad=True)
    with explanation_mode(model) as entered:
        assert entered is model
        assert modes(model) == [True, True, True]
        model(x).sum().backward()
    assert modes(model) == [False, True, False]
    assert not model.training and x.grad is not None


def test_nests_also_with_submodules_and_one_context_object():
    model = network()
    context = explanation_mode(model)
    with context:
        with explanation_mode(model[1]), context:
            assert modes(model) == [True] * 3
        assert modes(model) == [True] * 3
        with pytest.raises(KeyError):
            with explanation_mode(model):
                raise KeyError
        assert modes(model) == [True] * 3
    assert modes(model) == [False] * 3


def test_overlapping_contexts_of_part_and_whole_end_in_any_order():
    model = network()
    part, whole = explanation_mode(model[1]), explanation_mode(model)
    part.__enter__()
    whole.__enter__()
    part.__exit__(None, None, None)
    assert modes(model) == [True] * 3
    whole.__exit__(None, None, None)
    assert modes(model) == [False] * 3


def test_threads_overlap():
    model = network()
    barrier, errors = threading.Barrier(4), []

    def explain():
        try:
            barrier.wait(10)
            for _ in range(200):
                with explanation_mode(model):
                    if modes(model) != [True] * 3:
                        errors.append("a module left explanation mode inside a context")
        except Exception as error:  # noqa: BLE001
            errors.append(repr(error))

    threads = [threading.Thread(target=explain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert modes(model) == [False] * 3


def test_a_module_that_refuses_undoes_everything():
    model = nn.Sequential(BcosLinear(4, 4), bcos.modules.norms.BatchNorm2d(4))
    with pytest.raises(AssertionError, match="only supports explanation mode during"):
        with explanation_mode(model):
            pass
    assert not model[0].is_in_explanation_mode
    model.eval()
    with explanation_mode(model):
        assert model[0].is_in_explanation_mode
    assert not model[0].is_in_explanation_mode


def test_explained_gradient_is_the_frozen_map():
    layer = BcosLinear(4, 3, normalize_weight=False, dtype=torch.float64)
    x = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    with explanation_mode(layer):
        y = layer(x)
    (w,) = torch.autograd.grad(y[0, 1], x)
    cosine = (x[0] @ layer.weight[1]).abs() / x.norm()
    assert torch.allclose(w[0], layer.weight[1] * cosine, rtol=1e-12)


def test_not_a_module():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        explanation_mode(3)
