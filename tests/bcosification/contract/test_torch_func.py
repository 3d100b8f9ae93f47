"""torch.func on converted networks: W(x) of all classes at once, and its derivatives."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import bcosification
from tests.bcosification.contract import networks


def encoded(model, x):
    return model.encode(x).detach()


def relative_error(got, expected):
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", networks.SMALL)
def test_jacrev_gives_w_of_every_class_at_once(name):
    """W(x), class by class, is what explain() gives, from jacrev, from vmap over the images, and by batched vjps."""
    model, x = networks.converted(name), networks.images(name)
    x6 = encoded(model, x)
    expected = torch.stack([bcosification.explain(model, x, c).weights for c in range(networks.CLASSES)], 1)
    with bcosification.explanation_mode(model):
        jacobian = torch.func.jacrev(model)(x6)  # (N, classes, N, 6, H, W)
        per_image = torch.func.vmap(torch.func.jacrev(lambda image: model(image[None])[0]))(x6)
        leaf = x6.clone().requires_grad_()
        each = torch.eye(networks.CLASSES, dtype=x.dtype)[:, None].expand(-1, len(x), -1)
        (batched,) = torch.autograd.grad(model(leaf), leaf, each, is_grads_batched=True)
    own = torch.stack([jacobian[i, :, i] for i in range(len(x))])
    assert not (jacobian.norm() - own.norm()).abs() > 1e-12 * own.norm()  # an image does not see the others
    assert relative_error(own, expected) < 1e-12
    assert relative_error(per_image, expected) < 1e-12
    assert relative_error(batched.transpose(0, 1), expected) < 1e-12


@pytest.mark.parametrize("name", networks.SMALL)
def test_w_changes_with_the_weights_as_the_definition_says(name):
    """∂/∂w and ∂/∂x of a function of W(x), as training on explanations needs: scales are constant at every order."""
    model, x = networks.converted(name), networks.images(name, 2)
    networks.set_mode(model, "explaining")
    x6 = encoded(model, x)
    parameters = dict(model.named_parameters())

    def derivatives():
        leaf = x6.clone().requires_grad_()
        (weights,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf, create_graph=True)
        loss = (weights * x6).sum(1).square().sum()
        found = torch.autograd.grad(loss, [leaf, *parameters.values()], materialize_grads=True)
        return {"W": weights.detach(), "dx": found[0], **dict(zip(parameters, found[1:], strict=True))}

    # torch's fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        got = derivatives()
        with networks.definition():
            expected = derivatives()
    assert sum(bool(g.any()) for g in expected.values()) > len(expected) // 2
    networks.assert_same(got, expected, 1e-9)


@pytest.mark.parametrize("name", networks.SMALL)
def test_gradients_of_every_sample(name):
    """vmap over grad through functional_call: one gradient of each parameter for every image."""
    model, x = networks.converted(name), networks.images(name)
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        with networks.definition():
            expected = torch.func.grad(loss)(parameters, image)
        networks.assert_same({k: g[i] for k, g in got.items()}, expected, 1e-9)
