"""Small standard networks, converted, and what the tests of whole networks compare."""

import contextlib
import copy
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

import bcos_kernels
import bcosification
from bcos_kernels import reference
from tests.bcos_kernels import harness

CLASSES = 5
MODES = ("training", "eval", "explaining")

NETWORKS = {  # constructor, image size
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 33),
    "resnet18": (lambda: resnet18(num_classes=CLASSES), 33),
    "densenet": (
        lambda: DenseNet(
            growth_rate=4, block_config=(1, 2), num_init_features=8, bn_size=2, drop_rate=0.0, num_classes=CLASSES
        ),
        36,
    ),
    "vit": (
        lambda: VisionTransformer(16, 4, num_layers=1, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=CLASSES),
        16,
    ),
}
SMALL = ("resnet", "densenet", "vit")


def converted(name: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A B-cosified network of the table in eval mode; statistics and parameters of one dimension are all different."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name][0]().to(dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.01, 0.05)
        nn.init.normal_(getattr(model, "fc", None).weight if hasattr(model, "fc") else _head(model), 0, 0.5)
        return bcosification.bcosify(model.eval(), **options)


def _head(model: nn.Module) -> Tensor:
    return (model.classifier if hasattr(model, "classifier") else model.heads.head).weight


def images(name: str, count: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images (count, 3, size, size) in [0, 1]."""
    size = NETWORKS[name][1]
    return torch.rand(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    model.train(mode == "training")
    for module in model.modules():
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(mode == "explaining")
    return model


@contextlib.contextmanager
def definition():
    """The modules run on the plain PyTorch of reference.py: no op, no autograd Function of this package."""
    with contextlib.ExitStack() as stack:
        for name in ("linear", "conv2d", "batch_norm_uncentered", "layer_norm"):
            stack.enter_context(mock.patch.object(bcos_kernels, name, getattr(reference, name)))
        for name in ("conv2d_batch_norm", "linear_gelu"):
            stack.enter_context(mock.patch.object(bcos_kernels, name, getattr(harness, name)(reference)))
        yield


def results(model: nn.Module, x: Tensor, function=None) -> dict[str, Tensor]:
    """Output of ``function`` (default: the model), gradients of a function of it, and the buffers afterwards."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = (model if function is None else function)(x)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


def results_of_copy(model: nn.Module, x: Tensor, around=None) -> dict[str, Tensor]:
    """`results` of a deep copy, so that statistics and gradients of ``model`` stay; ``around`` makes the function."""
    twin = copy.deepcopy(model)
    return results(twin, x, None if around is None else around(twin))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == expected.keys()
    for name, mine in got.items():
        theirs = expected[name]
        assert (mine is None) == (theirs is None), name
        if mine is None:
            continue
        assert mine.shape == theirs.shape, name
        error, norm = (mine.double() - theirs.double()).norm().item(), theirs.double().norm().item()
        # a gradient that cancels (that of a constant shift before a norm) is compared to 1
        assert error <= bound * max(norm, 1.0), f"{name}: error {error / (norm or 1):.3g}"
