"""open_clip's image towers: what each layer becomes, exactness at B = 1, what is refused."""

import copy
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import nn

from bcosification import BcosifiedCLIP, bcosify, fuse, unfuse, verify
from bcosification import nn as bnn
from bcosification.convert.conversion import describe
from bcosification.convert.families import family_of
from bcosification.convert.preprocessing import OPENAI_MEAN, OPENAI_STD
from tests.bcosification.small_clip import VISION, clip, error, images, normalized

EXACT = {"b": 1, "bias": "keep"}


def without_positions_and_biases(tower):
    """A ModifiedResNet whose attention pooling has neither."""
    tower = copy.deepcopy(tower)
    pool = tower.attnpool
    for parameter in (pool.positional_embedding, *(m.bias for m in pool.modules() if isinstance(m, nn.Linear))):
        nn.init.zeros_(parameter)
    return tower


@pytest.mark.parametrize("name, quick", [*((name, False) for name in VISION), ("vit", True)])
def test_exact_at_b_1(name, quick):
    model, x = clip(name, quick_gelu=quick), images(name)
    tower = without_positions_and_biases(model.visual) if name == "resnet" else model.visual
    converted = bcosify(model, **EXACT)
    with torch.no_grad():
        expected = tower(normalized(x))
        assert error(converted(x), expected) < 1e-12
        assert error(converted(torch.cat([x, 1 - x], 1)), expected) < 1e-12
        assert error(converted.encode_image(x, normalize=True), F.normalize(expected, dim=-1)) < 1e-12
        kept = bcosify(model, **EXACT, head="keep")
        assert error(kept(x), expected) < 1e-12
    assert type(converted) is BcosifiedCLIP


@pytest.mark.parametrize("name", VISION)
def test_verify_says_yes(name):
    model, x = clip(name), images(name)
    converted = bcosify(model)
    report = verify(model, converted, x)
    assert report.ok, str(report)
    assert report.equivalence.error < 1e-12 and report.explanation.error < 1e-9
    assert verify(model.visual, converted, x).ok  # the tower alone
    assert ("attention pooling without positional embedding and biases" in str(report)) == (name == "resnet")


def test_verify_says_no():
    model, x = clip("resnet"), images("resnet")
    converted = bcosify(model)
    converted.model.attnpool.c_proj.set_b(3.0)  # the pooling itself is linear: nothing to see with "pool"
    assert verify(model, converted, x).ok
    other = clip("resnet")
    with torch.no_grad():
        other.visual.attnpool.v_proj.weight[0] *= 2
    assert verify(other, converted, x).weights_changed == ["model.attnpool.v_proj.weight"]
    model = clip("vit")
    converted = bcosify(model)
    converted.model.proj.register_forward_hook(lambda module, inputs, output: output**3)
    report = verify(model, converted, images("vit"))
    assert not report.ok and not report.explanation.ok


def test_a_projection_that_is_never_called_is_an_error(monkeypatch):
    model = clip("vit")
    converted = bcosify(model)

    def forgets(self, x):
        return self.ln_post(self.transformer(self.conv1(x).flatten(2).mT))[:, 0, :10]

    monkeypatch.setattr(type(converted.model).__mro__[1], "forward", forgets)
    failed = {layer.name: layer.problem for layer in verify(model, converted, images("vit")).layers if not layer.ok}
    assert failed["proj"] == "a converted layer that is never called"


def test_every_layer_of_a_resnet():
    model = clip("resnet")
    converted = bcosify(model)
    kinds = {type(module).__name__ for module in converted.model.modules() if not list(module.children())}
    assert kinds == {
        "BcosConv2d", "BcosLinear", "BatchNormUncentered2d", "ReLU", "AvgPool2d", "Identity", "Linear", "L2Norm",
    }  # fmt: skip
    pool, old = converted.model.attnpool, model.visual.attnpool
    assert type(pool) is bnn.AttentionPool2d and type(old) is AttentionPool2d
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        assert torch.equal(getattr(pool, name).weight, getattr(old, name).weight) and getattr(pool, name).bias is None
    weight = model.visual.conv1.weight
    assert torch.equal(converted.model.conv1.weight, torch.cat([weight, -weight], 1) / 2)
    # The rest, but for the attention pooling's positions and all biases, is the original's, by name.
    left_out = {name for name in model.visual.state_dict() if name.endswith("bias")} | {"attnpool.positional_embedding"}
    names = {f"model.{name}" for name in set(model.visual.state_dict()) - left_out}
    assert {name for name in converted.state_dict() if name.startswith("model.")} == names


def test_every_layer_of_a_vit():
    model = clip("vit", quick_gelu=True)
    converted = bcosify(model)
    block = converted.model.transformer.resblocks[0]
    kinds = (block.ln_1, block.attn, block.attn.out_proj, block.mlp.c_fc, block.mlp.gelu, block.mlp.c_proj)
    expected = (bnn.LayerNorm, bnn.MultiheadAttention, bnn.BcosLinear, bnn.BcosLinear, bnn.QuickGELU, bnn.BcosLinear)
    assert tuple(map(type, kinds)) == expected
    assert type(converted.model.proj) is bnn.BcosLinear and converted.model.proj.b == 2
    assert torch.equal(converted.model.proj.weight, model.visual.proj.T)
    assert converted.additive_parameters == ["model.class_embedding", "model.positional_embedding"]
    assert model.visual.class_embedding.shape == (24,) and isinstance(model.visual.proj, nn.Parameter)  # untouched


def test_a_resnet_takes_other_sizes():
    converted = bcosify(clip("resnet"))
    assert converted(torch.rand(1, 3, 96, 128, dtype=torch.float64)).shape == (1, 10)
    converted.set_attention_pool("unpool")
    assert converted.image_features(torch.rand(1, 3, 96, 128, dtype=torch.float64)).shape == (1, 12, 10)


def test_b_and_weight_normalisation_reach_every_layer():
    converted = bcosify(clip("resnet"), b=1.5, normalize_weight=True, activation="remove")
    layers = [m for m in converted.modules() if isinstance(m, (bnn.BcosConv2d, bnn.BcosLinear))]
    assert len(layers) == 20 and all(layer.b == 1.5 and layer.normalize_weight for layer in layers)
    assert not any(isinstance(module, nn.ReLU) for module in converted.modules())


def test_preprocessing_is_openais_unless_the_model_tells():
    config = bcosify(clip("resnet")).config
    assert (tuple(config["mean"]), tuple(config["std"])) == (OPENAI_MEAN, OPENAI_STD)
    assert (config["input_size"], config["resize"], config["interpolation"]) == ([64, 64], 64, "bicubic")
    assert bcosify(clip("vit").visual).config["preprocessing_origin"] == "OpenAI's CLIP"
    told = clip("vit")
    open_clip.model.set_model_preprocess_cfg(
        told, dict(mean=[0.5] * 3, std=[0.25] * 3, size=32, interpolation="bilinear", resize_mode="squash")
    )
    for model in (told, told.visual):
        config = bcosify(model).config
        assert (config["mean"], config["std"], config["crop"]) == ([0.5] * 3, [0.25] * 3, "squash")


@pytest.mark.parametrize("name", VISION)
def test_the_architecture_is_told(name):
    tower = clip(name).visual
    family = family_of(tower)
    told = describe(family, tower)
    assert told is not None and repr(family.build(told)) == repr(tower)


def test_what_is_refused():
    mixed = clip("vit").float()
    open_clip.model.convert_weights_to_fp16(mixed)
    with pytest.raises(ValueError, match="expected an image tower in one dtype, got float16 and float32"):
        bcosify(mixed)
    with pytest.raises(ValueError, match="expected logit_bias='auto' or None for an image tower"):
        bcosify(clip("vit"), logit_bias=-3.0)
    with pytest.raises(ValueError, match="takes its class token or the mean of its tokens, got one with no pooling"):
        bcosify(clip("vit", pool_type="none"))
    foreign = clip("vit")
    foreign.visual = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(ValueError, match="image tower of a known family .*Sequential in open_clip.model.CLIP"):
        bcosify(foreign)
    with pytest.raises(ValueError, match="already B-cosified"):
        bcosify(bcosify(clip("vit")))


@pytest.mark.parametrize("memory", ["default", "low"])
def test_fusing_and_unfusing_change_nothing(memory):
    model, x = clip("resnet"), images("resnet", 4)
    plain = bcosify(model)

    def gradients(converted):
        converted.zero_grad()
        converted.train()
        converted(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in converted.named_parameters() if p.grad is not None}

    expected = gradients(plain)
    fused = fuse(copy.deepcopy(plain), memory=memory)
    assert not fused.fusion_report.left
    for other in (fused, unfuse(fused)):
        for name, gradient in gradients(other).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_copied_pickled_and_compiled(name):
    converted, x = bcosify(clip(name)), images(name)
    with torch.no_grad():
        expected = converted(x)
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert torch.equal(other(x), expected)
        compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_a_full_sized_model_of_open_clips_configurations():
    """RN50 as open_clip builds it: converted whole, its architecture told, one image through it."""
    torch.manual_seed(0)
    model = open_clip.create_model("RN50", pretrained=None).eval()
    converted = bcosify(model)
    assert converted.config["architecture"]["layers"] == [3, 4, 6, 3] and converted.config["input_size"] == [224, 224]
    assert converted.config["text"]["architecture"]["text_cfg"]["width"] == 512
    with torch.no_grad():
        exact = bcosify(model, **EXACT)
        x = torch.rand(1, 3, 64, 64)
        assert exact(x).shape == (1, 1024) and converted(x).isfinite().all()
