"""SimpleViT and ViT_c: converted as B-cosification does it, exact at B = 1 with the head kept, and whole afterwards."""

import copy
import pickle

import pytest
import torch

from bcosification import bcosify, explain, fuse, load, reset_head, unfuse, verify
from bcosification import nn as bnn
from bcosification.convert.families.simple_vit import BcosAttention
from bcosification.convert.frozen_replay import frozen_replay
from tests.bcosification.convert.peer_networks import b_cosification, logits_and_gradient, make_standard
from tests.bcosification.convert.standard_networks import normalized, relative_error
from tests.bcosification.models.test_simple_vit import small

STEMS = pytest.mark.parametrize("stem", [False, True], ids=["simple_vit", "vitc"])
EXACT = {"b": 1, "bias": "keep", "pool": "keep"}


def make(stem):
    """One of our networks, the peer's standard one of the same weights with the head before the mean, images, x6."""
    peer, x6 = make_standard("vitc" if stem else "simple_vit")
    network = small(stem).double().eval()
    network.load_state_dict(peer.state_dict())
    return network, peer, x6[:, :3], x6


@STEMS
@pytest.mark.parametrize(
    "options", [{}, {"bias": "keep", "logit_bias": None}, {"b": 1.5}], ids=["b=2", "biases kept", "b=1.5"]
)
def test_the_same_numbers_as_b_cosification(stem, options):
    network, peer, images, x6 = make(stem)
    converted = bcosify(network, **{"logit_bias": -6.906754778648554, **options})
    peer = b_cosification(peer, keep_bias="bias" in options, b=options.get("b", 2)).double().eval()
    if "bias" in options:
        peer.logit_layer.logit_bias = None
    expected, gradient = logits_and_gradient(peer, x6)
    explanation = explain(converted, images, 1)
    assert relative_error(explanation.logits, expected) < 1e-6
    assert relative_error(converted(x6).detach(), expected) < 1e-6
    assert relative_error(explanation.weights, gradient) < 1e-6
    assert gradient.abs().max() > 1e-6


@STEMS
def test_what_each_layer_becomes(stem):
    network, _, _, _ = make(stem)
    model = bcosify(network).model
    embedding = model.to_patch_embedding
    reader, original = embedding.linear, network.to_patch_embedding.linear
    if stem:
        reader, original = embedding.conv_stem[0], network.to_patch_embedding.conv_stem[0]
        assert torch.equal(reader.weight, torch.cat([original.weight, -original.weight], 1) / 2)
        assert [type(layer) for layer in embedding.conv_stem[:3]] == [bnn.BcosConv2d, bnn.GroupNorm, bnn.GELU]
    else:
        pixels = original.weight.view(64, 8 * 8, 3)  # channels innermost: W and -W side by side in every pixel
        assert torch.equal(reader.weight.view(64, 8 * 8, 6), torch.cat([pixels, -pixels], 2) / 2)
        assert reader.in_features == 8 * 8 * 6
    encoder = model.transformer.encoder_0
    assert type(encoder.attn) is BcosAttention and type(encoder.attn.to_qkv) is torch.nn.Linear
    assert type(encoder.attn.to_out) is bnn.BcosLinear and type(encoder.attn.norm) is bnn.LayerNorm
    assert [type(layer) for layer in encoder.ff.net] == [bnn.LayerNorm, bnn.BcosLinear, bnn.GELU, bnn.BcosLinear]
    assert type(model.linear_head.linear) is bnn.BcosLinear
    assert set(model.state_dict()) == {name for name in network.state_dict() if not name.endswith("bias")}
    without = bcosify(network, activation="remove").model
    assert type(without.transformer.encoder_1.ff.net.act) is torch.nn.Identity


@STEMS
@pytest.mark.parametrize("head", ["before_pool", "keep"])
def test_verified_and_explained(stem, head):
    network, _, images, _ = make(stem)
    converted = bcosify(network, head=head)
    report = verify(network, converted, images)
    assert report.ok and report.equivalence.error < 1e-12
    told = [text for text in report.equivalence.differs_by if "head=" in text]
    assert len(told) == (head == "before_pool")
    replay = frozen_replay(converted, converted.encode(images))
    explanation = explain(converted, images)
    assert relative_error(explanation.weights, replay.gradient(explanation.targets)) < 1e-9
    assert relative_error(explanation.constant, replay.constant(explanation.targets)) < 1e-9
    assert float(replay.constant(explanation.targets).abs().min()) > 1e-6, "positions, mean and logit bias add to it"


@STEMS
def test_only_the_head_kept_is_exact_at_b_1(stem):
    network, _, images, _ = make(stem)
    with torch.no_grad():
        expected = network(normalized(images))
        assert relative_error(bcosify(network, **EXACT, head="keep")(images), expected) < 1e-12
        moved = bcosify(network, **EXACT)
        assert relative_error(moved(images), expected) > 1e-3
        tokens = network.forward_tokens(normalized(images))
        assert relative_error(moved(images), network.linear_head(tokens).mean(1)) < 1e-12


def test_attention_that_forgets_the_detach_is_found(monkeypatch):
    network, _, images, _ = make(False)
    monkeypatch.delattr(BcosAttention, "attend")
    assert not verify(network, bcosify(network), images).explanation.ok


@STEMS
def test_saved_loaded_copied_with_another_head(stem, tmp_path):
    network, _, images, _ = make(stem)
    model = bcosify(network)
    assert model.config["architecture"]["conv_stem"] == ([8, 8, 12, 12, 16] if stem else [])
    reset_head(model, 3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(images)
        for other in (load(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert expected.shape == (2, 3) and torch.equal(other(images), expected)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_fusing_and_unfusing_change_nothing(memory):
    network, _, images, _ = make(True)
    plain = bcosify(network)

    def gradients(model):
        model.zero_grad()
        model.train()
        model(images).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, explained = gradients(plain), explain(plain, images)
    fused = fuse(copy.deepcopy(plain), memory=memory)
    assert not fused.fusion_report.left
    for model in (fused, unfuse(fused)):
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(explain(model, images).weights, explained.weights, rtol=1e-9, atol=1e-13)
