"""Activations x·g(x) and layers x·scale(x) whose gate or scale is a constant in explanation mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modes import DetachableModule

__all__ = [
    "GatedActivation",
    "Hardswish",
    "Mish",
    "QuickGELU",
    "ReLU6",
    "ScalingGate",
    "SiLU",
    "SqueezeExcitation",
]


class GatedActivation(DetachableModule):
    """Base of activations x·g(x); in explanation mode the gate g(x) is a constant for the gradient.

        y = x * gate(x).detach()                                              # explanation mode

    A subclass defines ``gate``, and ``activate`` where torch has one function for the whole. With ``inplace`` the
    result is written to the input, as by torch's modules of that option.

    Shapes: any, kept. The gate is computed in float32 at least.
    """

    inplace: bool = False

    def gate(self, x: Tensor) -> Tensor:
        """g(x), finite for every finite x, 0 included."""
        raise NotImplementedError(f"{type(self).__name__}: a gated activation has to define gate")

    def activate(self, x: Tensor) -> Tensor:
        """x·g(x), as it is trained."""
        return x * self.gate(x)

    def forward(self, x: Tensor) -> Tensor:
        if not self.detach:
            return self.activate(x)
        gate = self.gate(x.detach().to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        return x.mul_(gate) if self.inplace else x * gate


class SiLU(GatedActivation, nn.SiLU):
    """nn.SiLU (swish), x·sigmoid(x), with a gate that is a constant in explanation mode.

    Args:
        inplace: as nn.SiLU's, default False.

    Source: arXiv:1606.08415; the constant gate: B-cosification, arXiv:2411.00715, section 3.

    Example:
        >>> SiLU()(torch.zeros(2))
        tensor([0., 0.])
    """

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def activate(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=self.inplace)


class Hardswish(GatedActivation, nn.Hardswish):
    """nn.Hardswish, x·min(max(x + 3, 0), 6)/6, with a gate that is a constant in explanation mode.

    Args:
        inplace: as nn.Hardswish's, default False.

    Source: MobileNetV3, arXiv:1905.02244; the constant gate: B-cosification, arXiv:2411.00715, section 3.

    Example:
        >>> Hardswish()(torch.tensor([-4.0, 0.0, 4.0]))
        tensor([-0., 0., 4.])
    """

    def gate(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)

    def activate(self, x: Tensor) -> Tensor:
        return F.hardswish(x, self.inplace)


class Mish(GatedActivation, nn.Mish):
    """nn.Mish, x·tanh(log(1 + eˣ)), with a gate that is a constant in explanation mode.

    Args:
        inplace: as nn.Mish's, default False.

    Source: arXiv:1908.08681; the constant gate: B-cosification, arXiv:2411.00715, section 3.

    Example:
        >>> Mish()(torch.zeros(2))
        tensor([0., 0.])
    """

    def gate(self, x: Tensor) -> Tensor:
        return torch.tanh(F.softplus(x))

    def activate(self, x: Tensor) -> Tensor:
        return F.mish(x, inplace=self.inplace)


class QuickGELU(GatedActivation):
    """x·sigmoid(1.702·x), OpenAI's GELU of CLIP, with a gate that is a constant in explanation mode.

    Args:
        inplace: write the result to the input, default False.

    Source: arXiv:1606.08415; the constant gate: B-cosification, arXiv:2411.00715, section 3.

    Example:
        >>> QuickGELU()(torch.zeros(2))
        tensor([0., 0.])
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = bool(inplace)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(1.702 * x)

    def activate(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return x.mul_(gate) if self.inplace else x * gate


class ReLU6(GatedActivation, nn.ReLU6):
    """nn.ReLU6, min(max(x, 0), 6), as x times a gate that is a constant in explanation mode.

    The gate is 0 below 0, 1 up to 6, and 6/x above: there the 6 is attributed to x, in proportion, where plain autograd
    would take it for a constant that no input contributed to.

    Args:
        inplace: as nn.ReLU6's, default False.

    Source: MobileNets, arXiv:1704.04861; the constant gate: B-cosification, arXiv:2411.00715, section 3.

    Example:
        >>> ReLU6()(torch.tensor([-1.0, 3.0, 12.0]))
        tensor([0., 3., 6.])
    """

    def gate(self, x: Tensor) -> Tensor:
        return torch.where(x > 6, 6 / x, (x > 0).to(x.dtype))

    def activate(self, x: Tensor) -> Tensor:
        return F.relu6(x, inplace=self.inplace)


class ScalingGate(DetachableModule):
    """Base of layers that scale their input by factors computed from it: y = x·scale(x).

        y = x * scale(x).detach()                                             # explanation mode

    In explanation mode the scale is a constant for the gradient, so y is linear in x, and nothing inside ``scale`` is
    part of the linear map: its layers stay plain, its biases are no constants that add to a logit, and they are kept
    when biases are removed. A subclass defines ``scale``. It may also be put before a library's class
    (``convert.families.change_class``), whose children it then uses.
    """

    @property
    def constant_children(self) -> tuple[str, ...]:
        """Names of the children that compute constants of the explanation only (see `nn.modes.constant_modules`)."""
        return tuple(self._modules)

    def scale(self, x: Tensor) -> Tensor:
        """The factors, broadcastable to x."""
        raise NotImplementedError(f"{type(self).__name__}: a scaling gate has to define scale")

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale(x.detach()).detach() if self.detach else self.scale(x))


class SqueezeExcitation(ScalingGate):
    """torchvision's SqueezeExcitation with channel scales that are constants in explanation mode.

        y = x * scale_activation(fc2(activation(fc1(avgpool(x)))))

    fc1 and fc2 are plain convolutions with biases: they only compute the scale.

    Args:
        input_channels, squeeze_channels: of x and between fc1 and fc2.
        activation, scale_activation: make the two activations, default nn.ReLU and nn.Sigmoid.

    Shapes: x (N, C, H, W), kept. Keys and children are torchvision's.

    Source: arXiv:1709.01507; scales as constants: B-cosification, arXiv:2411.00715, section 3.

    Example:
        >>> SqueezeExcitation(8, 2)(torch.rand(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        scale_activation: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def scale(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
