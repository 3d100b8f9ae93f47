"""B-cosification's CLIP checkpoints: every layout, the same embeddings, cosines and explanations, and back."""

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from bcosification import BcosifiedCLIP, bcosify, explain, export_peer, fuse, load, load_peer
from bcosification import nn as bnn
from bcosification.convert.peer_architectures import TOWERS
from tests.bcosification.convert.b_cosification_clip import clip_tower, cosine_and_gradient, encoded
from tests.bcosification.convert.standard_networks import relative_error
from tests.bcosification.small_clip import TEXTS, clip

SIZE = 10


def text(seed=3):
    return F.normalize(torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=0)


def assert_same(model, peer, x, power=None):
    """Embeddings, cosines, W(x) through the norm and with the norm constant; with ``power`` those of every position."""
    if power is not None:
        model.set_attention_pool("unpool", p=power)
        peer.model.attnpool.attn_unpool = True
    with torch.no_grad():
        expected = peer(x)
        expected = expected if power is None else expected.transpose(0, 1)
        assert relative_error(model.image_features(x), expected) < 1e-10
        assert relative_error(model.image_features(x[:, :3]), expected) < 1e-6, "images are encoded inside"
    for protocol in ("paper", "peer"):
        cosines, gradient = cosine_and_gradient(peer, x, text(), power or 1, through_norm=protocol == "peer")
        explanation = explain(model, x, text=text()[None], protocol=protocol)
        assert relative_error(explanation.logits[:, 0], cosines) < 1e-10
        assert relative_error(explanation.weights[:, 0], gradient) < 1e-10
        assert gradient.abs().max() > 1e-9


@pytest.mark.parametrize("b", [2, 1.5])
def test_the_same_numbers_and_back(b, tmp_path):
    peer, x = clip_tower(b=b), encoded()
    torch.save(peer.state_dict(), tmp_path / "last.ckpt")
    model = load_peer(tmp_path / "last.ckpt", b=b)
    assert type(model) is BcosifiedCLIP and model.attention_pool == "pool" and not model.training
    assert model.config["peer_layout"] == "b-cosification" and model.text is None and model.logit_scale is None
    assert_same(model, peer, x)
    exported = export_peer(model, "b-cosification")
    assert {name: value.shape for name, value in exported.items()} == {n: v.shape for n, v in peer.state_dict().items()}
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in exported.items())
    assert copy.deepcopy(peer).load_state_dict(exported) == ([], [])
    for power in (1, 3):  # the same weights, unpooled
        assert_same(model, peer, x, power)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model").image_features(x), model.image_features(x))
    assert set(export_peer(load(tmp_path / "model"), "b-cosification")) == set(exported)


def test_the_layers_are_those_of_bcosify():
    model = load_peer(clip_tower(layers=(1, 1, 1, 1)).state_dict())
    other = bcosify(ModifiedResNet([1, 1, 1, 1], SIZE, 4, 64, 8).double().eval())
    assert repr(model.model) == repr(other.model) and model.state_dict().keys() == other.state_dict().keys()
    assert (model.config["mean"], model.config["std"]) == (other.config["mean"], other.config["std"])
    assert not fuse(model).fusion_report.left


def test_the_peers_network_itself_is_fused():
    peer, x = clip_tower(), encoded()
    expected = cosine_and_gradient(peer, x, text())
    keys = list(peer.state_dict())
    report = fuse(peer).fusion_report
    assert sum(after == "PeerBcosifyConv2d" for _, _, after in report.fused) == 22
    assert [name for name, _, _ in report.left] == [], "its pooling works as it is"
    for got, wanted in zip(cosine_and_gradient(peer, x, text()), expected, strict=True):
        assert relative_error(got, wanted) < 1e-10
    assert list(peer.state_dict()) == keys


def test_a_conversion_of_ours_is_read_by_b_cosifications_network():
    whole = clip("resnet")
    model, x = bcosify(whole), encoded()
    exported = export_peer(model, "b-cosification")
    peer = clip_tower(layers=(1, 1, 1, 1), seed=7)
    assert peer.load_state_dict(exported) == ([], []), "neither texts nor logit_scale are in it"
    assert_same(model, peer, x)


@pytest.mark.parametrize("layout", ["state_dict", "lightning", "lightning's state_dict", "averaged", "stripped"])
@pytest.mark.parametrize("scales", [False, True])
def test_every_layout_of_a_file(layout, scales, tmp_path):
    peer, x = clip_tower(), encoded()
    if scales:  # learnt ones are the network's own parameters there
        peer.logit_scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        peer.logit_bias = nn.Parameter(torch.tensor(-9.0, dtype=torch.float64))
    state = peer.state_dict()
    # In training, the standard tower that is distilled from lies beside the network.
    teacher = ModifiedResNet([1, 1, 1, 1], SIZE, 4, 64, 8).state_dict()
    content = {f"model.{name}": value for name, value in state.items()}
    content |= {f"clip_model.{name}": value for name, value in teacher.items()}
    content |= {"criterion.weight": torch.ones(2)}
    if layout == "averaged":
        content |= {f"ema.module.{name}": value for name, value in state.items()} | {"ema.n_averaged": torch.tensor(3)}
        for name in state:
            content[f"model.{name}"] = torch.zeros_like(state[name])
    whole = {
        "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.1.0", "state_dict": content,
        "hyper_parameters": {"dataset": "ImageNet", "base_network": "clip_bcosification", "clip_kd": True},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    }  # fmt: skip
    stripped = {name.removeprefix("model."): value for name, value in content.items() if name.startswith("model.")}
    saved = {"state_dict": state, "lightning's state_dict": content, "stripped": stripped}.get(layout, whole)
    torch.save(saved, tmp_path / "last.ckpt")
    model = load_peer(tmp_path / "last.ckpt", ema=layout == "averaged")
    with torch.no_grad():
        assert relative_error(model(x), peer(x)) < 1e-10
    assert (model.logit_scale is None) != scales
    if scales:
        assert (model.logit_scale.item(), model.logit_bias.item()) == (2.5, -9.0)
        assert model.config["peer_scales"] == ["logit_scale", "logit_bias"]
    assert set(export_peer(model, "b-cosification")) == set(state)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert set(export_peer(loaded, "b-cosification")) == set(state)


@pytest.mark.parametrize("power", [1, 2])
def test_a_tower_that_was_trained_unpooled(power, tmp_path):
    peer, x = clip_tower(unpool_only=True), encoded()
    model = load_peer(peer.state_dict())
    assert model.attention_pool == "unpool"
    assert_same(model, peer, x, power)
    assert set(export_peer(model, "b-cosification")) == set(peer.state_dict())
    with pytest.raises(ValueError, match="expected 'unpool', as this tower was trained without .* got 'pool'"):
        model.set_attention_pool("pool")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with pytest.raises(ValueError, match="expected 'unpool'"):
        loaded.set_attention_pool("pool")
    with torch.no_grad():
        assert torch.equal(loaded.image_features(x), model.image_features(x))
    assert set(export_peer(loaded, "b-cosification")) == set(peer.state_dict())


def test_what_the_pooling_does_not_read_is_left_out():
    peer, x = clip_tower(bias=True), encoded()
    peer.model.attnpool.positional_embedding = nn.Parameter(torch.ones(5, 256, dtype=torch.float64))
    with pytest.warns(UserWarning, match="left out attnpool.*bias.*does not read with 'pool'"):
        model = load_peer(peer.state_dict())
    with torch.no_grad():
        assert relative_error(model(x), peer(x)) < 1e-10
    assert not any("bias" in name or "positional" in name for name in model.state_dict())


def test_learnable_exponents():
    peer, x = clip_tower(), encoded()
    for module in peer.modules():
        if hasattr(module, "clamping"):
            module.b = nn.Parameter(torch.tensor(1.75, dtype=torch.float64))
    model = load_peer(peer.state_dict())
    assert isinstance(model.model.attnpool.c_proj.b, nn.Parameter)
    assert_same(model, peer, x)
    assert_same(model, peer, x, 1)


def test_texts_are_those_of_a_model_given_or_named():
    whole = clip("resnet")
    peer = clip_tower(layers=(1, 1, 1, 1))
    model = load_peer(peer.state_dict(), arch=whole)
    assert torch.equal(model.encode_texts(TEXTS), bcosify(whole).encode_texts(TEXTS))
    assert model.logit_scale.item() == whole.logit_scale.item()
    assert set(export_peer(model, "b-cosification")) == set(peer.state_dict())
    bare = load_peer(peer.state_dict(), arch=whole.visual)
    with pytest.raises(ValueError, match="text: expected a model with a text tower, got one without"):
        bare.encode_texts(TEXTS)


@pytest.mark.parametrize("name", TOWERS)
def test_every_published_tower_at_its_full_size(name):
    """Names, shapes, heads and the size of the images, against open_clip's own configuration of that name."""
    config = open_clip.get_model_config(name)
    vision, size = config["vision_cfg"], config["embed_dim"]
    with torch.device("meta"):
        peer = clip_tower(vision["layers"], vision["width"], size)
        model = load_peer(peer.state_dict())
        assert load_peer(peer.state_dict(), arch=name).config["architecture"] == model.config["architecture"]
    assert model.config["architecture"] == {
        "layers": vision["layers"], "output_dim": size, "heads": vision["width"] * 32 // 64,
        "image_size": vision["image_size"], "width": vision["width"],
    }  # fmt: skip
    assert model.config["input_size"] == [vision["image_size"]] * 2 and model.config["interpolation"] == "bicubic"
    shapes = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in export_peer(model, "b-cosification").items()} == shapes
    named = {"RN50": "open_clip:RN50/openai"}.get(name)
    assert (model.config["text"] or {}).get("model") == named
    if named:
        with pytest.raises(ValueError, match="that of open_clip:RN50/openai was not stored with it"):
            model.encode_texts(TEXTS)


def test_the_block_fusion_and_the_pooling_of_a_tower():
    model = load_peer(clip_tower().state_dict())
    assert type(model.model.attnpool) is bnn.AttentionPool2d and model.model.attnpool.num_heads == 4
    assert sum("Bottleneck" in type(module).__name__ for module in model.modules()) == 5
    assert json.dumps(model.config)


def test_what_is_refused():
    state = clip_tower().state_dict()
    with pytest.raises(ValueError, match="expected layout 'b-cosification' for a CLIP tower .*, got 'bcos'"):
        load_peer(state, layout="bcos")
    with pytest.raises(ValueError, match="expected arch= to be an image tower, as .* got resnet18"):
        load_peer(state, arch="resnet18")
    with pytest.raises(ValueError, match="expected weights of one of RN50, RN101, .* or of their kinds"):
        load_peer({name: value for name, value in state.items() if "layer3" not in name})
    lost = "model.layer2.0.downsample.1.linear.weight"
    with pytest.raises(ValueError, match="missing .1.: layer2.0.downsample.1.linear.weight"):
        load_peer({name: value for name, value in state.items() if name != lost})
    with pytest.raises(ValueError, match=r"missing \(1\): attnpool.k_proj.weight"):
        load_peer({name: value for name, value in state.items() if name != "model.attnpool.k_proj.weight"})
    standard = ModifiedResNet([1, 1, 1, 1], SIZE, 4, 64, 8).state_dict()
    with pytest.raises(ValueError, match="expected B-cos layers.*got a standard CLIP tower's"):
        load_peer(standard)
    odd = {name: value for name, value in state.items() if "conv3" not in name or "layer" in name}
    odd["model.conv3.linear.weight"] = torch.ones(7, 4, 3, 3)
    with pytest.raises(ValueError, match="expected arch= .the standard image tower."):
        load_peer(odd)
    with pytest.raises(ValueError, match="got one with activation='remove', not 'keep'"):
        export_peer(bcosify(clip("resnet"), activation="remove"), "b-cosification")
    with pytest.raises(NotImplementedError, match="that b-cosification has, of .*, got open_clip_vit"):
        export_peer(bcosify(clip("vit")), "b-cosification")
