"""MultiheadAttention against torch's, with a plain output projection, and its B-cos and explanation parts."""

import itertools

import pytest
import torch
from torch import nn

from bcosification.nn import BcosLinear, MultiheadAttention

OPTIONS = {
    "packed": dict(),
    "no bias": dict(bias=False),
    "other sizes": dict(kdim=6, vdim=4),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "bias_kv and zero_attn": dict(add_bias_kv=True, add_zero_attn=True),
}


def twins(batch_first=False, **options):
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-1, 1)
    ours = MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64, bcos_out_proj=False, **options)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(module, batch_first, batch=3):
    sizes = (5, module.embed_dim), (4, module.kdim), (4, module.vdim)
    made = [torch.randn(length, batch, size, dtype=torch.float64) for length, size in sizes]
    return [x.transpose(0, 1).contiguous() if batch_first else x for x in made]


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("name", OPTIONS, ids=str)
def test_against_torch(name, batch_first):
    ours, theirs = twins(batch_first, **OPTIONS[name])
    inputs = tokens(ours, batch_first)
    padding = torch.tensor([[False, False, False, True]] * 2 + [[False] * 4])
    causal = torch.triu(torch.ones(5, 4, dtype=torch.bool), 2)
    per_head = torch.randn(6, 5, 4, dtype=torch.float64)
    masks = [dict(), dict(key_padding_mask=padding), dict(attn_mask=causal), dict(attn_mask=per_head)]
    masks.append(dict(attn_mask=per_head, key_padding_mask=torch.randn(3, 4, dtype=torch.float64)))
    for mask, need_weights in itertools.product(masks, (True, False)):
        y, weights = ours(*inputs, need_weights=need_weights, **mask)
        expected, expected_weights = theirs(*inputs, need_weights=need_weights, **mask)
        assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            assert torch.allclose(weights, expected_weights, rtol=1e-10, atol=1e-12)
    y, weights = ours(*inputs, average_attn_weights=False)
    assert torch.allclose(weights, theirs(*inputs, average_attn_weights=False)[1])


def test_self_attention_and_unbatched_with_gradients():
    ours, theirs = twins(batch_first=True)
    for shape in ((3, 5, 8), (5, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        direction = torch.randn_like(x)
        gradients = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y, weights = module(leaf, leaf, leaf)
            gradients.append((y, weights, *torch.autograd.grad(y, (leaf, *module.parameters()), direction)))
        for mine, other in zip(*gradients, strict=True):
            assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)


def test_the_output_projection_is_a_bcos_layer():
    ours, plain = MultiheadAttention(8, 2, b=1.5, dtype=torch.float64), None
    assert type(ours.out_proj) is BcosLinear and ours.out_proj.b == 1.5 and not ours.out_proj.normalize_weight
    plain = MultiheadAttention(8, 2, bcos_out_proj=False, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    heads = []
    plain.out_proj.register_forward_hook(lambda module, args, output: heads.append(args[0]))
    plain(x, x, x)
    assert torch.allclose(ours(x, x, x)[0], ours.out_proj(heads[0]).transpose(0, 1), rtol=1e-10)
    assert MultiheadAttention(8, 2, out_proj_bias=False).out_proj.bias is None


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", OPTIONS, ids=str)
def test_explanation_is_the_map_with_frozen_attention(name, need_weights):
    """With the attention matrix frozen the module is linear in v, so in the value: value ⊙ gradient + constant = y."""
    options = {"bcos_out_proj": False, "batch_first": True, "dtype": torch.float64, **OPTIONS[name]}
    module = MultiheadAttention(8, 2, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
        if module.out_proj.bias is not None:
            module.out_proj.bias.zero_()
    inputs = [x.requires_grad_() for x in tokens(module, True)]
    plain = module(*inputs, need_weights=need_weights)[0]
    module.set_explanation_mode()
    gain = module.constant_gain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = module(*inputs, need_weights=need_weights)[0]
    assert torch.allclose(y, plain, rtol=1e-10)
    target = y[:, 2, 1]
    unused_query, unused_key, dvalue, dgain = torch.autograd.grad(
        target.sum(), (*inputs, gain), allow_unused=True, materialize_grads=True
    )
    assert unused_query.abs().max() == 0 and unused_key.abs().max() == 0
    assert torch.allclose((inputs[2] * dvalue).sum((1, 2)) + dgain, target, rtol=1e-9)
    # The gradient is that of the map with the attention weights of the plain module.
    weights = module(*inputs, average_attn_weights=False)[1].detach()
    weight_v = module.v_proj_weight if module.in_proj_weight is None else module.in_proj_weight.chunk(3)[2]
    per_head = weight_v.view(2, 4, -1)  # (heads, head_dim, vdim)
    out = module.out_proj.weight[1].view(2, 4)
    expected = torch.einsum("nhs,hd,hdv->nsv", weights[:, :, 2, :4], out, per_head)
    assert torch.allclose(dvalue, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_stays_off_the_fast_path_of_torchs_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    layer.self_attn = MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    for model in (layer, nn.TransformerEncoder(layer, 1).eval()):
        with torch.inference_mode():
            fast = model(x)
        assert torch.allclose(fast, model(x.requires_grad_()), rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    module = MultiheadAttention(8, 2, dropout=0.9, batch_first=True)
    x = torch.randn(3, 5, 8)
    assert not torch.allclose(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="embed_dim divisible by num_heads .*got 8 and 3"):
        MultiheadAttention(8, 3)
    module = MultiheadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    with pytest.raises(ValueError, match=r"value.size\(-1\) == 8, got 6"):
        module(x, x, x[..., :6])
    with pytest.raises(ValueError, match=r"attn_mask of shape \(5, 5\), got \(4, 5\)"):
        module(x, x, x, attn_mask=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \(3, 5\), got \(5, 3\)"):
        module(x, x, x, key_padding_mask=torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool or floating, got torch.int64"):
        module(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="is_causal"):
        module(x, x, x, is_causal=True)
