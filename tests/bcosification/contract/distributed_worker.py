"""One of two processes of the test of distributed training, in a file of its own that imports little."""

import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bcosification.nn import SyncBatchNormUncentered2d
from tests.bcosification.contract import networks

WORLD = 2
NAMES = ("densenet", "vit")


def whole_batch(name: str) -> torch.Tensor:
    return networks.images(name, 6)


def share(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Half of the batch: DistributedDataParallel averages over processes, not over samples."""
    return x[rank * len(x) // WORLD :][: len(x) // WORLD]


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().square().mean() if logits.dtype == torch.bfloat16 else logits.square().mean()


def state_after_step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients, and parameters and statistics after an optimiser's step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model(x)).backward()
    whole = {}
    for name, p in model.named_parameters():
        whole[f"d{name}"] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
    optimizer.step()
    for name, t in model.state_dict().items():
        whole[name] = t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
    return whole


def prepared(name: str, sync: bool = True) -> nn.Module:
    """A converted network in training mode; its norms synchronised, torch's own conversion tried before."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(networks.converted(name).train())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    return SyncBatchNormUncentered2d.convert_sync_batchnorm(model) if sync else model


def data_parallel(name: str, rank: int, **options) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(prepared(name), **options)
    found = state_after_step(model, share(whole_batch(name), rank))
    return {k.replace("module.", "", 1): v for k, v in found.items()}


def sharded(name: str, rank: int) -> dict[str, torch.Tensor]:
    # fully_shard takes no parameters in channels_last
    model = prepared(name).to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh("cpu", (WORLD,))
    blocks = [m for m in model.modules() if type(m).__name__ in ("EncoderBlock", "FusedDenseLayer")]
    assert blocks
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return state_after_step(model, share(whole_batch(name), rank))


def sharded_in_bfloat16(name: str, rank: int) -> dict[str, torch.Tensor]:
    """fully_shard's mixed precision: parameters cast for compute, gradients in float32."""
    model = prepared(name).float().to(memory_format=torch.contiguous_format)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    return state_after_step(model, share(whole_batch(name), rank).float())


CASES = {
    "DDP": data_parallel,
    "DDP, static graph": lambda name, rank: data_parallel(name, rank, static_graph=True),
    "DDP, gradients as views of buckets": lambda name, rank: data_parallel(name, rank, gradient_as_bucket_view=True),
    "FSDP": sharded,
    "FSDP, bfloat16": sharded_in_bfloat16,
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    try:
        results = {(case, name): run(name, rank) for case, run in CASES.items() for name in NAMES}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def single_process(name: str) -> dict[str, torch.Tensor]:
    return state_after_step(copy.deepcopy(prepared(name, sync=False)), whole_batch(name))
