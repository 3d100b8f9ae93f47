"""timm's architectures at small width, by timm's own names and constructor arguments, for tests of the conversion."""

from functools import partial

import timm
import torch
from timm.models.efficientnet import (
    _gen_efficientnet,
    _gen_efficientnet_condconv,
    _gen_efficientnet_edge,
    _gen_efficientnet_lite,
    _gen_efficientnetv2_s,
    _gen_mixnet_s,
)
from timm.models.mlp_mixer import _create_mixer
from timm.models.mobilenetv3 import _gen_mobilenet_v3, _gen_mobilenet_v4

from tests.bcosification.convert.standard_networks import CLASSES, randomize

_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 24), "stem_width": 8}
_BOTTLENECK = {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8), "stem_width": 8}
_RESNET_V2 = {"layers": (1, 1, 1, 1), "channels": (32, 64, 64, 64), "stem_chs": 32}
_BYOB = {"width_factor": 1 / 16}
_REGNET = {"w0": 8, "wa": 8.0, "wm": 1.6, "depth": 5, "group_size": 4, "stem_width": 8}
_MAXVIT = {"img_size": 64, "embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": (8, 8)}
_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
_HYBRID = {"img_size": 64, "embed_dim": 16, "depth": 1, "num_heads": 2}
_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12)}
_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
_MIXER = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "num_blocks": 2}


def _narrow(generate, name, multiplier=0.125, **arguments):
    """EfficientNets and MobileNets take their width by private functions only."""
    return partial(generate, name, channel_multiplier=multiplier, **arguments)


def _gated_vit(**arguments):
    """No registered model gates the output of its attention."""
    network = timm.create_model("vit_tiny_patch16_224", **arguments)
    for block in network.blocks:
        block.attn.gate = torch.nn.Linear(16, 16)
    return network


# label -> (timm's name or a constructor, arguments, image size)
NETWORKS = {
    "resnet": ("resnet18", _RESNET, 64),
    "resnet-d": ("resnext50d_32x4d", {**_BOTTLENECK, "cardinality": 2, "base_width": 32}, 64),
    "resnet v2": ("resnetv2_50", _RESNET_V2, 64),
    "byobnet": ("resnet33ts", {**_BYOB, "num_features": 640}, 32),
    "byobnet, attention pooling": ("resnet50_clip", {**_BYOB, "img_size": 64}, 64),
    "regnet": ("regnety_002", _REGNET, 64),
    "vit": ("vit_tiny_patch16_224", _VIT, 16),
    "vit, mean": ("vit_little_patch16_reg4_gap_256", _VIT, 16),
    "vit, latent query": ("vit_base_patch16_siglip_224", _VIT, 16),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", _VIT, 16),
    "eva": ("vit_small_patch16_dinov3_qkvb", {**_VIT, "num_heads": 1}, 16),
    "relative positions": ("vit_relpos_small_patch16_224", {**_VIT, "rel_pos_dim": 8}, 16),
    "convnext": ("convnext_atto", _CONVNEXT, 64),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN, 32),
    "swin v2": ("swinv2_tiny_window8_256", _SWIN, 32),
    "swin v2, cr": ("swinv2_cr_tiny_ns_224", _SWIN, 32),
    "efficientnet": (_narrow(_gen_efficientnet, "efficientnet_b0", depth_multiplier=0.2), {}, 64),
    "mobilenetv3": (_narrow(_gen_mobilenet_v3, "mobilenetv3_large_100"), {}, 64),
    "mixer": (partial(_create_mixer, "mixer_s16_224"), _MIXER, 16),
}
"""One of each family, and of each place of the head."""

VARIANTS = {
    "resnet-t": ("resnet10t", _RESNET, 64),
    "resnet-s": ("resnet50s", _BOTTLENECK, 64),
    "resnet-rs": ("resnetrs50", _BOTTLENECK, 64),
    "resnet, blur": ("resnetblur50d", _BOTTLENECK, 64),
    "resnet, averaging": ("resnetaa50", _BOTTLENECK, 64),
    "resnet, group norm": ("resnet50_gn", {**_BOTTLENECK, "channels": (32, 32, 32, 32), "stem_width": 32}, 64),
    "resnet, effective squeeze": ("resnet10t", {**_RESNET, "block_args": {"attn_layer": "ese"}}, 64),
    "resnet, eca": ("resnet10t", {**_RESNET, "block_args": {"attn_layer": "eca"}}, 64),
    "resnet, Res2Net": ("res2net50_26w_4s", {**_BOTTLENECK, "channels": (16, 16, 16, 16)}, 64),
    "resnet, Res2NeXt": ("res2next50", {**_BOTTLENECK, "channels": (16, 16, 16, 16)}, 64),
    "resnet, ResNeSt": ("resnest14d", {**_BOTTLENECK, "channels": (16, 16, 16, 16)}, 64),
    "resnet, selective kernels": ("skresnet18", {**_RESNET, "channels": (16, 16, 16, 16)}, 64),
    "resnet, selective kernels, bottleneck": ("skresnet50", {**_BOTTLENECK, "channels": (16, 16, 16, 16)}, 64),
    "resnet v2, basic": ("resnetv2_18d", {**_RESNET_V2, "channels": (8, 16, 16, 16)}, 64),
    "resnet v2, BiT": ("resnetv2_50x1_bit", {"channels": (128, 128, 128, 128), "stem_chs": 32}, 64),
    "resnet v2, EvoNorm": ("resnetv2_50d_evos", {**_RESNET_V2, "channels": (128, 128, 128, 128), "stem_chs": 64}, 64),
    "resnet v2, filter response": ("resnetv2_50d_frn", _RESNET_V2, 64),
    "byobnet, mlp head": ("resnet50_mlp", {**_BYOB, "head_hidden_size": 12}, 64),
    "byobnet, global context": ("gcresnet33ts", {**_BYOB, "num_features": 640}, 32),
    "byobnet, RepVGG": ("repvgg_a0", {"width_factor": 1 / 4}, 32),
    "byobnet, MobileOne": ("mobileone_s4", {"width_factor": 1 / 16}, 32),
    "byobnet, edge": ("resnet61q", {"width_factor": 1 / 4}, 32),
    "mobilevit": ("mobilevit_xxs", {}, 64),
    "mobilevit v2": ("mobilevitv2_050", {}, 64),
    "maxvit, tf": ("maxvit_tiny_tf_224", {**_MAXVIT, "img_size": 64}, 64),
    "coatnet": ("coatnet_rmlp_nano_rw_224", _MAXVIT, 64),
    "coatnext": ("coatnext_nano_rw_224", _MAXVIT, 64),
    "maxxvit": ("maxxvit_rmlp_nano_rw_256", _MAXVIT, 64),
    "maxvit, parallel": ("maxvit_tiny_pm_256", _MAXVIT, 64),
    "regnet, x": ("regnetx_002", {**_REGNET, "linear_out": True}, 64),
    "regnet, z": ("regnetz_005", {**_REGNET, "num_features": 24}, 64),
    "regnet, pre-activation": ("regnetv_040", {**_REGNET, "downsample": "avg"}, 64),
    "vit, mean without fc_norm": ("vit_tiny_patch16_224", {**_VIT, "global_pool": "avg", "fc_norm": False}, 16),
    "vit, norms of q and k": ("vit_base_patch16_224", {**_VIT, "qk_norm": True, "scale_attn_norm": True}, 16),
    "vit, quick gelu": ("vit_base_patch16_clip_quickgelu_224", _VIT, 16),
    "vit, dinov2": ("vit_giant_patch14_dinov2", {**_VIT, "mlp_ratio": 2.0}, 16),
    "vit, parallel": ("vit_base_patch16_18x2_224", _VIT, 16),
    "vit, parallel scaling": ("vit_base_patch16_xp_224", _VIT, 16),
    "vit, differential": ("vit_dlittle_patch16_reg1_gap_256", _VIT, 16),
    "vit, differential parallel": ("vit_dpwee_patch16_reg1_gap_256", _VIT, 16),
    "vit, norms behind": ("vit_base_patch16_rpn_224", _VIT, 16),
    "vit, gated": (_gated_vit, _VIT, 16),
    "vit on resnet v2": ("vit_tiny_r_s16_p8_224", {**_HYBRID, "patch_size": 8}, 64),
    "vit on a stem": ("vit_base_mci_224", {**_HYBRID, "embed_dim": 768, "num_heads": 4, "mlp_ratio": 0.1}, 64),
    "deit-3": ("deit3_small_patch16_224", _VIT, 16),
    "eva, rotary": ("vit_small_patch16_rope_224", {**_VIT, "num_heads": 2}, 16),
    "eva, mixed rotary": ("vit_small_patch16_rope_mixed_ape_224", {**_VIT, "num_heads": 2}, 16),
    "eva, SwiGLU": ("vit_7b_patch16_dinov3", {**_VIT, "num_heads": 1, "mlp_ratio": 2.0}, 16),
    "eva, perception encoder": ("vit_pe_core_tiny_patch16_384", _VIT, 16),
    "eva, sapiens": ("vit_base_patch16_sapiens2", {**_VIT, "num_heads": 2, "num_kv_heads": 1}, 16),
    "relative positions, shared": ("vit_srelpos_small_patch16_224", {**_VIT, "rel_pos_dim": 8}, 16),
    "relative positions, class token": ("vit_relpos_base_patch16_cls_224", {**_VIT, "rel_pos_dim": 8}, 16),
    "relative positions, norms behind": ("vit_relpos_small_patch16_rpn_224", {**_VIT, "rel_pos_dim": 8}, 16),
    "convnext v2": ("convnextv2_atto", _CONVNEXT, 64),
    "convnext, mlp head": ("convnext_large_mlp", {**_CONVNEXT, "head_hidden_size": 8}, 64),
    "convnext, norm first": ("convnext_tiny_hnf", _CONVNEXT, 64),
    "convnext, overlapping stem": ("convnext_atto_ols", _CONVNEXT, 64),
    "convnext, rms": ("convnext_atto_rms", _CONVNEXT, 64),
    "convnext, simple norm": ("convnext_zepto_rms", _CONVNEXT, 64),
    "swin, s3": ("swin_s3_tiny_224", {**_SWIN, "window_size": (4, 4)}, 32),
    "swin v2, other sizes": ("swinv2_tiny_window8_256", {**_SWIN, "pretrained_window_sizes": (6, 6)}, 32),
    "swin v2, cr, few norms": ("swinv2_cr_tiny_224", {**_SWIN, "img_size": (32, 40), "init_values": None}, (32, 40)),
    "efficientnet v2": (_narrow(_gen_efficientnetv2_s, "efficientnetv2_s", depth_multiplier=0.2), {}, 64),
    "efficientnet, lite": (_narrow(_gen_efficientnet_lite, "efficientnet_lite0", depth_multiplier=0.2), {}, 64),
    "efficientnet, edge": (_narrow(_gen_efficientnet_edge, "efficientnet_es", depth_multiplier=0.2), {}, 64),
    "efficientnet, same padding": (
        _narrow(_gen_efficientnet, "efficientnet_b0", depth_multiplier=0.2, pad_type="same"), {}, 65,
    ),
    "efficientnet, conditional": (
        _narrow(_gen_efficientnet_condconv, "efficientnet_cc_b0_4e", depth_multiplier=0.2), {}, 64,
    ),
    "efficientnet, blur": (
        _narrow(_gen_efficientnet, "efficientnet_b0", depth_multiplier=0.2, aa_layer="blurpc"), {}, 64,
    ),
    "efficientnet, mixed": (_narrow(_gen_mixnet_s, "mixnet_s", 0.25), {}, 64),
    "mobilenetv4": (_narrow(_gen_mobilenet_v4, "mobilenetv4_conv_small"), {}, 64),
    "mobilenetv3, small": (_narrow(_gen_mobilenet_v3, "mobilenetv3_small_100", 0.25), {}, 64),
}  # fmt: skip
"""Further layers and forwards of these families."""


def make(label, seed=0):
    """A network of the tables, randomized, in float64, and two images for it in [0, 1]."""
    torch.manual_seed(seed)
    source, arguments, size = {**NETWORKS, **VARIANTS}[label]
    if callable(source):
        network = source(num_classes=CLASSES, **arguments)
    else:
        network = timm.create_model(source, num_classes=CLASSES, **arguments)
    generator = torch.Generator().manual_seed(seed + 1)
    network = randomize(network, seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # deep ones would overflow with the small variances of randomize
            module.running_var.mul_(20)
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[2] in ("gamma", "gamma_1", "gamma_2"):  # layer scales of 1e-6 would hide their blocks
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    size = (size, size) if isinstance(size, int) else size
    return network, torch.rand(2, 3, *size, dtype=torch.float64, generator=generator)
