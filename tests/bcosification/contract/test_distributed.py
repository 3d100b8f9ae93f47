"""DistributedDataParallel and FSDP2 (fully_shard) with two processes on gloo, against one with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.bcosification.contract import networks
from tests.bcosification.contract.distributed_worker import CASES, NAMES, WORLD, single_process, worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_one_process_with_the_whole_batch(case, name, results):
    """Gradients, parameters after the step, and the synchronised norms' statistics, the same in both processes."""
    expected = single_process(name)
    first, second = (result[case, name] for result in results)
    networks.assert_same(second, first, 0.0)
    if "bfloat16" not in case:
        networks.assert_same(first, expected, 1e-9)
        return
    for key, value in first.items():
        assert value.dtype in (torch.float32, torch.long) and torch.isfinite(value).all(), key
    gradients = [torch.cat([d[k].double().flatten() for k in expected if k.startswith("d")]) for d in (first, expected)]
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()
