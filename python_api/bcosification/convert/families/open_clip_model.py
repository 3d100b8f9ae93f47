"""open_clip's whole models: an image tower, which is converted, beside a text tower, which stays as it is."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import Family, family_of, register


@register("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP", "open_clip.coca_model.CoCa")
class OpenClipModel(Family):
    """visual (the image tower, of a family of its own) and the text tower's layers."""

    name = "open_clip_model"
    title = "open_clip CLIP, CoCa (image and text tower)"
    converts = "its image tower, as that tower's family does"
    keeps = "the text tower, logit_scale and logit_bias"
    cannot = "write captions (CoCa's text decoder is left out)"
    preprocessing = "openai"

    def tower(self, model: nn.Module) -> nn.Module:
        return model.visual

    def input_layer(self, model: nn.Module) -> str | None:
        name = family_of(model.visual).input_layer(model.visual)
        return None if name is None else f"visual.{name}"

    def head(self, model: nn.Module) -> None:
        return None

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def input_size(self, model: nn.Module) -> tuple[int, int] | None:
        return family_of(model.visual).input_size(model.visual)

    def example(self) -> nn.Module:
        import open_clip

        text = {"context_length": 16, "vocab_size": 99, "width": 8, "heads": 2, "layers": 1}
        vision = {"layers": 1, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 8}
        return open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text)
