"""Stand-ins for B-cosification's layers, which no package installs: same names, attributes and numbers.

They say what those layers compute: no weight normalisation, an optional bias, exponent b + 2 with ``b_loss`` (always
the general form) or b clamped to 1 + 1e-6 with ``clamping``.
"""

import math

import bcos.modules
import torch
from torch import nn


def _exponent(layer):
    if layer.b_loss:
        return layer.b + 2, True
    if layer.clamping and isinstance(layer.b, torch.Tensor):
        return layer.b.clamp(min=1 + 1e-6), True
    return layer.b, layer.clamping or isinstance(layer.b, torch.Tensor)


def _scaled(layer, a, norm):
    b, general = _exponent(layer)
    if not general and b == 1:
        return a
    magnitude = a
    if layer.detach:
        magnitude, norm = a.detach(), norm.detach()
    if not general and b == 2:
        return a * magnitude.abs() / norm
    return a * ((magnitude / norm).abs() + 1e-6) ** (b - 1)


def _max_out(layer, a, dim, outputs):
    return a if layer.max_out == 1 else a.unflatten(dim, (outputs, layer.max_out)).max(dim + 1).values


class BcosifyConv2d(bcos.modules.BcosConv2d):
    def __init__(self, *args, clamping=False, b_loss=False, linear_bias=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.clamping, self.b_loss = clamping, b_loss
        self.linear = nn.Conv2d(
            self.in_channels,
            self.out_channels * self.max_out,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            linear_bias,
        )

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        a = _max_out(self, self.linear(x), 1, self.out_channels)
        return _scaled(self, a, self.calc_patch_norms(x))


class BcosifyLinear(bcos.modules.BcosLinear):
    def __init__(self, *args, clamping=False, b_loss=False, linear_bias=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.clamping, self.b_loss = clamping, b_loss
        self.linear = nn.Linear(self.in_features, self.out_features * self.max_out, linear_bias)

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        a = self.linear(x)
        a = a if self.max_out == 1 else a.unflatten(-1, (self.out_features, self.max_out)).max(-1).values
        return _scaled(self, a, x.norm(dim=-1, keepdim=True) + 1e-12)


class MyGELU(bcos.modules.DetachableModule):
    def forward(self, x):
        gate = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return (gate.detach() if self.detach else gate) * x


MyGELU.__module__ = "bcosify_vit"  # where it is defined there
