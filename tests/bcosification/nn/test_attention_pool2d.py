"""AttentionPool2d against torch's attention and formulas written out here."""

import pytest
import torch
import torch.nn.functional as F

from bcosification import nn as bnn
from bcosification.nn import explanation_mode


def layer(**options):
    torch.manual_seed(0)
    return bnn.AttentionPool2d(16, 4, 6, dtype=torch.float64, **options)


def features(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def torchs(pool, x):
    """What CLIP's pooling computes with torch's function, without positional embedding and biases."""
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
    y, _ = F.multi_head_attention_forward(
        tokens, tokens, tokens, 16, 4, None, None, None, None, False, 0.0, pool.c_proj.weight, None,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight, need_weights=False,
    )  # fmt: skip
    return y[0]


@pytest.mark.parametrize("b", [1, 2, 1.5])
@pytest.mark.parametrize("shape", [(2, 16, 3, 3), (1, 16, 1, 1), (3, 16, 2, 5), (0, 16, 2, 2)])
def test_pool_is_linear_in_the_output_projection_whatever_b(shape, b):
    pool, x = layer(b=b), features(*shape)
    torch.testing.assert_close(pool(x), torchs(pool, x) if shape[0] else x.new_empty(0, 6), rtol=1e-12, atol=1e-14)


def test_unpool_is_a_bcos_layer_at_every_position():
    pool, x = layer(mode="unpool"), features(2, 16, 2, 3)
    y = pool(x)
    assert y.shape == (2, 6, 6)
    for n, i, j in ((0, 0, 0), (1, 1, 2), (0, 1, 0)):
        v = pool.v_proj.weight @ x[n, :, i, j]
        a = pool.c_proj.weight @ v
        position = a * a.abs() / v.norm()
        torch.testing.assert_close(y[n, 3 * i + j], position / position.norm(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2, 6, dtype=torch.float64))


def test_normalized_weights_in_both_modes():
    pool, x = layer(normalize_weight=True), features(2, 16, 2, 2)
    unit = layer()
    unit.load_state_dict(pool.state_dict())
    with torch.no_grad():
        unit.c_proj.weight.div_(unit.c_proj.weight.norm(dim=1, keepdim=True))
    for mode in ("pool", "unpool"):
        pool.mode = unit.mode = mode
        torch.testing.assert_close(pool(x), unit(x), rtol=1e-12, atol=1e-14)


def test_in_explanation_mode_queries_and_keys_are_constants():
    pool, x = layer(), features(2, 16, 2, 3).requires_grad_()
    with explanation_mode(pool):
        (gradient,) = torch.autograd.grad(pool(x)[:, 1].sum(), x)
    tokens = x.detach().flatten(2).mT
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    q, k = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens)
    q, k = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (q, k))
    attention = (q @ k.mT / 2).softmax(-1)
    leaf = x.detach().clone().requires_grad_()
    values = leaf.flatten(2).mT
    values = torch.cat([values.mean(1, keepdim=True), values], 1)
    heads = attention @ pool.v_proj(values).unflatten(-1, (4, 4)).transpose(1, 2)
    y = heads.transpose(1, 2).flatten(1) @ pool.c_proj.weight.T
    (expected,) = torch.autograd.grad(y[:, 1].sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)
    (trained,) = torch.autograd.grad(pool(x)[:, 1].sum(), x)
    assert (trained - expected).abs().max() > 1e-3


def test_modes_share_their_weights_and_are_checked():
    pool = layer()
    assert set(pool.state_dict()) == {f"{name}_proj.weight" for name in "qkvc"}
    pool.mode = "unpool"
    assert pool.mode == "unpool" and "mode='unpool'" in repr(pool)
    with pytest.raises(ValueError, match="expected mode to be 'pool' or 'unpool', got 'mean'"):
        pool.mode = "mean"
    with pytest.raises(ValueError, match="expected embed_dim divisible by num_heads .*, got 16 and 3"):
        bnn.AttentionPool2d(16, 3)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 16, H, W\), got \(2, 8, 3, 3\)"):
        pool(torch.zeros(2, 8, 3, 3))
