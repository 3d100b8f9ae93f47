"""open_clip's TimmModel: timm networks as image towers (SigLIP, EVA-CLIP, ConvNeXt), with or without a projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import Family, family_of, register
from bcosification.convert.families.timm_family import ClassifierHeadFamily, TimmFamily, TokenFamily
from bcosification.convert.rules import Options, as_convolution


class ProjectionBeforePool(ChangedForward):
    """The projection behind the timm network, at every position before the global pooling."""

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.forward_features(x)
        if hasattr(trunk, "pooled_tokens"):
            x = trunk.pooled_tokens(x)
            x = trunk.fc_norm(x) if hasattr(trunk, "fc_norm") else x
            return self.head(trunk.head(trunk.head_drop(x))).mean(1)
        head = trunk.head
        channels_last = getattr(head, "input_fmt", "NCHW") == "NHWC"
        x = head.norm(x) if hasattr(head, "norm") else x
        x = x if channels_last else x.permute(0, 2, 3, 1)
        x = head.pre_logits(x) if hasattr(head, "pre_logits") else x
        x = self.head(head.fc(head.drop(x)))
        return head.flatten(head.global_pool(x if channels_last else x.permute(0, 3, 1, 2)))


@register("open_clip.timm_model.TimmModel")
class OpenClipTimm(Family):
    """trunk (timm's network, of a family of its own), head: nothing, a linear projection or an MLP.

    Where the network averages positions, the projection (or the network's own classifier, where that is the projection)
    runs at every position before. What the network's family cannot do, this one cannot.
    """

    name = "open_clip_timm"
    title = "open_clip TimmModel (SigLIP, EVA-CLIP, ConvNeXt-CLIP, PE)"
    converts = "timm's network, as its family does; the projection, at every position where positions are averaged"
    keeps = "what its family keeps"
    cannot = (
        "convert networks of no family; be exact at B = 1 with proj before a pooling that a norm follows "
        "(head='keep' is)"
    )
    example_options = {"mean": 0.5, "std": 0.5}
    embeds = True

    def _inner(self, model: nn.Module) -> Family:
        return family_of(model.trunk)

    def input_layer(self, model: nn.Module) -> str | None:
        name = self._inner(model).input_layer(model.trunk)
        return None if name is None else f"trunk.{name}"

    def head(self, model: nn.Module) -> None:
        return None

    def moves_head(self, model: nn.Module) -> bool:
        inner, trunk = self._inner(model), model.trunk
        if not isinstance(inner, TimmFamily):
            return False
        if not len(model.head):  # timm's classifier is the projection, if there is one
            return inner.head(trunk) is not None and inner.moves_head(trunk)
        if "pool" in model.head._modules or not isinstance(inner, (TokenFamily, ClassifierHeadFamily)):
            return False
        return inner.moves_head(trunk)

    def moved_head_is_convolution(self, model: nn.Module) -> bool:
        return False

    def head_move_changes(self, model: nn.Module) -> str | None:
        if "mlp" in model.head._modules:
            return "the mean over positions is taken after the projecting MLP, not before"
        return self._inner(model).head_move_changes(model.trunk)

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        inner, own = self._inner(model), not len(model.head)
        name = inner.head(model.trunk)
        trunk = inner.prepare(model.trunk, options, head_moves and own)
        if head_moves and own and inner.moved_head_is_convolution(model.trunk):
            classifier = trunk.get_submodule(name)
            if isinstance(classifier, nn.Linear):
                trunk.set_submodule(name, as_convolution(classifier))
        model.trunk = trunk
        return change_class(model, ProjectionBeforePool) if head_moves and not own else model

    def additive_parameters(self, model: nn.Module) -> list[str]:
        return [f"trunk.{name}" for name in self._inner(model).additive_parameters(model.trunk)]

    def input_size(self, model: nn.Module) -> tuple[int, int] | None:
        inside = self._inner(model).input_size(model.trunk)  # the network's own; not all take another
        return inside if isinstance(self._inner(model), TokenFamily) else tuple(model.image_size)

    def architecture(self, model: nn.Module) -> dict[str, Any] | None:
        inner = self._inner(model)
        trunk = inner.architecture(model.trunk)
        if trunk is None or "pool" in model.head._modules:
            return None
        pooling = getattr(model.trunk, "global_pool", None)
        if isinstance(pooling, str):
            trunk["arguments"]["global_pool"] = pooling
        projection = None
        if "proj" in model.head._modules:
            layer = model.head.proj
            projection = {"kind": "linear", "sizes": [layer.in_features, layer.out_features], "drop": model.head.drop.p}
        elif "mlp" in model.head._modules:
            layer = model.head.mlp.fc2
            sizes = [model.head.mlp.fc1.in_features, layer.out_features]
            projection = {"kind": "mlp", "sizes": sizes, "drop": model.head.mlp.drop1.p}
        if projection is not None:
            projection["bias"] = layer.bias is not None
        return {"trunk": trunk, "image_size": list(model.image_size), "projection": projection}

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        import timm
        from open_clip.timm_model import TimmModel

        # Its constructor makes the network and then changes it; here it is made as it is.
        model = TimmModel.__new__(TimmModel)
        nn.Module.__init__(model)
        model.image_size = tuple(architecture["image_size"])
        trunk = architecture["trunk"]
        model.trunk = timm.create_model(trunk["name"], pretrained=False, **trunk["arguments"])
        model.head = nn.Sequential()
        told = architecture["projection"]
        if told is not None:
            size, embedding = told["sizes"]
            if told["kind"] == "linear":
                model.head.add_module("drop", nn.Dropout(told["drop"]))
                model.head.add_module("proj", nn.Linear(size, embedding, bias=told["bias"]))
            else:
                mlp = timm.layers.Mlp(size, 2 * embedding, embedding, drop=(told["drop"], 0), bias=(True, told["bias"]))
                model.head.add_module("mlp", mlp)
        return model

    def example(self) -> nn.Module:
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
        trunk = {"name": "vit_base_patch16_siglip_224", "arguments": {**sizes, "global_pool": "map"}}
        projection = {"kind": "linear", "sizes": [16, 12], "drop": 0.0, "bias": False}
        return self.build({"trunk": trunk, "image_size": [16, 16], "projection": projection})
