"""Checkpoints of the peers: read without them, the same numbers as theirs, and back; every layout; what is refused."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import bcos.models.pretrained
import pytest
import torch
import torchvision
from torch import nn

import bcosification
from bcosification import bcosify, explain, export_peer, fuse, load, load_peer, reset_head
from bcosification.convert.peer_architectures import ARCHITECTURES, guess
from bcosification.models import SimpleViT
from tests.bcosification.convert.peer_networks import (
    CLASSES,
    STANDARD,
    V2,
    HeadFirstDenseNet,
    HeadFirstResNet,
    b_cosification,
    logits_and_gradient,
    make_standard,
    make_v2,
    simple_vit,
)
from tests.bcosification.convert.standard_networks import relative_error

EVERY_V2 = pytest.mark.parametrize("name", V2, ids=str)
EVERY_STANDARD = pytest.mark.parametrize("name", STANDARD, ids=str)
FEATURES = {"resnet": "layer4", "densenet": "features", "vgg": "features", "convnext": "features", "vit": "transformer"}


def features_of(model, prefix, name, x):
    """The output of the part before the classifier."""
    part = next(path for kind, path in FEATURES.items() if kind in name)
    seen = []
    handle = model.get_submodule(f"{prefix}{part}").register_forward_hook(lambda *args: seen.append(args[2].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def assert_same(model, peer, x, name, peer_prefix):
    expected, gradient = logits_and_gradient(peer, x)
    explanation = explain(model, x, 1)
    assert relative_error(explanation.logits, expected) < 1e-6
    assert relative_error(explanation.weights, gradient) < 1e-6
    assert relative_error(explain(model, x[:, :3], 1).weights, gradient) < 1e-6, "images are encoded inside"
    assert gradient.abs().max() > 1e-9
    got, wanted = features_of(model, "model.", name, x), features_of(peer, peer_prefix, name, x)
    if "densenet" in name and peer_prefix == "model.":  # its last ReLU is a function there, a layer of features here
        wanted = wanted.relu()
    assert relative_error(got, wanted) < 1e-6


def v2(name):
    peer, x = make_v2(name)
    return peer, x, "0." if "vit" in name else ""


def bcosified(name, **options):
    standard, x = make_standard(name)
    return b_cosification(standard, **options).double().eval(), x


@EVERY_V2
def test_b_cos_v2(name, tmp_path):
    peer, x, prefix = v2(name)
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    model = load_peer(tmp_path / "weights.pth")
    assert_same(model, peer, x, name, prefix)
    assert model.num_classes == CLASSES and model.config["peer_layout"] == "bcos" and not model.training
    # Nothing of the constructor's random weights is left: every tensor is on a device and the peer's.
    exported = export_peer(model, "bcos")
    assert set(exported) == set(peer.state_dict())
    assert all(torch.equal(value, peer.state_dict()[key]) for key, value in exported.items())
    assert copy.deepcopy(peer).load_state_dict(exported) == ([], [])
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(x), model(x))


@EVERY_STANDARD
def test_b_cosification(name, tmp_path):
    peer, x = bcosified(name)
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    model = load_peer(tmp_path / "weights.pth")
    assert model.config["peer_layout"] == "b-cosification"
    assert_same(model, peer, x, name, "model.")
    exported = export_peer(model, "b-cosification")
    assert set(exported) == set(peer.state_dict())
    assert all(torch.equal(value, peer.state_dict()[key]) for key, value in exported.items())
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(x), model(x))


@EVERY_STANDARD
def test_a_conversion_of_ours_is_read_by_b_cosifications_network(name):
    standard, x = make_standard(name)
    if "vit" in name:
        own = SimpleViT(image_size=32, patch_size=8, num_classes=CLASSES, dim=64, depth=2, heads=1, mlp_dim=24)
        if name == "vitc":
            own = guess({key: tuple(value.shape) for key, value in standard.state_dict().items()})
        own.load_state_dict(standard.state_dict())
    else:
        own = copy.deepcopy(standard)
        own.__class__ = type(own).__mro__[1]
    model = bcosify(own.double().eval(), logit_bias=-6.906754778648554)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    peer, _ = bcosified(name)
    assert peer.load_state_dict(export_peer(model, "b-cosification")) == ([], [])
    assert_same(model, peer, x, name, "model.")


def test_networks_without_activations_run_fused_too():
    kinds = {"resnet, basic blocks": "FusedBasicBlock", "resnet, grouped bottlenecks": "FusedBottleneck"}
    for name, kind in {**kinds, "densenet": "FusedDenseLayer"}.items():
        model = load_peer(make_v2(name)[0].state_dict())
        assert sum(type(module).__name__ == kind for module in model.modules()) >= 4
        assert not fuse(model).fusion_report.left


# --- layouts --------------------------------------------------------------------------------------------------------


def lightning(state, ema=None):
    """As Lightning writes last.ckpt: the network is the attribute "model" of its module, losses lie beside it."""
    content = {f"model.{name}": value for name, value in state.items()} | {"criterion.weight": torch.ones(2)}
    if ema is not None:
        content |= {f"ema.module.{name}": value for name, value in ema.items()} | {"ema.n_averaged": torch.tensor(3)}
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": content,
        "hyper_parameters": {"dataset": "ImageNet", "base_network": "bcos_final"},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    }


@pytest.mark.parametrize("kind", ["bcos", "b-cosification"])
@pytest.mark.parametrize("name", ["resnet, basic blocks", "densenet", "simple_vit"])
@pytest.mark.parametrize(
    "layout", ["hub", "lightning", "lightning's state_dict", "data parallel", "simple", "safetensors"]
)
def test_every_layout_of_a_file(kind, name, layout, tmp_path):
    peer, x = (make_v2 if kind == "bcos" else bcosified)(name)
    state = peer.state_dict()
    path = tmp_path / "last.ckpt"
    if layout == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "last.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, str(path))
    else:
        content = {
            "hub": state,
            "lightning": lightning(state),
            "lightning's state_dict": {f"model.{key}": value for key, value in state.items()},
            "data parallel": {f"module.{key}": value for key, value in state.items()},
            "simple": {"model_state_dict": state, "epoch": 1},
        }[layout]
        torch.save(content, path)
    model = load_peer(path)
    assert model.config["peer_layout"] == kind
    with torch.no_grad():
        assert relative_error(model(x), peer(x)) < 1e-6
        assert torch.equal(load_peer(path, layout=kind)(x), model(x))


def test_averaged_weights():
    peer, x, _ = v2("resnet, basic blocks")
    averaged, _ = make_v2("resnet, basic blocks", seed=5)
    content = lightning(peer.state_dict(), averaged.state_dict())
    with torch.no_grad():
        assert relative_error(load_peer(content)(x), peer(x)) < 1e-6
        assert relative_error(load_peer(content, ema=True)(x), averaged(x)) < 1e-6
    content = content["state_dict"]  # taken out, with the losses beside the network
    with torch.no_grad():
        assert relative_error(load_peer(content, ema=True)(x), averaged(x)) < 1e-6
        content = {name: value for name, value in content.items() if not name.startswith("ema.")}
        assert "criterion.weight" in content and relative_error(load_peer(content)(x), peer(x)) < 1e-6
    with pytest.raises(ValueError, match="expected averaged weights .* with ema=True, got none"):
        load_peer(peer.state_dict(), ema=True)


def test_what_a_dict_holds_is_not_shared():
    peer, x, _ = v2("resnet, basic blocks")
    model = load_peer(peer.state_dict())
    with torch.no_grad():
        expected = peer(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(peer(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_biases_of_b_cosification_are_kept():
    peer, x = bcosified("simple_vit", keep_bias=True)
    model = load_peer(peer.state_dict())
    assert model.config["options"]["bias"] == "keep"
    assert_same(model, peer, x, "simple_vit", "model.")
    state = peer.state_dict()
    for lost in ("transformer.encoder_1.ff.net.linear1.linear.bias", "transformer.encoder_0.attn.norm.bias"):
        with pytest.raises(ValueError, match=rf"missing \(1\): {lost}$"):
            load_peer({name: value for name, value in state.items() if name != f"model.{lost}"})


def test_norms_with_biases_in_a_network_without_others(tmp_path):
    torch.manual_seed(0)
    peer = bcos.models.resnet.BcosResNet(
        bcos.models.resnet.BasicBlock, [1, 1, 1, 1], CLASSES, norm_layer=bcos.modules.norms.BatchNormUncentered2d
    )
    peer = peer.double().eval()
    _, x = make_v2("resnet, basic blocks")
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.3, 0.3)
    model = load_peer(peer.state_dict())
    assert_same(model, peer, x, "resnet", "")
    assert model.model.fc.bias is None and model.model.bn1.bias is not None
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x), model(x))


def test_other_exponents_learnable_ones_and_logit_biases():
    peer, x = bcosified("resnet, basic blocks", b=1.5)
    model = load_peer(peer.state_dict(), b=1.5, logit_bias=None)
    peer.logit_layer.logit_bias = None
    assert_same(model, peer, x, "resnet", "model.")
    state = peer.state_dict()
    for name, module in peer.named_modules():
        if hasattr(module, "clamping"):
            module.b = nn.Parameter(torch.tensor(1.75, dtype=torch.float64))
            state[f"{name}.b"] = module.b.detach()
    learnt = load_peer(state, logit_bias=None)
    assert isinstance(learnt.model.conv1.b, nn.Parameter)
    assert_same(learnt, peer, x, "resnet", "model.")
    assert set(export_peer(learnt, "b-cosification")) == set(peer.state_dict())
    state["model.conv1.b"] = torch.tensor(-0.5)
    with pytest.raises(ValueError, match="expected exponents >= 1, got conv1.b = -0.5.*add it first"):
        load_peer(state)


def test_the_logit_bias_is_the_peers():
    assert load_peer(v2("simple_vit")[0].state_dict()).config["logit_bias"] == pytest.approx(-1.3862943611)
    state = bcosified("simple_vit")[0].state_dict()
    assert load_peer(state).config["logit_bias"] == pytest.approx(-6.906754778648554)  # of 1000 classes, whatever comes
    wide = reset_head(load_peer(v2("resnet, basic blocks")[0].state_dict()), 1000)
    assert wide.config["logit_bias"] == pytest.approx(-6.906754778648554)


# --- architectures --------------------------------------------------------------------------------------------------

PUBLISHED = {
    "resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50", "resnet101": "resnet101",
    "resnet152": "resnet152", "resnext50_32x4d": "resnext50_32x4d", "densenet121": "densenet121",
    "densenet161": "densenet161", "densenet169": "densenet169", "densenet201": "densenet201", "vgg11_bnu": "vgg11_bnu",
    "convnext_tiny": "convnext_tiny", "convnext_base": "convnext_base", "convnext_tiny_bnu": "convnext_tiny_bnu",
    "convnext_base_bnu": "convnext_base_bnu", "densenet121_long": "densenet121", "resnet50_long": "resnet50",
    "resnet152_long": "resnet152",
    **{name: name for name in bcos.models.pretrained.list_available() if name.startswith(("simple_vit", "vitc"))},
}  # fmt: skip


def test_the_table_of_published_networks_is_whole():
    assert set(PUBLISHED.values()) == set(ARCHITECTURES)
    others = {f"standard_{name}" for name in PUBLISHED if "vit" in name}
    assert set(PUBLISHED) | others == set(bcos.models.pretrained.list_available())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.endswith("_long")])
@pytest.mark.filterwarnings("ignore:.*strongly discouraged.*")
def test_every_published_network_of_b_cos_v2_at_its_full_size(name):
    """Names and shapes, by name and guessed; numbers are compared at small sizes and for one of them below."""
    with torch.device("meta"):
        peer = getattr(bcos.models.pretrained, name)(pretrained=False)
        state = peer.state_dict()
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        model = load_peer(state, arch=PUBLISHED[name])
        assert {key: tuple(value.shape) for key, value in export_peer(model, "bcos").items()} == shapes
        guessed = guess({key.removeprefix("0."): shape for key, shape in shapes.items()})
        assert repr(guessed) == repr(ARCHITECTURES[PUBLISHED[name]](1000))
        assert getattr(guessed, "heads", None) == getattr(model.model, "heads", None)
    assert model.config["architecture"] is not None and model.config["logit_bias"] == pytest.approx(-6.90675478)
    epsilons = [m.eps for m in peer.modules() if hasattr(m, "eps")]
    assert [m.eps for m in model.modules() if hasattr(m, "eps")] == epsilons
    heads = {m.heads for m in peer.modules() if hasattr(m, "heads")}
    assert {m.heads for m in model.modules() if hasattr(m, "to_qkv")} == heads
    strides = [m.stride for m in peer.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(m.stride) for m in model.modules() if isinstance(m, bcosification.nn.BcosConv2d)] == strides
    groups = [m.groups for m in peer.modules() if isinstance(m, nn.Conv2d)]
    assert [m.groups for m in model.modules() if isinstance(m, bcosification.nn.BcosConv2d)] == groups


@pytest.mark.filterwarnings("ignore:.*strongly discouraged.*")
def test_the_released_networks_of_b_cosification_at_full_size():
    with torch.device("meta"):
        for standard, number in (
            (HeadFirstResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]), "layer4.2.bn3.weight"),
            (HeadFirstDenseNet(32, (6, 12, 24, 16), 64), "features.11.weight"),
        ):
            state = b_cosification(standard).state_dict()
            assert f"model.{number}" in state
            exported = export_peer(load_peer(state, layout="b-cosification"), "b-cosification")
            assert {key: value.shape for key, value in exported.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vitc_ti_patch1_14"])
@pytest.mark.filterwarnings("ignore:.*strongly discouraged.*")
def test_numbers_at_full_size(name):
    torch.manual_seed(0)
    peer = getattr(bcos.models.pretrained, name)(pretrained=False).double().eval()
    if hasattr(peer, "bn1") or hasattr(peer, "features"):
        for module in peer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.01)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    x = torch.cat([x, 1 - x], 1)
    model = load_peer(peer.state_dict())
    expected, gradient = logits_and_gradient(peer, x)
    explanation = explain(model, x, 1)
    assert relative_error(explanation.logits, expected) < 1e-6
    assert relative_error(explanation.weights, gradient) < 1e-6


def test_standard_networks_of_b_cos_v2():
    peer, x = make_standard("simple_vit")
    peer.__class__ = bcos.models.vit.SimpleViT
    model = load_peer(peer.state_dict())
    assert type(model) is SimpleViT and not model.training
    with torch.no_grad():
        assert relative_error(model(x[:, :3]), peer(x[:, :3])) < 1e-6
    assert bcosify(model).config["input_size"] == [224, 224]
    name = "standard_simple_vit_ti_patch16_224"
    with torch.device("meta"):
        state = getattr(bcos.models.pretrained, name)(pretrained=False).state_dict()
        assert load_peer(state, arch="simple_vit_ti_patch16_224").heads == 3


def test_arch_may_be_a_network():
    peer, x = make_v2("resnet, basic blocks")
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], CLASSES)
    model = load_peer(peer.state_dict(), arch=network)
    assert_same(model, peer, x, "resnet", "")
    assert next(network.parameters()).device.type == "cpu", "the network given stays as it is"
    peer = simple_vit(dim=24, heads=3).double().eval()
    with pytest.raises(ValueError, match="expected arch= .* tokens of width 24"):
        load_peer(peer.state_dict())
    own = SimpleViT(image_size=32, patch_size=8, num_classes=CLASSES, dim=24, depth=2, heads=3, mlp_dim=24)
    assert_same(load_peer(peer.state_dict(), arch=own), peer, x, "simple_vit", "0.")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_told():
    state = v2("resnet, basic blocks")[0].state_dict()
    extra = {**state, "layer9.weight": torch.ones(2)}
    del extra["layer2.0.conv1.linear.weight"]
    with pytest.raises(ValueError) as error:
        load_peer(extra)
    assert "missing (1): layer2.0.conv1.linear.weight" in str(error.value)
    assert "unexpected (1): layer9.weight" in str(error.value)
    with pytest.raises(ValueError, match=r"expected weights of resnet50 in bcos's names.*missing \(\d+\).*other shape"
                       .replace(".*", "(?s:.*)")):  # fmt: skip
        load_peer(state, arch="resnet50")
    with pytest.raises(ValueError, match="expected arch to be one of resnet18, .*, got 'resnet_50'"):
        load_peer(state, arch="resnet_50")
    small = bcos.models.resnet.cifar10_resnet20()
    with pytest.raises(ValueError, match="expected weights of one of resnet18, .*arch= takes the standard network"):
        load_peer(small.state_dict())
    with pytest.raises(ValueError, match="expected B-cos layers.*got a standard model's.*bcosification.resolve"):
        load_peer(torchvision.models.resnet18().state_dict())


def test_wrong_arguments():
    state = v2("resnet, basic blocks")[0].state_dict()
    with pytest.raises(ValueError, match="layout to be one of 'bcos', 'b-cosification', got 'v2'"):
        load_peer(state, layout="v2")
    with pytest.raises(TypeError, match="expected options of bcosify .*, got bee"):
        load_peer(state, bee=2)
    with pytest.raises(ValueError, match="load_peer: expected b >= 1"):
        load_peer(state, b=0.5)
    with pytest.raises(TypeError, match="expected a file or tensors by name, got list"):
        load_peer([state])
    with pytest.raises(TypeError, match="expected arch to be a name or a network, got int"):
        load_peer(state, arch=3)
    with pytest.raises(FileNotFoundError, match="load_peer: expected a weights file, found none at 'nowhere.pth'"):
        load_peer("nowhere.pth")
    with pytest.raises(ValueError, match="got 1 entries without a tensor"):
        load_peer({"epoch": 3})


class Runs:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("protocol, named", [(2, r" \((posix|nt)\.system\)"), (4, "")])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_pickle_that_needs_more_is_refused_with_the_reason_and_not_executed(protocol, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"conv1.linear.weight": torch.ones(2)}, "callback": Runs()}
    torch.save(content, "last.ckpt", pickle_protocol=protocol)
    reason = f"load_peer: last.ckpt: .*other objects .a whole model.{named}, which could run code .* so it is refused"
    with pytest.raises(ValueError, match=reason):
        load_peer("last.ckpt")
    assert not Path("executed").exists()
    torch.save(bcos.modules.BcosConv2d(3, 4), "model.pth")
    with pytest.raises(ValueError, match=r"model.pth: .*\(bcos.modules.bcosconv2d.BcosConv2d, .*refused"):
        load_peer("model.pth")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(keep, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(v2("densenet")[0].state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match="load_peer: .*weights.pth: expected a file of tensors"):
        load_peer(path)


def test_exports_of_what_computes_something_else_are_refused():
    network, _ = make_standard("resnet, basic blocks")
    network.__class__ = torchvision.models.ResNet
    with pytest.raises(ValueError, match="bcos's network does, got one with activation='keep', not 'remove'; norm"):
        export_peer(bcosify(network), "bcos")
    with pytest.raises(ValueError, match="got one with head='keep', not 'before_pool'$"):
        export_peer(bcosify(network, head="keep"), "b-cosification")
    with pytest.raises(TypeError, match="made by bcosify or load_peer, got ResNet"):
        export_peer(network, "bcos")
    with pytest.raises(ValueError, match="layout to be one of"):
        export_peer(bcosify(network), None)
    vit = torchvision.models.VisionTransformer(16, 4, 1, 2, 12, 24, num_classes=3)
    with pytest.raises(NotImplementedError, match="that bcos has, of torchvision_resnet.*, got torchvision_vit"):
        export_peer(bcosify(vit), "bcos")


WITHOUT_BCOS = """
import sys
sys.modules["bcos"] = sys.modules["einops"] = None
import bcosification, torch
for path in sys.argv[1:]:
    model = bcosification.load_peer(path)
    print(float(model(torch.full((1, 3, 32, 32), 0.25, dtype=torch.float64)).sum()))
"""


def test_the_package_bcos_is_not_needed(tmp_path):
    paths, expected = [], []
    x = torch.cat([torch.full((1, 3, 32, 32), 0.25), torch.full((1, 3, 32, 32), 0.75)], 1).double()
    for i, name in enumerate(("vgg", "simple_vit")):
        peer = make_v2(name)[0]
        torch.save(peer.state_dict(), tmp_path / f"{i}.pth")
        paths.append(str(tmp_path / f"{i}.pth"))
        expected.append(float(peer(x).sum().detach()))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_BCOS, *paths], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert [float(line) for line in result.stdout.split()] == pytest.approx(expected, rel=1e-6)
