"""fuse on every kind of classifier that B-cos v2 and B-cosification publish: whole, same numbers, their explain."""

import copy

import pytest
import torch
from bcos.common import BcosUtilMixin
from torch import nn

from bcosification import explain, fuse, unfuse
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.peers import PeerAttention
from bcosification.nn import LayerNorm2d
from tests.bcosification.convert.peer_networks import STANDARD, V2, b_cosification, make_standard, make_v2
from tests.bcosification.convert.standard_networks import relative_error

MAKERS = {
    **{f"bcos: {name}": lambda name=name: make_v2(name) for name in V2},
    **{f"b-cosification: {name}": lambda name=name: _bcosified(name) for name in STANDARD},
}
EVERY = pytest.mark.parametrize("name", MAKERS)


def _bcosified(name):
    standard, x = make_standard(name)
    return b_cosification(standard).double().eval(), x


def results(model, x, training):
    """Logits, and the gradients of one direction with respect to the input and every parameter."""
    model.train(training)
    x = x.clone().requires_grad_()
    torch.manual_seed(2)  # stochastic depth
    logits = model(x)
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    logits.backward(direction)
    model.eval()
    return {"logits": logits.detach(), "x": x.grad, **{key: p.grad.clone() for key, p in model.named_parameters()}}


@EVERY
def test_nothing_of_the_peers_is_left_to_run(name):
    peer, _ = MAKERS[name]()
    state, parameters = set(peer.state_dict()), dict(peer.named_parameters())
    fused = fuse(peer)
    assert fused.fusion_report.left == []
    theirs = {
        path: type(module)
        for path, module in fused.named_modules()
        if hasattr(module, "set_explanation_mode") and not type(module).__module__.startswith("bcosification.")
    }
    assert theirs == {}, "every dynamic module is one of this package"
    assert set(fused.state_dict()) == state
    assert all(parameters[key] is parameter for key, parameter in fused.named_parameters())


@EVERY
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_same_numbers_fused_and_unfused(name, training):
    peer, x = MAKERS[name]()
    fused = fuse(copy.deepcopy(peer), memory="low" if training else "default")
    expected = results(peer, x, training)
    largest = max(value.norm() for value in expected.values())
    for model in (fused, unfuse(fused)):
        for key, value in results(model, x, training).items():
            error = (value - expected[key]).norm()
            assert error <= 1e-8 * expected[key].norm() + 1e-12 * largest, (key, error)


@EVERY
def test_a_fused_network_has_the_peers_explain(name):
    peer, x = MAKERS[name]()
    fused = fuse(copy.deepcopy(peer))
    assert isinstance(fused, BcosUtilMixin)
    one = x[:1]
    expected = peer.explain(one.clone().requires_grad_(), idx=2)
    got = fused.explain(one.clone().requires_grad_(), idx=2)
    assert got["prediction"] == expected["prediction"] and got["explained_class_idx"] == 2
    for key in ("dynamic_linear_weights", "contribution_map"):
        assert relative_error(got[key].detach(), expected[key].detach()) < 1e-6 and expected[key].abs().max() > 1e-9
    explanation = explain(fused, one, 2)
    assert relative_error(explanation.weights, expected["dynamic_linear_weights"]) < 1e-6
    replay = frozen_replay(fused, one)
    assert replay.is_affine() and relative_error(explanation.weights, replay.gradient(2)) < 1e-8
    assert relative_error(explanation.constant, replay.constant(2)) < 1e-8
    assert not any(getattr(module, "detach", False) for module in fused.modules()), "its mode is off again"


def test_attention_whose_softmax_is_watched_is_left():
    peer, x = make_v2("simple_vit")
    seen = []
    peer[0].transformer[0].attn.attend.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with pytest.warns(UserWarning, match="encoder_0.attn .Attention: its softmax has hooks"):
        fused = fuse(peer)
    assert type(fused[0].transformer[1].attn) is PeerAttention
    fused(x)
    assert seen == [(2, 1, 16, 16)]
    peer, _ = make_v2("simple_vit")
    peer[0].transformer[0].attn.attend = nn.Softmax(dim=-2)
    with pytest.warns(UserWarning, match=r"its attend is Softmax\(dim=-2\), not Softmax\(dim=-1\)"):
        fuse(peer)


def test_position_norms_become_layer_norms():
    peer, _ = make_v2("convnext, position norms")
    norms = [path for path, module in peer.named_modules() if type(module).__name__ == "DetachablePositionNorm2d"]
    fused = fuse(peer)
    assert len(norms) == 8 and all(type(fused.get_submodule(path)) is LayerNorm2d for path in norms)
    assert type(unfuse(fused).get_submodule(norms[0])).__name__ == "DetachablePositionNorm2d"
