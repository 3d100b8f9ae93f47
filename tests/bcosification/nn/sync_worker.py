"""One process of the test of the synchronised BatchNorm, in a file of its own that imports little."""

import torch

from bcosification.nn import BatchNormUncentered2d, SyncBatchNormUncentered2d


def make_synced():
    torch.manual_seed(0)
    norm = BatchNormUncentered2d(3, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    return norm


def whole_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=generator) * 3 + 50


def sync_worker(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        norm = SyncBatchNormUncentered2d.convert_sync_batchnorm(make_synced())
        share = slice(0, 2) if rank == 0 else slice(2, 6)  # unequal shares
        results = []
        for explaining in (False, True):
            norm.set_explanation_mode(explaining)
            x = whole_batch()[share].requires_grad_()
            y = norm(x, residual=x.detach() - 50, activation="relu")
            y.square().sum().backward()
            results.append((y.detach(), x.grad, norm.running_var.clone()))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
