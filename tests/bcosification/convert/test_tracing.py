"""Blocks of classes that nobody wrote a rule for: chains found in the trace of their forward."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bcosification
from bcosification.convert.blocks import fuse_blocks, set_recompute, unfuse_blocks
from bcosification.nn import BatchNormUncentered2d, BcosConv2d


class Parts(nn.Module):
    def __init__(self, shortcut=False, channels=8):
        super().__init__()
        self.first = BcosConv2d(channels, channels, 3, padding=1)
        self.first_norm = BatchNormUncentered2d(channels)
        self.second = BcosConv2d(channels, channels, 1, b=1.5)
        self.second_norm = BatchNormUncentered2d(channels)
        self.shortcut = BcosConv2d(channels, channels, 1) if shortcut else None
        self.relu = nn.ReLU()


class Functional(Parts):
    def forward(self, x):
        out = F.relu(self.first_norm(self.first(x)), inplace=True)
        out = self.second_norm(self.second(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return out.relu() * 2


class Modules(Parts):
    def forward(self, x):
        identity = x
        out = self.relu(self.first_norm(self.first(x)))
        out = torch.add(identity, self.second_norm(self.second(out)))
        return self.relu(out)


class Dropping(Parts):
    """timm's way: something that drops, or nothing, between norm and activation."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drop = nn.Identity()

    def forward(self, x):
        out = self.relu(self.drop(self.first_norm(self.first(x))))
        return self.drop(self.second_norm(self.second(out))) + (x if self.shortcut is None else self.shortcut(x))


class ReadTwice(Parts):
    """The convolution's output is used elsewhere too: no chain there."""

    def forward(self, x):
        y = self.first(x)
        return self.second_norm(self.second(self.first_norm(y))) + y


class WritesToInput(Parts):
    def forward(self, x):
        y = self.first(x)
        x.mul_(2)
        return self.first_norm(y) + self.second_norm(self.second(x))


class NumberAdded(Parts):
    def forward(self, x):
        return F.relu(self.first_norm(self.first(x)) + 1) + self.second_norm(self.second(x))


class Scaled(Parts):
    """An addition with a factor is no plain residual."""

    def forward(self, x):
        return torch.add(self.first_norm(self.first(x)), x, alpha=3) + self.second_norm(self.second(x))


CHAINS = {"functional": (Functional, 2), "modules": (Modules, 2), "dropping": (Dropping, 2),
          "read twice": (ReadTwice, 1), "number added": (NumberAdded, 2), "scaled": (Scaled, 2)}  # fmt: skip


def build(kind, **options):
    torch.manual_seed(0)
    block = kind(**options).double()
    for norm in (block.first_norm, block.second_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return block


def results(block):
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = block(x.clone())
    wanted = [x, *(p for p in block.parameters())]
    gradients = torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y).double(), allow_unused=True)
    return [y, *(g for g in gradients if g is not None), *block.buffers()]


def assert_same(block, other):
    for mine, theirs in zip(results(block), results(other), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-9, atol=1e-12)


def calls_of_chains(block, monkeypatch):
    calls = []
    original = BatchNormUncentered2d.behind
    monkeypatch.setattr(
        BatchNormUncentered2d, "behind", lambda self, *arguments: calls.append(self) or original(self, *arguments)
    )
    results(block)
    monkeypatch.undo()
    return len(calls)


@pytest.mark.parametrize("mode", ["train", "eval", "explaining", "low"])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_same_numbers(name, shortcut, mode, monkeypatch):
    kind, chains = CHAINS[name]
    plain = build(kind, shortcut=shortcut).train(mode in ("train", "low"))
    for module in plain.modules():
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(mode == "explaining")
    fused = copy.deepcopy(plain)
    report = fuse_blocks(fused)
    assert report.fused == [("", kind.__name__, f"Fused{kind.__name__}")] and not report.left
    set_recompute(fused, mode == "low")
    assert_same(fused, plain)
    assert calls_of_chains(fused, monkeypatch) == chains
    assert list(fused.state_dict()) == list(plain.state_dict()) and isinstance(fused, kind)


def test_a_chain_whose_input_is_written_to_stays_where_it_is():
    block = build(WritesToInput).eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x.clone())
    report = fuse_blocks(block)
    assert type(block) is WritesToInput and not report.fused
    with torch.no_grad():
        assert torch.equal(block(x.clone()), expected)


def test_hooks_and_replaced_parts():
    plain = build(Modules).eval()
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    seen = []
    for block in (plain, fused):
        block.first.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        block.relu.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        block.second_norm = nn.Identity()
    assert_same(fused, plain)
    before, after = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(before) == 3
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(before, after, strict=True))


def test_nothing_between_norm_and_activation_is_passed_over_until_there_is_something(monkeypatch):
    plain = build(Dropping)
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    with monkeypatch.context() as patched:
        patched.setattr(nn.ReLU, "forward", lambda *_: pytest.fail("the ReLU ran on its own"))
        results(fused)
    results(plain)  # running statistics
    residuals = []
    original = BatchNormUncentered2d.behind
    with monkeypatch.context() as patched:  # the addition is part of the second chain, past the nn.Identity before it
        patched.setattr(
            BatchNormUncentered2d, "behind", lambda *given: residuals.append(given[3] is not None) or original(*given)
        )
        assert_same(fused, plain)
    assert residuals == [False, True]
    for block in (plain, fused):
        block.drop = nn.Softplus()
    assert_same(fused, plain)
    seen = []
    fused.drop = nn.Identity()
    fused.drop.register_forward_hook(lambda module, args, output: seen.append(output))
    plain.drop = nn.Identity()
    assert_same(fused, plain)
    assert len(seen) == 2


def test_copies_pickles_compiled_code_and_the_way_back():
    fused = build(Functional, shortcut=True).eval()
    fuse_blocks(fused)
    set_recompute(fused, True)
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused) and other.recompute_activations and other.first is not fused.first
        assert torch.equal(other(x), fused(x))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), fused(x), rtol=1e-12)
    assert type(unfuse_blocks(fused)) is Functional and "recompute_activations" not in fused.__dict__


def test_fuse_takes_them_and_unfuse_gives_them_back():
    model = nn.Sequential(build(Functional), build(Modules)).float()
    bcosification.fuse(model)
    assert [type(block).__name__ for block in model] == ["FusedFunctional", "FusedModules"]
    assert "1 x Functional -> FusedFunctional" in str(model.fusion_report)
    assert [type(block) for block in bcosification.unfuse(model)] == [Functional, Modules]


class ByMode(Parts):
    def forward(self, x):
        y = self.first_norm(self.first(x))
        return y * 2 if self.training else y


class ByType(Parts):
    def forward(self, x):
        x = x if isinstance(x, torch.Tensor) else x[0]
        return self.first_norm(self.first(x))


class ByChance(Parts):
    def forward(self, x):
        y = self.first_norm(self.first(x))
        return y if random.random() < 2 else x


class ByNoise(Parts):
    def forward(self, x):
        return self.first_norm(self.first(x)) + torch.ones(8, 1, 1, dtype=torch.float64)


class ByValue(Parts):
    def forward(self, x):
        y = self.first_norm(self.first(x))
        return y if y.sum() > 0 else x


@pytest.mark.parametrize(
    "kind, reason",
    [
        (ByMode, "does other things in training than in eval mode"),
        (ByType, "decides by isinstance"),
        (ByChance, "decides by random"),
        (ByNoise, "makes tensors of its own"),
        (ByValue, "cannot be traced"),
    ],
)
def test_forwards_whose_trace_is_not_all_are_left_with_a_reason(kind, reason):
    block = build(kind)
    report = fuse_blocks(block)
    assert type(block) is kind and not report.fused
    ((name, cls, why),) = report.left
    assert name == "" and cls == kind.__name__ and reason in why
    assert block.training


def test_patched_library_classes_are_traced_instead_of_trusted(monkeypatch):
    from torchvision.models import resnet

    def patched(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    monkeypatch.setattr(resnet.BasicBlock, "forward", patched)
    block = resnet.BasicBlock(4, 4)
    block.conv1, block.conv2 = (BcosConv2d(4, 4, 3, padding=1) for _ in range(2))
    block.bn1, block.bn2 = BatchNormUncentered2d(4), BatchNormUncentered2d(4)
    x = torch.randn(2, 4, 5, 5)
    expected = copy.deepcopy(block)(x)
    report = fuse_blocks(block)
    assert report.fused == [("", "BasicBlock", "FusedBasicBlock")] and type(block).__dict__["_traced"]
    assert torch.allclose(block(x), expected, rtol=1e-5, atol=1e-6)
