"""Hugging Face's CLIPVisionModelWithProjection against itself, and against open_clip's tower with its weights."""

import copy

import pytest
import torch

from bcosification import BcosifiedCLIP, bcosify, explain, load, verify
from bcosification import nn as bnn
from bcosification.convert.conversion import describe
from bcosification.convert.families import family_of
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.preprocessing import OPENAI_MEAN
from tests.bcosification.small_clip import error, normalized

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed (extra: clip)")


def tower(hidden_act="quick_gelu", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=4, projection_dim=6, hidden_act=hidden_act,
        )  # fmt: skip
        model = transformers.CLIPVisionModelWithProjection(config).double().eval()
        for name, parameter in model.named_parameters():
            bounds = (0.5, 1.5) if parameter.dim() == 1 and name.endswith("weight") else (-0.4, 0.4)
            torch.nn.init.uniform_(parameter, *bounds)
    return model


def images(count=2):
    return torch.rand(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_exact_at_b_1_and_verified(hidden_act):
    model, x = tower(hidden_act), images()
    before = copy.deepcopy(model.state_dict())
    exact = bcosify(model, b=1, bias="keep")
    with torch.no_grad():
        assert error(exact(x), model(normalized(x)).image_embeds) < 1e-12
    converted = bcosify(model)
    assert type(converted) is BcosifiedCLIP and tuple(converted.config["mean"]) == OPENAI_MEAN
    report = verify(model, converted, x)
    assert report.ok and report.equivalence.error < 1e-12 and report.explanation.error < 1e-9, str(report)
    attention = [layer for layer in report.layers if layer.was.endswith("CLIPAttention")]
    assert len(attention) == 2 and all(layer.calls == 1 and layer.error < 1e-12 for layer in attention)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layer = converted.model.vision_model.encoder.layers[0]
    assert type(layer.self_attn) is bnn.MultiheadAttention and type(layer.self_attn.out_proj) is bnn.BcosLinear
    assert type(layer.mlp.activation_fn) is (bnn.QuickGELU if hidden_act == "quick_gelu" else bnn.GELU)


def test_explained_for_embeddings():
    converted, x = bcosify(tower(), bias="keep"), images()
    texts = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    explanation = explain(converted, x, text=texts)
    replay = frozen_replay(converted.classifier(texts), explanation.images)
    assert replay.is_affine()
    for t in range(3):
        assert error(explanation.weights[:, t], replay.gradient(t)) < 1e-9
        torch.testing.assert_close(explanation.constant[:, t], replay.constant(t))
    with pytest.raises(ValueError, match="it was made of a bare image tower"):
        explain(converted, x, text="a dog")


def test_saved_and_loaded(tmp_path):
    model, x = tower(), images()
    assert describe(family_of(model), model)["hidden_size"] == 16
    converted = bcosify(model)
    converted.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))
    assert loaded.config == converted.config


def test_the_same_as_open_clips_tower_with_its_weights():
    from open_clip.transformer import QuickGELU, VisionTransformer

    model, x = tower(), images()
    other = VisionTransformer(16, 4, 16, 2, 2, 1.5, output_dim=6, act_layer=QuickGELU).double().eval()
    theirs, vision = model.state_dict(), "vision_model."
    state = {
        "class_embedding": theirs[f"{vision}embeddings.class_embedding"],
        "positional_embedding": theirs[f"{vision}embeddings.position_embedding.weight"],
        "proj": theirs["visual_projection.weight"].T,
        "conv1.weight": theirs[f"{vision}embeddings.patch_embedding.weight"],
    }
    pairs = [("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")]
    for i in range(2):
        block, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        pairs += [
            (f"{block}{a}", f"{layer}{b}")
            for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                         ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj"))
        ]  # fmt: skip
        for kind in ("weight", "bias"):
            state[f"{block}attn.in_proj_{kind}"] = torch.cat(
                [theirs[f"{vision}{layer}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            )
    for a, b in pairs:
        state |= {f"{a}.{kind}": theirs[f"{vision}{b}.{kind}"] for kind in ("weight", "bias")}
    other.load_state_dict(state)
    texts = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, open_clips = (explain(bcosify(m), x, text=texts) for m in (model, other))
    torch.testing.assert_close(ours.logits, open_clips.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.weights, open_clips.weights, rtol=1e-8, atol=1e-12)
