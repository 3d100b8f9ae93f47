"""Layer shapes of the networks that the layer suites cover, read off the networks themselves."""

from __future__ import annotations

import torch
from torch import nn


def _inputs(model: nn.Module, size: tuple[int, ...], kind: type) -> dict[tuple, tuple]:
    """Distinct (layer settings, input shape) of all layers of a type, from one forward on the meta device."""
    found: dict[tuple, tuple] = {}

    def record(layer, arguments):
        if isinstance(layer, nn.Conv2d):
            settings = (layer.in_channels, layer.out_channels, layer.kernel_size)
            settings += (layer.stride, layer.padding, layer.groups)
        else:
            settings = (layer.in_features, layer.out_features)
        found.setdefault((settings, tuple(arguments[0].shape[1:])), settings)

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, kind)]
    with torch.no_grad():
        model(torch.empty(size, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def convolutions(name: str, size: int = 224) -> list[dict]:
    """Every distinct convolution of torchvision's resnet50 or densenet121 on images of `size`² pixels."""
    import torchvision

    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None).eval()
    cases = []
    for (settings, shape), _ in _inputs(model, (1, 3, size, size), nn.Conv2d).items():
        c, o, kernel, stride, padding, groups = settings
        label = f"{name} {kernel[0]}x{kernel[1]} {c}->{o} at {shape[1]}^2" + (f" /{stride[0]}" if stride[0] > 1 else "")
        cases.append(
            dict(label=label, c=c, o=o, kernel=kernel, stride=stride, padding=padding, groups=groups, size=shape[1:])
        )
    return cases


LINEARS = {  # ViT-Ti, S, B, L at 224², patch 16: 196 tokens and the class token; width of the model
    "ViT-Ti": 192,
    "ViT-S": 384,
    "ViT-B": 768,
    "ViT-L": 1024,
}


def linears() -> list[dict]:
    """The B-cos linears of the ViTs: attention output, the two of the MLP (qkv stays plain), and the head."""
    cases = []
    for name, width in LINEARS.items():
        for part, k, n in (
            ("attention out", width, width),
            ("MLP 1", width, 4 * width),
            ("MLP 2", 4 * width, width),
            ("head", width, 1000),
        ):
            cases.append(dict(label=f"{name} {part} {k}->{n}", k=k, n=n, tokens=1 if part == "head" else 197))
    return cases
