"""Small B-cos networks that between them hold every kind of dynamic weight, ours and the peer's.

All take encoded images (N, 6, 16, 16), are in float64 and eval mode, and have statistics and biases that are not
trivial.
"""

import torch
from bcos import modules as peer
from torch import nn

from bcosification import nn as bnn

CLASSES = 5
SIZE = 16


class HeadBeforePool(nn.Module):
    """A 1x1 B-cos head before global average pooling, then the constant logit bias."""

    def __init__(self, head, logit_bias):
        super().__init__()
        self.head, self.logit_bias = head, logit_bias

    def forward(self, x):
        return self.logit_bias(self.head(x).mean((2, 3)))


class PeerConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = peer.BcosConv2d(6, 8, 3, padding=1)
        self.norm1 = peer.norms.NoBias(peer.norms.BatchNormUncentered2d)(8)
        self.relu = nn.ReLU(inplace=True)  # shared, as in torchvision's blocks
        self.grouped = peer.BcosConv2d(8, 8, 3, padding=1, groups=2, max_out=2)
        self.norm2 = peer.norms.BatchNormUncentered2d(8)
        self.position = peer.norms.NoBias(peer.norms.PositionNormUncentered2d)(8)
        self.general = peer.BcosConv2d(8, 12, 3, stride=2, b=1.5)
        self.group_norm = peer.norms.DetachableGroupNorm2d(3, 12)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.tail = HeadBeforePool(peer.BcosConv2d(12, CLASSES), peer.LogitLayer(logit_bias=-2.0))

    def forward(self, x):
        x = self.relu(self.norm1(self.stem(x)))
        identity = x
        x = self.norm2(self.grouped(x))
        x += identity
        x = self.position(self.relu(x))
        return self.tail(self.pool(self.group_norm(self.general(x))))


class PeerAttention(peer.DetachableModule):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.to_qkv, self.attend = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Softmax(dim=-1)
        self.to_out = peer.BcosLinear(dim, dim)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        if self.detach:
            q, k = q.detach(), k.detach()
        attention = self.attend(q @ k.mT * q.shape[-1] ** -0.5)
        return self.to_out((attention @ v).transpose(1, 2).flatten(2))


class PosEmbSinCos2d(nn.Module):
    """Named and used as the peer's SimpleViT uses its own: what it returns has no batch and is added to the tokens."""

    def forward(self, patches):
        angle = torch.arange(patches[0].numel(), dtype=patches.dtype).view_as(patches[0])
        return angle.sin()


class PeerTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.positions = peer.BcosConv2d(6, 12, 4, stride=4), PosEmbSinCos2d()
        self.norm1, self.attention = peer.norms.DetachableLayerNorm(12), PeerAttention(12, 3)
        self.norm2 = peer.norms.DetachableLayerNorm(12)
        self.mlp = nn.Sequential(peer.BcosLinear(12, 24, max_out=2), peer.BcosLinear(24, 12))
        self.head = peer.BcosLinear(12, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = x + self.positions(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x).mean(1)


class OwnConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.normalize = bnn.Normalize([0.4, 0.5, 0.6], [0.2, 0.25, 0.3], inverse=True)
        self.stem = bnn.BcosConv2d(6, 8, 3, padding=1, normalize_weight=False)
        self.norm1 = bnn.BatchNormUncentered2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.reflected = bnn.BcosConv2d(8, 8, 3, padding=1, padding_mode="reflect", b=nn.Parameter(torch.tensor(1.7)))
        self.batch_norm = bnn.BatchNormUncentered2d(8, track_running_stats=False)
        self.grouped = bnn.BcosConv2d(8, 8, 3, padding="same", groups=4, max_out=2, bias=True)
        self.norm2 = bnn.BatchNormUncentered2d(8, bias=False)
        self.group_norm = bnn.GroupNorm(2, 8)
        self.dilated = bnn.BcosConv2d(8, 12, 3, dilation=2, b=3)
        self.tail = HeadBeforePool(bnn.BcosConv2d(12, CLASSES, normalize_weight=False), bnn.LogitBias(-2.0, 0.5))

    def forward(self, x):
        x = self.pool(self.norm1(self.stem(self.normalize(x)), activation="relu"))
        x = self.norm2(self.grouped(self.batch_norm(self.reflected(x))), residual=x, activation="relu")
        return self.tail(self.dilated(self.group_norm(x)))


class OwnGatedNet(nn.Module):
    """Every gate: those of activations, one that works in place, and the scales of squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.stem = bnn.BcosConv2d(6, 8, 3, padding=1, stride=2, normalize_weight=False)
        self.norm = bnn.BatchNormUncentered2d(8)
        self.gates = nn.ModuleList([bnn.SiLU(inplace=True), bnn.Hardswish(), bnn.Mish(), bnn.QuickGELU(), bnn.ReLU6()])
        self.layers = nn.ModuleList([bnn.BcosConv2d(8, 8, 1, bias=True, normalize_weight=False) for _ in self.gates])
        self.scales = bnn.SqueezeExcitation(8, 3, nn.SiLU, nn.Hardsigmoid)
        self.tail = HeadBeforePool(bnn.BcosConv2d(8, CLASSES, normalize_weight=False), bnn.LogitBias(-2.0))

    def forward(self, x):
        x = self.norm(self.stem(x))
        for gate, layer in zip(self.gates, self.layers, strict=True):
            x = x + layer(gate(6 * x))
        return self.tail(self.scales(x))


class OwnTransformer(nn.Module):
    additive_parameters = ["class_token", "positions"]

    def __init__(self):
        super().__init__()
        self.patches = bnn.BcosConv2d(6, 12, 4, stride=4, normalize_weight=False)
        self.class_token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 17, 12) / 2)
        self.norm1, self.attention = bnn.LayerNorm(12), bnn.MultiheadAttention(12, 3, batch_first=True)
        self.norm2 = bnn.LayerNorm(12)
        self.mlp = nn.Sequential(bnn.BcosLinear(12, 24, bias=True), bnn.GELU(), bnn.BcosLinear(24, 12))
        self.head = bnn.BcosLinear(12, CLASSES, normalize_weight=False)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


NETWORKS = {
    "peer_convnet": PeerConvNet,
    "peer_transformer": PeerTransformer,
    "own_convnet": OwnConvNet,
    "own_transformer": OwnTransformer,
    "own_gated_net": OwnGatedNet,
}


def build(name, seed=0):
    """One of NETWORKS in float64 and eval mode, with biases, statistics and norm weights away from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETWORKS[name]().double().eval()
        for module in model.modules():
            for key in ("weight", "bias", "in_proj_bias"):
                value = getattr(module, key, None)
                if isinstance(value, nn.Parameter) and value.dim() == 1:
                    nn.init.uniform_(value, *((0.5, 1.5) if key == "weight" else (-0.3, 0.3)))
            if getattr(module, "running_var", None) is not None:
                module.running_var.uniform_(0.3, 2.0)
    return model


def images(count=3, seed=1):
    """Encoded images (count, 6, 16, 16) in [0, 1], float64."""
    x = torch.rand(count, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([x, 1 - x], 1)
