"""torch.export of converted networks, in a fixed mode and for any batch size."""

import io

import pytest
import torch

import bcosification
from tests.bcosification.contract import networks


def export(model, x, **options):
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},), **options)


@pytest.mark.parametrize("mode", networks.MODES)
@pytest.mark.parametrize("name", networks.SMALL)
def test_programs_are_the_network_at_any_batch_size(name, mode):
    """Outputs, gradients and running statistics, at the example's batch size and others."""
    model = networks.set_mode(networks.converted(name), mode)
    program = export(model, networks.images(name)).module()
    for size in (3, 1, 5) if mode != "training" else (3, 5):
        x = networks.images(name, size, seed=size)
        got = networks.results_of_copy(program, x)
        networks.assert_same(got, networks.results_of_copy(model, x), 1e-9)
    # the mode is the one of its making, whatever becomes of the network
    networks.set_mode(model, "eval" if mode == "explaining" else "explaining")
    networks.assert_same(networks.results_of_copy(program, x), got, 1e-12)
    assert not torch.allclose(networks.results_of_copy(model, x)["dx"], got["dx"])


def test_strict_export():
    model, x = networks.set_mode(networks.converted("vit"), "explaining"), networks.images("vit")
    program = export(model, x, strict=True).module()
    networks.assert_same(networks.results(program, x[:2]), networks.results(model, x[:2]), 1e-9)


def test_saved_programs():
    """Saved, loaded, decomposed; W(x) of all classes from a program that was made in explanation mode."""
    model, x = networks.set_mode(networks.converted("densenet"), "explaining"), networks.images("densenet", 2)
    x6 = model.encode(x)
    program = export(model, x6)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    networks.set_mode(model, "eval")
    expected = torch.stack([bcosification.explain(model, x, c).weights for c in range(networks.CLASSES)], 1)
    for function in (loaded.module(), loaded.run_decompositions().module()):
        with torch.no_grad():
            torch.testing.assert_close(function(x6), model(x), rtol=1e-12, atol=1e-12)
    jacobian = torch.func.jacrev(loaded.module())(x6)
    own = torch.stack([jacobian[i, :, i] for i in range(len(x))])
    assert (own - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit():
    """Outputs and gradients of torch.jit.trace, at another batch size than the example's."""
    model = networks.converted("resnet")
    traced = torch.jit.trace(model, networks.images("resnet"), check_trace=False)
    x = networks.images("resnet", 2, seed=5)
    networks.assert_same(networks.results(model, x, traced), networks.results(model, x), 1e-9)
