"""Block fusion: the same numbers as the library's forwards, and only where the parts are what they should be."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import densenet, resnet
from torchvision.models.vision_transformer import MLPBlock
from torchvision.ops import Conv2dNormActivation

import bcos_kernels
import bcosification
from bcosification.convert.blocks import fuse_blocks, norm_activation, set_recompute, unfuse_blocks
from bcosification.nn import GELU, BatchNormUncentered2d, BcosConv2d, BcosLinear


def uncentered(model):
    """The model with our norms, B-cos convolutions and few channels' worth of random statistics."""
    for name, module in list(model.named_modules()):
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if type(module) is nn.BatchNorm2d:
            norm = BatchNormUncentered2d(module.num_features)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            setattr(parent, leaf, norm)
        elif type(module) is nn.Conv2d:
            options = module.kernel_size, module.stride, module.padding, module.dilation, module.groups
            setattr(parent, leaf, BcosConv2d(module.in_channels, module.out_channels, *options, b=1.5))
    return model.double()


def small_resnet(block):
    model = resnet.ResNet(block, [1, 1, 1, 1], num_classes=5)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 5)
    return model


MODELS = {
    "basic": (lambda: small_resnet(resnet.BasicBlock), {"FusedResNet": 1, "FusedBasicBlock": 2, "FusedSequential": 1}),
    "bottleneck": (
        lambda: small_resnet(resnet.Bottleneck),
        {"FusedResNet": 1, "FusedBottleneck": 2, "FusedSequential": 2},
    ),
    "densenet": (
        lambda: densenet.DenseNet(4, (2, 2), 8, num_classes=5),
        {"FusedSequential": 1, "FusedDenseLayer": 4, "FusedTransition": 1},
    ),
    "densenet with dropout": (
        lambda: densenet.DenseNet(4, (1, 1), 8, num_classes=5, drop_rate=0.5),
        {"FusedSequential": 1, "FusedDenseLayer": 2, "FusedTransition": 1},
    ),
    "checkpointed densenet": (
        lambda: densenet.DenseNet(4, (2, 1), 8, num_classes=5, memory_efficient=True),
        {"FusedSequential": 1, "FusedDenseLayer": 3, "FusedTransition": 1},
    ),
    "sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
            Conv2dNormActivation(8, 4, 3),
        ),
        {"FusedSequential": 2, "FusedConv2dNormActivation": 1},
    ),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS, ids=str)


def build(name):
    torch.manual_seed(0)
    return uncentered(MODELS[name][0]())


def results(model, explaining=False):
    for module in model.modules():
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(explaining)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)  # dropout
    y = model(x)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, (x, *model.parameters()), direction)]


def assert_same(model, other, explaining=False):
    expected = results(other, explaining)
    largest = max(value.norm() for value in expected)
    for mine, theirs in zip(results(model, explaining), expected, strict=True):
        assert (mine - theirs).norm() <= 1e-9 * theirs.norm() + 1e-13 * largest
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11)


@pytest.mark.parametrize("mode", ["train", "eval", "explaining"])
@EVERY_MODEL
def test_same_numbers(name, mode):
    plain = build(name).train(mode == "train")
    fused = copy.deepcopy(plain)
    report = fuse_blocks(fused)
    counts = {}
    for _, _, after in report.fused:
        counts[after] = counts.get(after, 0) + 1
    assert counts == MODELS[name][1] and not report.left
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same(fused, plain, mode == "explaining")


@EVERY_MODEL
def test_passes_are_really_fused(name, monkeypatch):
    """Every BatchNorm before a ReLU gets it, every one behind a convolution is one op with it, no ReLU module runs."""
    fused = build(name).eval()
    fuse_blocks(fused)
    activations, behind, relus = [], [], []
    original, original_behind = BatchNormUncentered2d.forward, BatchNormUncentered2d.behind

    def spy(self, x, residual=None, activation=None):
        activations.append(activation)
        return original(self, x, residual, activation)

    def spy_behind(self, conv, x, residual=None, activation=None, recompute=None):
        behind.append(activation)
        return original_behind(self, conv, x, residual, activation, recompute)

    relu = nn.ReLU.forward
    monkeypatch.setattr(BatchNormUncentered2d, "forward", spy)
    monkeypatch.setattr(BatchNormUncentered2d, "behind", spy_behind)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: relus.append(self) or relu(self, x))
    fused(torch.rand(1, 3, 32, 32, dtype=torch.float64))
    alone = {"basic": 0, "bottleneck": 0}.get(name, 1)  # norm5, the one without ReLU
    assert activations.count(None) == alone
    shortcuts = {"basic": 1, "bottleneck": 2}.get(name, 0)
    assert behind.count(None) == shortcuts
    layers = sum(isinstance(module, BcosConv2d) for module in fused.modules())
    after_norm = sum(
        type(module) is densenet._DenseLayer or "FusedDenseLayer" in repr(type(module)) for module in fused.modules()
    )
    after_norm += sum("Transition" in repr(type(module)) for module in fused.modules())
    if name != "checkpointed densenet":
        assert len(behind) == layers - after_norm
    assert len(relus) == (1 if name == "sequential" else 0)


@EVERY_MODEL
def test_reversible(name):
    model = build(name)
    before = copy.deepcopy(model)
    fuse_blocks(model)
    assert [type(m) for m in model.modules()] != [type(m) for m in before.modules()]
    assert unfuse_blocks(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    for a, b in zip(model.modules(), before.modules(), strict=True):
        assert a.__dict__.keys() == b.__dict__.keys()


@pytest.mark.slow
def test_isinstance_copies_and_pickles_in_a_new_process(tmp_path):
    fused = build("basic").eval()
    fuse_blocks(fused)
    assert isinstance(fused, resnet.ResNet) and isinstance(fused.layer1[0], resnet.BasicBlock)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    with open(tmp_path / "model.pickle", "wb") as file:
        pickle.dump((fused, x, fused(x).detach()), file)
    code = (
        "import pickle, sys, torch\n"
        "model, x, y = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.allclose(model(x), y, rtol=1e-12), 'other numbers'\n"
        "print(type(model).__name__, type(model.layer1[0]).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.split() == ["FusedResNet", "FusedBasicBlock"], run.stderr


def test_hooks_see_what_they_saw_before():
    plain = build("basic").eval()
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    seen = []
    for model in (plain, fused):
        mine = {}
        seen.append(mine)
        for name in ("layer1.0.bn1", "layer1.0.relu", "layer2.0.bn2", "relu", "bn1", "layer1.0"):
            module = model.get_submodule(name)
            module.register_forward_hook(
                lambda module, args, output, name=name, mine=mine: mine.setdefault(name, []).append(output.clone())
            )
    assert_same(fused, plain)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]["layer1.0.relu"]) == 2
    for name, outputs in seen[0].items():
        for mine, theirs in zip(seen[1][name], outputs, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-10)


def test_global_hooks_see_the_relus():
    fused = build("basic").eval()
    fuse_blocks(fused)
    kinds = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: kinds.append(type(module)))
    try:
        fused(torch.rand(1, 3, 32, 32, dtype=torch.float64))
    finally:
        handle.remove()
    assert kinds.count(nn.ReLU) == 5


def test_parts_replaced_after_fusing_are_called():
    plain = build("bottleneck").eval()
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    for model in (plain, fused):
        model.layer1[0].relu = nn.GELU()
        model.layer2[0].bn3 = nn.Identity()
        model.relu = nn.ReLU6()
    assert_same(fused, plain)


def test_unknown_and_changed_blocks_are_left_with_a_reason():
    class Mine(resnet.BasicBlock):
        def forward(self, x):
            return super().forward(x) * 2

    class ByMode(resnet.BasicBlock):
        def forward(self, x):
            return super().forward(x) if self.training else x

    model = small_resnet(resnet.BasicBlock)
    model.layer1 = Mine(64, 64)
    model.by_mode = ByMode(8, 8)
    model = uncentered(model)
    model.layer2[0].bn1 = nn.BatchNorm2d(128).double()
    model.extra = resnet.BasicBlock(8, 8)
    model.extra.relu = nn.GELU()
    model.forwarded = uncentered(resnet.BasicBlock(8, 8))
    model.forwarded.forward = lambda x: x
    report = fuse_blocks(model)
    assert {name: reason for name, _, reason in report.left} == {
        "extra": "relu is GELU, not ReLU",
        "forwarded": "has a forward of its own",
        "by_mode": "its forward does other things in training than in eval mode",
    }
    # a subclass and a block with other parts are fused as far as their traces have chains
    assert [(name, after) for name, _, after in report.fused] == [
        ("", "FusedResNet"),
        ("layer1", "FusedMine"),
        ("layer2.0", "FusedBasicBlock"),
        ("layer2.0.downsample", "FusedSequential"),
    ]
    assert "forwarded: BasicBlock (has a forward of its own)" in str(report)
    assert str(fuse_blocks(nn.Linear(2, 2))) == "nothing to fuse"


@pytest.mark.parametrize("mode", ["train", "eval", "explaining"])
@pytest.mark.parametrize("kind", ["sequential", "vision transformer"])
def test_linear_layer_and_gelu_run_as_one_op(kind, mode, monkeypatch):
    torch.manual_seed(0)
    if kind == "sequential":
        plain = nn.Sequential(BcosLinear(8, 16, bias=True), GELU(), BcosLinear(16, 8), GELU("tanh")).double()
    else:
        plain = MLPBlock(8, 16, dropout=0.0).double()
        plain[0], plain[1], plain[3] = BcosLinear(8, 16).double(), GELU(), BcosLinear(16, 8).double()
    plain.train(mode == "train")
    fused = copy.deepcopy(plain)
    report = fuse_blocks(fused)
    assert [after for _, _, after in report.fused] == ["FusedSequential" if kind == "sequential" else "FusedMLPBlock"]
    for module in (*plain.modules(), *fused.modules()):
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(mode == "explaining")
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    calls = []
    linear_gelu = bcos_kernels.linear_gelu
    monkeypatch.setattr(bcos_kernels, "linear_gelu", lambda *a, **k: calls.append(1) or linear_gelu(*a, **k))
    y, expected = fused(x), plain(x)
    assert len(calls) == 1 and torch.allclose(y, expected, rtol=1e-12)  # the tanh form and the plain model call none
    mine = torch.autograd.grad(y.square().sum(), (x, *fused.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), (x, *plain.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(mine, theirs, strict=True))
    seen = []
    fused[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.allclose(fused(x), expected, rtol=1e-12) and len(seen) == 1 and len(calls) == 1


def test_slices_of_a_fused_sequential_keep_the_order():
    model = build("sequential").eval()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    expected = model[:2](x)
    fuse_blocks(model)
    assert expected.min() < 0 and torch.equal(model[:2](x), expected)
    assert torch.equal(model[:3](x), expected.relu())


def test_sequentials_with_a_forward_of_their_own_are_nobodys_business():
    class Reversed(nn.Sequential):
        def forward(self, x):
            for module in reversed(self):
                x = module(x)
            return x

    report = fuse_blocks(Reversed(BatchNormUncentered2d(3), nn.ReLU()))
    assert not report.fused and not report.left


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=str)
@pytest.mark.parametrize("norm", [BatchNormUncentered2d(3), nn.BatchNorm2d(3), nn.Identity()], ids=str)
def test_norm_activation_takes_any_modules(norm, activation):
    norm = norm.eval()
    x, residual = torch.randn(2, 2, 3, 4, 4).unbind()
    assert torch.allclose(norm_activation(norm, activation, x), activation(norm(x)), atol=1e-6)
    both = norm_activation(norm, activation, x, residual)
    assert torch.allclose(both, activation(norm(x) + residual), atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_neighbours(inplace):
    """Outputs of B-cos layers are changed in place by ``out += identity`` and ReLU(inplace=True)."""
    torch.manual_seed(0)
    layers = [BcosConv2d(4, 4, 3, padding=1, dtype=torch.float64) for _ in range(2)]

    def run(x):
        out = layers[0](x)
        if inplace:
            out += x
            nn.ReLU(inplace=True)(out)
            y = layers[1](out)
            y.mul_(2)
        else:
            y = layers[1](torch.relu(out + x)) * 2
        return y

    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(run(x).square().sum(), (x, layers[0].weight, layers[1].weight))
    inplace = False
    expected = torch.autograd.grad(run(x).square().sum(), (x, layers[0].weight, layers[1].weight))
    for mine, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10)


def test_compiles_without_a_graph_break():
    block = uncentered(resnet.BasicBlock(4, 4)).float().eval()
    fuse_blocks(block)
    x = torch.randn(1, 4, 6, 6)
    expected = block(x)
    assert type(block).__name__ == "FusedBasicBlock"
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-6)


def test_torchvision_models_are_what_the_rules_were_written_for():
    """The fused forwards repeat the library's: on plain torch modules (nothing fused) they must agree bit for bit."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5).eval()
    x = torch.rand(1, 3, 32, 32)
    expected = model(x)
    from bcosification.convert import blocks

    for block, rule in ((resnet.Bottleneck, "Bottleneck"), (resnet.ResNet, "ResNet")):
        cls = getattr(blocks, f"Fused{rule}")
        for module in model.modules():
            if type(module) is block:
                module.__class__ = cls
    assert torch.equal(model(x), expected)


# less memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "explaining"])
@EVERY_MODEL
def test_recomputed_activations_give_the_same_numbers(name, mode):
    plain = build(name).train(mode == "train")
    low = copy.deepcopy(plain)
    fuse_blocks(low)
    set_recompute(low, True)
    assert_same(pickle.loads(pickle.dumps(copy.deepcopy(low))), plain, explaining=mode == "explaining")


def kept_bytes(model, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = model(x)
    events = profile.profiler.kineto_results.events()
    total = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del y
    return total


STANDARD = {
    "resnet18": partial(torchvision.models.resnet18, weights=None),
    "resnet50": partial(torchvision.models.resnet50, weights=None),
    "densenet121": partial(torchvision.models.densenet121, weights=None),
    "convnext_tiny": partial(torchvision.models.convnext_tiny, weights=None),
    "vit": partial(
        torchvision.models.VisionTransformer, image_size=64, patch_size=8, num_layers=3, num_heads=3, hidden_dim=192,
        mlp_dim=768,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, most", [
    ("resnet50", 0.60), ("densenet121", 0.35), ("resnet18", 0.90), ("convnext_tiny", 0.70), ("vit", 0.80)
])  # fmt: skip
def test_bytes_kept_of_whole_networks(name, most):
    """Against the same network with block fusion alone, which keeps what the standard network keeps."""
    torch.manual_seed(0)
    model = bcosification.bcosify(STANDARD[name]()).train()
    x = torch.rand(2, 3, 64, 64)
    default = kept_bytes(model, x)
    assert kept_bytes(bcosification.fuse(model, memory="low"), x) <= most * default
    assert kept_bytes(bcosification.fuse(model, memory="default"), x) == default
    unfuse_blocks(bcosification.fuse(model, memory="low"))
    assert not any(
        hasattr(module, "recompute_activations") for module in model.modules() if "Fused" in repr(type(module))
    )


def test_recomputation_runs_no_convolution_with_hooks_again():
    model = bcosification.fuse(bcosification.bcosify(torchvision.models.resnet50(weights=None)).train(), memory="low")
    conv = model.model.layer1[0].conv3
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 3, 64, 64)).sum().backward()
    assert len(calls) == 1


class AddsPositions(nn.Module):
    """Adds one value a channel, broadcast, behind convolution and norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = BcosConv2d(3, 4, 3, padding=1), BatchNormUncentered2d(4)
        self.positions = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + self.positions)


def test_an_addition_that_is_broadcast_stays_one():
    torch.manual_seed(0)
    model, x = AddsPositions().eval(), torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert fuse_blocks(model).chains == [("conv", "norm")]
    torch.testing.assert_close(model(x), expected)
