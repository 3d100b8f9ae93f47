"""open_clip's towers made of timm's networks, and CoCa: exact at B = 1, explanations against the replay, texts."""

import copy
import functools

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vitamin import VitCfg

from bcosification import BcosifiedCLIP, bcosify, explain, load, verify
from bcosification import nn as bnn
from bcosification.convert.clip import StandardCLIP
from bcosification.convert.conversion import describe
from bcosification.convert.families import family_of
from bcosification.convert.family_checks import randomized
from bcosification.evaluation import evaluate_zero_shot
from tests.bcosification.small_clip import TEXTS, error

EXACT = {"b": 1, "bias": "keep"}
VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12))
FASTVIT = dict(layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 32))
# open_clip's model -> (sizes of the timm network, edge of images): pooling and projection are open_clip's own.
TOWERS = {
    "ViT-B-16-SigLIP": (VIT, 16),
    "EVA01-g-14": (VIT, 16),
    "EVA02-B-16": (VIT, 16),
    "EVA02-E-14": (VIT, 16),
    "PE-Core-B-16": (VIT, 16),
    "MobileCLIP-B": (dict(img_size=32, depth=1), 32),  # its stem of convolutions has one width
    "MobileCLIP2-L-14": (VIT, 16),
    "convnext_base": (CONVNEXT, 64),
    "convnext_large_d": (CONVNEXT, 64),
    "swin_base_patch4_window7_224": (
        dict(img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)), 32,
    ),
    "vit_medium_patch16_gap_256": (VIT, 16),
    "vit_relpos_medium_patch16_cls_224": (VIT, 16),
    "MobileCLIP-S1": (FASTVIT, 64),
    "MobileCLIP2-S3": (dict(layers=(1, 1, 1, 1, 1), embed_dims=(8, 8, 8, 32, 32)), 64),
    "ViTamin-S": (
        dict(img_size=32, embed_dim=16, depth=2, num_heads=2,
             embed_cfg=VitCfg(embed_dim=(8, 8, 16), depths=(1, 1, 1), stem_width=8)), 32,
    ),
}  # fmt: skip
CHANGED = ("convnext_base", "convnext_large_d", "ViTamin-S")  # a norm or an MLP is between pooling and projection
MOVED = (*CHANGED, "swin_base_patch4_window7_224", "vit_medium_patch16_gap_256", "MobileCLIP-S1", "MobileCLIP2-S3")
TEXT = dict(context_length=12, vocab_size=49408, width=8, heads=2, layers=1)


@functools.cache
def _whole(name):
    config = open_clip.get_model_config(name)
    sizes, _ = TOWERS[name]
    made = timm.create_model
    told = {key: value for key, value in config["text_cfg"].items() if key in (
        "no_causal_mask", "proj_bias", "pool_type", "norm_kwargs", "act_kwargs")}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(timm, "create_model", lambda trunk, **options: made(trunk, **options, **sizes))
        return open_clip.CustomTextCLIP(
            embed_dim=10, vision_cfg=config["vision_cfg"], text_cfg=TEXT | told,
            init_logit_bias=config.get("init_logit_bias"),
        )  # fmt: skip


def whole(name):
    """An open_clip model of that name, with a small timm network inside; float64, nothing at 0 or 1."""
    model = copy.deepcopy(_whole(name)).double().eval()
    randomized(model.visual)
    return model


def pictures(name, count=2):
    size = TOWERS[name][1] if name in TOWERS else 32
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normalized(converted, x):
    mean, std = (x.new_tensor(converted.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std


@pytest.mark.parametrize("name", TOWERS)
def test_exact_at_b_1(name):
    model, x = whole(name), pictures(name)
    converted = bcosify(model, **EXACT, head="keep")
    assert type(converted) is BcosifiedCLIP and converted.config["family"] == "open_clip_timm"
    with torch.no_grad():
        expected = model.visual(normalized(converted, x))
        assert expected.shape == (2, 10) or "SigLIP" in name  # SigLIP's embedding is the network's own width
        assert error(converted(x), expected) < 1e-10
        assert error(converted(torch.cat([x, 1 - x], 1)), expected) < 1e-10
    assert bcosify(model).config["head_before_pool"] == (name in MOVED)


@pytest.mark.parametrize("name", TOWERS)
def test_verify_says_yes(name):
    model, x = whole(name), pictures(name)
    converted = bcosify(model)
    report = verify(model, converted, x)
    assert report.ok, str(report)
    assert report.equivalence.error < 1e-10 and report.explanation.error < 1e-9 and not report.explanation.zero
    assert report.explanation.held["scale"] > 3
    differs = " ".join(report.equivalence.differs_by)
    assert ("head='before_pool'" in differs) == (name in CHANGED)


def test_a_projection_before_the_pooling_by_hand():
    model, x = whole("convnext_base"), pictures("convnext_base")
    converted = bcosify(model, **EXACT)
    assert type(converted.model.head.proj) is bnn.BcosLinear and type(model.visual.head.proj) is torch.nn.Linear
    trunk, projection = model.visual.trunk, model.visual.head.proj
    with torch.no_grad():
        maps = trunk.forward_features(normalized(converted, x))
        expected = torch.stack(
            [projection(trunk.head.norm(maps)[:, :, i, j]) for i in range(maps.shape[2]) for j in range(maps.shape[3])]
        ).mean(0)
        assert error(converted(x), expected) < 1e-10


def test_branches_that_were_folded_before():
    model, x = whole("MobileCLIP-S1"), pictures("MobileCLIP-S1")
    with torch.no_grad():
        expected = model.visual(normalized(bcosify(model), x))
    model.visual.trunk = timm.utils.reparameterize_model(model.visual.trunk).double()
    converted = bcosify(model, **EXACT)
    stem = converted.model.trunk.stem[0]
    assert stem.reparam_conv.in_channels == 6 and not hasattr(stem, "conv_kxk")
    with torch.no_grad():
        assert error(converted(x), expected) < 1e-6, "timm folds in float32"
    assert verify(model, bcosify(model), x).ok


def test_preprocessing_is_timms_where_open_clip_tells_nothing():
    assert bcosify(whole("ViT-B-16-SigLIP")).config["mean"] == [0.5] * 3
    assert bcosify(whole("convnext_base")).config["preprocessing_origin"] == "timm pretrained_cfg"
    told = whole("ViT-B-16-SigLIP")
    open_clip.model.set_model_preprocess_cfg(
        told, dict(mean=[0.4] * 3, std=[0.25] * 3, size=16, interpolation="bicubic", resize_mode="squash")
    )
    config = bcosify(told).config
    assert (config["mean"], config["crop"], config["input_size"]) == ([0.4] * 3, "squash", [16, 16])


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16", "convnext_large_d"])
def test_saved_and_loaded(name, tmp_path):
    model, x = whole(name), pictures(name)
    family = family_of(model.visual)
    told = describe(family, model.visual)
    assert told is not None and repr(family.build(told)) == repr(model.visual)
    converted = bcosify(model)
    converted.save_pretrained(tmp_path, with_text=True)
    loaded = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))
        assert torch.equal(loaded.text.encode_text(tokens()), model.encode_text(tokens()))
    assert loaded.config == converted.config


def tokens():
    return open_clip.SimpleTokenizer(context_length=12)(TEXTS)


@pytest.mark.parametrize("scaled", [False, True])
def test_siglips_logits_have_a_scale_and_a_bias(scaled):
    model, x = whole("ViT-B-16-SigLIP"), pictures("ViT-B-16-SigLIP")
    width = model.visual(x).shape[1]
    texts = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    converted = bcosify(model)
    assert converted.logit_bias.item() == -10 and converted.logit_scale.item() == model.logit_scale.item()
    classifier = converted.classifier(texts, scale="own" if scaled else 1.0)
    with torch.no_grad():
        cosines = F.normalize(converted(x), dim=-1) @ F.normalize(texts, dim=-1).T
        expected = model.logit_scale.double().exp() * cosines - 10 if scaled else cosines
        torch.testing.assert_close(classifier(x), expected)
    # What is explained are cosines; of the logits the bias is a constant, which no pixel contributes to.
    explanation = explain(converted, x, text=texts)
    torch.testing.assert_close(explanation.logits, cosines)
    explained = explain(classifier, x, 1)
    total = explained.contributions.sum((1, 2)) + explained.constant
    torch.testing.assert_close(total, expected[:, 1])
    if scaled:
        factor = model.logit_scale.double().exp()
        torch.testing.assert_close(explained.constant, factor * explanation.constant[:, 1] - 10)
        torch.testing.assert_close(explained.weights, factor * explanation.weights[:, 1])


def test_zero_shot_is_that_of_the_model_itself():
    model = whole("ViT-B-16-SigLIP")
    x = pictures("ViT-B-16-SigLIP", 8)
    exact = bcosify(model, **EXACT)
    texts = torch.randn(4, model.visual(x).shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        image = F.normalize(model.encode_image(normalized(exact, x)), dim=-1)
        own = image @ F.normalize(texts, dim=-1).T * model.logit_scale.exp() + model.logit_bias
    labels = own.argmax(1)
    for other in (exact, StandardCLIP(model, exact.config["mean"], exact.config["std"])):
        assert evaluate_zero_shot(other, [(x, labels)], texts, progress=False)["top1"] == 1
        with torch.no_grad():
            torch.testing.assert_close(other.classifier(texts, scale="own")(x), own)


# --- CoCa -----------------------------------------------------------------------------------------------------------

COCA = dict(layers=2, width=24, head_width=8, image_size=32, patch_size=8, output_tokens=True)
POOLED = dict(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2)


def coca(seed=0, quick_gelu=False, **vision):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.coca_model.CoCa(
            embed_dim=10, vision_cfg=COCA | vision,
            text_cfg=TEXT | dict(embed_cls=True, output_tokens=True),
            multimodal_cfg=dict(context_length=12, vocab_size=49408, width=8, heads=2, layers=1),
            quick_gelu=quick_gelu,
        )  # fmt: skip
        model.double().eval()
        randomized(model.visual)
        return model


@pytest.mark.parametrize(
    "vision", [{}, POOLED, POOLED | {"pool_type": "avg"}, POOLED | {"pool_type": "avg", "final_ln_after_pool": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("head", ["before_pool", "keep"])
def test_coca(vision, head):
    model, x = coca(**vision), pictures("coca")
    exact = bcosify(model, **EXACT, head=head)
    with torch.no_grad():
        expected = model.visual(normalized(exact, x))[0]
        assert error(exact(x), expected) < 1e-10
        assert error(exact.encode_image(x, normalize=True), model.encode_image(normalized(exact, x))) < 1e-10
        teacher = StandardCLIP(model, exact.config["mean"], exact.config["std"])
        assert error(teacher.encode_image(x), expected) < 1e-6, "not yet of length 1"
    converted = bcosify(model, head=head)
    report = verify(model, converted, x)
    assert report.ok, str(report)
    assert report.equivalence.error < 1e-10 and report.explanation.error < 1e-9 and not report.explanation.zero


def test_cocas_pooling_and_texts(tmp_path):
    model, x = coca(**POOLED), pictures("coca")
    converted = bcosify(model)
    pooler = converted.model.attn_pool
    assert type(pooler.attn) is bnn.MultiheadAttention and type(pooler.attn.out_proj) is bnn.BcosLinear
    assert pooler.query.shape == (5, 10) and type(pooler.ln_k) is bnn.LayerNorm
    assert pooler.ln_q.bias is not None, "of the queries: no part of W(x)"
    assert not any("decoder" in name for name in converted.state_dict()), "captions are not converted"
    with torch.no_grad():
        assert torch.equal(converted.encode_text(tokens(), normalize=True), model.encode_text(tokens()))
        expected = F.normalize(model.encode_text(tokens()), dim=-1)
    torch.testing.assert_close(converted.encode_texts(TEXTS), expected)
    cosines = F.normalize(converted(x), dim=-1) @ expected.T
    torch.testing.assert_close(explain(converted, x, text=TEXTS).logits, cosines.detach())
    converted.save_pretrained(tmp_path, with_text=True)
    loaded = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x)) and torch.equal(loaded.encode_texts(TEXTS), expected)


def test_what_is_refused():
    with pytest.raises(ValueError, match="its class token or the mean of its tokens, got one with two attentional"):
        bcosify(coca(**POOLED | {"attentional_pool": "parallel"}))
    model = open_clip.CLIP(
        embed_dim=10, vision_cfg=dict(timm_model_name="starnet_s1", timm_model_pretrained=False, timm_pool="avg",
                                      timm_proj="linear", image_size=64), text_cfg=TEXT)  # fmt: skip
    with pytest.raises(ValueError, match="timm.models.starnet.StarNet: what its forward does"):
        bcosify(model)
