"""BatchNormUncentered2d against the peer's, and its synchronised form against one process with the whole batch."""

import pytest
import torch
import torch.multiprocessing as mp
from bcos.modules import norms
from torch import nn

from bcosification.nn import BatchNormUncentered2d, BcosConv2d, SyncBatchNormUncentered2d

from .sync_worker import make_synced, sync_worker, whole_batch

CASES = {
    "bias": dict(),
    "no bias": dict(bias=False),
    "not affine": dict(affine=False),
    "cumulative": dict(momentum=None),
    "untracked": dict(track_running_stats=False),
    "eps and momentum": dict(eps=0.1, momentum=0.5),
}


def pair(case):
    options = dict(CASES[case])
    bias = options.pop("bias", True)
    make = norms.BatchNormUncentered2d if bias else norms.NoBias(norms.BatchNormUncentered2d)
    peer = make(5, **options).double()
    ours = BatchNormUncentered2d(5, dtype=torch.float64, bias=bias, **options)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.uniform_(0.5, 1.5)
    ours.load_state_dict(peer.state_dict())
    return peer, ours


@pytest.mark.parametrize("explaining", [False, True], ids=["plain", "explaining"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_peer(case, training, explaining):
    peer, ours = pair(case)
    assert list(ours.state_dict()) == list(peer.state_dict())
    for module in (peer, ours):
        for _ in range(2):
            module(torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 + 1)
        module.train(training)
        module.set_explanation_mode(explaining)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64) + 1
    direction = torch.randn_like(x)
    results = []
    for module in (ours, peer):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, *module.parameters()), direction)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    for (name, mine), theirs in zip(ours.named_buffers(), peer.buffers(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_residual_and_activation_in_one_call(training):
    ours = BatchNormUncentered2d(5, dtype=torch.float64).train(training)
    with torch.no_grad():
        ours.bias.uniform_(-1, 1)
    x, residual = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64).unbind()
    direction = torch.randn_like(x)
    results = []
    for fused in (True, False):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = ours(leaves[0], leaves[1], "relu") if fused else torch.relu(ours(leaves[0]) + leaves[1])
        results.append((y, *torch.autograd.grad(y, (*leaves, ours.weight, ours.bias), direction)))
    for fused, apart in zip(*results, strict=True):
        assert torch.allclose(fused, apart, rtol=1e-10, atol=1e-12)


def test_constant_gain_scales_the_bias_alone():
    ours = BatchNormUncentered2d(5, dtype=torch.float64).eval()
    with torch.no_grad():
        ours.bias.uniform_(-1, 1)
    x, residual = torch.randn(2, 3, 5, 2, 2, dtype=torch.float64).unbind()
    gain = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    ours.constant_gain = gain
    for activation in (None, "relu"):
        y = ours(x, residual, activation)
        scaled = x / (1 + 1e-5) ** 0.5 + ours.bias.view(1, -1, 1, 1) * gain.view(-1, 1, 1, 1) + residual
        assert torch.allclose(y, scaled if activation is None else scaled.relu(), rtol=1e-12)


def test_checkpoints_of_batch_norm_2d_load():
    source = nn.BatchNorm2d(5)
    source(torch.randn(4, 5, 2, 2))
    ours = BatchNormUncentered2d(5)
    ours.load_state_dict(source.state_dict())
    assert torch.equal(ours.running_var, source.running_var) and ours.num_batches_tracked == 1
    without_counter = {k: v for k, v in source.state_dict().items() if k != "num_batches_tracked"}
    assert ours.load_state_dict(without_counter) == ([], [])
    ours.reset_running_stats()
    assert ours.running_var.eq(1).all() and ours.num_batches_tracked == 0


def test_torchs_synchronised_conversion_leaves_it():
    model = nn.Sequential(BatchNormUncentered2d(5), nn.BatchNorm2d(5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is BatchNormUncentered2d
    assert type(converted[1]) is nn.SyncBatchNorm


def test_bad_input():
    ours = BatchNormUncentered2d(5)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, C, H, W\), got \(2, 5\)"):
        ours(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="None or 'relu', got 'gelu'"):
        ours(torch.zeros(2, 5, 1, 1), activation="gelu")


@pytest.mark.slow
def test_synchronised_form_is_one_process_with_the_whole_batch(tmp_path):
    mp.spawn(sync_worker, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    norm = make_synced()
    for explaining in (False, True):
        norm.set_explanation_mode(explaining)
        x = whole_batch().requires_grad_()
        y = norm(x, residual=x.detach() - 50, activation="relu")
        y.square().sum().backward()
        shares = [result[explaining] for result in results]
        assert torch.allclose(torch.cat([share[0] for share in shares]), y, rtol=1e-10)
        assert torch.allclose(torch.cat([share[1] for share in shares]), x.grad, rtol=1e-9, atol=1e-12)
        for share in shares:
            assert torch.allclose(share[2], norm.running_var, rtol=1e-12)


def test_synchronised_form_is_the_plain_one_in_one_process():
    norm, synced = make_synced(), SyncBatchNormUncentered2d.convert_sync_batchnorm(make_synced())
    assert type(synced) is SyncBatchNormUncentered2d
    x = whole_batch()
    assert torch.equal(norm(x), synced(x))
    assert torch.equal(norm.running_var, synced.running_var)


@pytest.mark.parametrize("shape", [(5, 1, 1), (2, 1, 1, 1), (1, 1, 6, 6), (3, 2, 5, 6, 6)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_residual_of_another_shape_is_broadcast(shape, activation):
    """Alone, and behind a convolution; statistics are counted once."""
    torch.manual_seed(0)
    conv, x, residual = BcosConv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 11, 11), torch.randn(shape)
    for behind in (False, True):
        norm, expected_norm = (BatchNormUncentered2d(5) for _ in range(2))
        y = conv(x)
        expected = expected_norm(y) + residual
        expected = expected if activation is None else expected.relu()
        found = norm.behind(conv, x, residual, activation) if behind else norm(y, residual, activation)
        torch.testing.assert_close(found, expected)
        assert norm.num_batches_tracked == 1
        torch.testing.assert_close(norm.running_var, expected_norm.running_var)
