"""CLIP models small enough for many tests, with statistics, biases and positions away from 0 and 1."""

import open_clip
import torch
from torch import nn

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
TEXTS = ["a photo of the digit seven", "a dog", "two cats"]
VISION = {
    "resnet": dict(layers=[1, 1, 1, 1], width=8, head_width=64, image_size=64),
    "vit": dict(layers=2, width=24, head_width=8, image_size=32, patch_size=8),
    "vit, averaged": dict(layers=1, width=24, head_width=8, image_size=32, patch_size=8, pool_type="avg"),
    "vit, normalised average": dict(
        layers=1, width=24, head_width=8, image_size=32, patch_size=8, pool_type="avg", final_ln_after_pool=True
    ),
    "vit, layer scales": dict(layers=1, width=24, head_width=8, image_size=32, patch_size=8, ls_init_value=0.5,
                              patch_dropout=0.3, no_ln_pre=True),
}  # fmt: skip


def clip(name="resnet", *, quick_gelu=False, custom=False, seed=0, **options):
    """An open_clip model in float64 and eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        text = dict(context_length=12, vocab_size=49408, width=8, heads=2, layers=1)
        model = kind(embed_dim=10, vision_cfg=VISION[name] | options, text_cfg=text, quick_gelu=quick_gelu)
        for module in model.visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.002, 0.01)
        for parameter_name, parameter in model.visual.named_parameters():
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, *((0.5, 1.5) if parameter_name.endswith("weight") else (-0.3, 0.3)))
        return model.double().eval()


def images(name="resnet", count=2, seed=1):
    """Images (count, 3, H, W) in [0, 1], float64."""
    size = VISION[name]["image_size"]
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normalized(x):
    mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def error(got, expected):
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())
