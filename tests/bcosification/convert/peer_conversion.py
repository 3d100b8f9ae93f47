"""The conversion written once more, straightforwardly, with the layers of the package ``bcos``: the tests' oracle.

As B-cosification's own code does, a peer's B-cos layer gets a plain nn.Conv2d / nn.Linear inside. Nothing here is
shared with bcosification.convert.
"""

import copy
import math
import warnings

import torch
from bcos import modules as peer
from bcos.modules import norms
from torch import nn
from torch.nn import functional

from tests.bcosification.convert.standard_networks import MEAN, STD


def convolution(layer, b):
    """nn.Conv2d -> the peer's BcosConv2d (which takes ints only) without weight normalisation."""
    arguments = [value[0] for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "dilation > 1 is much slower!"
        new = peer.BcosConv2d(layer.in_channels, layer.out_channels, *arguments, layer.groups, b=b)
    new.linear = nn.Conv2d(layer.in_channels, layer.out_channels, *arguments, layer.groups, bias=False)
    new.linear.weight.data = layer.weight.data.clone()
    return new


def linear(layer, b):
    """nn.Linear -> the peer's BcosLinear without weight normalisation."""
    new = peer.BcosLinear(layer.in_features, layer.out_features, b=b)
    new.linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    new.linear.weight.data = layer.weight.data.clone()
    return new


def norm(layer):
    """nn.BatchNorm2d -> the peer's uncentered one, without bias."""
    new = norms.NoBias(norms.BatchNormUncentered2d)(layer.num_features, eps=layer.eps)
    new.weight.data = layer.weight.data.clone()
    new.running_var.data = layer.running_var.data.clone()
    return new


class Gate(peer.DetachableModule):
    def forward(self, x):
        gate = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * (gate.detach() if self.detach else gate)


class Attention(peer.DetachableModule):
    """nn.MultiheadAttention on (N, L, E), biases dropped, the output projection B-cos."""

    def __init__(self, layer, b):
        super().__init__()
        self.heads = layer.num_heads
        self.qkv = nn.Parameter(layer.in_proj_weight.data.clone())
        self.out = linear(layer.out_proj, b)

    def forward(self, x, *_, **__):
        q, k, v = functional.linear(x, self.qkv).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.detach:
            q, k = q.detach(), k.detach()
        matrix = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        return self.out((matrix @ v).transpose(1, 2).flatten(2)), None


def layer_norm(layer):
    new = norms.DetachableLayerNorm(layer.normalized_shape, eps=layer.eps, bias=False)
    new.weight.data = layer.weight.data.clone()
    return new


def swap(module, b):
    for name, child in module.named_children():
        if type(child) is nn.Conv2d:
            setattr(module, name, convolution(child, b))
        elif type(child) is nn.Linear:
            setattr(module, name, linear(child, b))
        elif type(child) is nn.BatchNorm2d:
            setattr(module, name, norm(child))
        elif type(child) is nn.LayerNorm:
            setattr(module, name, layer_norm(child))
        elif type(child) is nn.GELU:
            setattr(module, name, Gate())
        elif type(child) is nn.MaxPool2d:
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode))
        elif type(child) is nn.MultiheadAttention:
            setattr(module, name, Attention(child, b))
        else:
            swap(child, b)


def six_channels(layer):
    new = copy.deepcopy(layer)
    new.in_channels = 6
    new.weight.data = torch.cat([layer.weight.data, -layer.weight.data], dim=1) / 2
    return new


def as_convolution(layer):
    new = nn.Conv2d(layer.in_features, layer.out_features, 1)
    new.weight.data = layer.weight.data[:, :, None, None].clone()
    return new


class PeerResNet(nn.Module):
    def __init__(self, model, b):
        super().__init__()
        self.net = copy.deepcopy(model)
        self.net.conv1 = six_channels(self.net.conv1)
        self.net.fc = as_convolution(self.net.fc)
        swap(self.net, b)

    def forward(self, x):
        net = self.net
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return net.fc(x).mean((2, 3))


class PeerDenseNet(nn.Module):
    def __init__(self, model, b):
        super().__init__()
        self.net = copy.deepcopy(model)
        self.net.features.conv0 = six_channels(self.net.features.conv0)
        self.net.classifier = as_convolution(self.net.classifier)
        swap(self.net, b)

    def forward(self, x):
        return self.net.classifier(functional.relu(self.net.features(x))).mean((2, 3))


class PeerViT(nn.Module):
    def __init__(self, model, b):
        super().__init__()
        self.net = copy.deepcopy(model)
        self.net.conv_proj = six_channels(self.net.conv_proj)
        swap(self.net, b)

    def forward(self, x):
        return self.net(x)


class PeerNetwork(nn.Module):
    """Encoded images in [0, 1] -> logits."""

    def __init__(self, kind, model, b):
        super().__init__()
        self.body = kind(model, b).double().eval()
        mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
        self.mean, self.std = torch.cat([mean, 1 - mean]).view(-1, 1, 1), torch.cat([std, std]).view(-1, 1, 1)

    def forward(self, x6):
        return self.body((x6 - self.mean) / self.std)

    def weights(self):
        return {name: parameter for name, parameter in self.body.named_parameters()}
