"""torch.use_deterministic_algorithms: nothing raises, and two runs give the same bits."""

import copy

import pytest
import torch

import bcosification
from tests.bcosification.contract import networks


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", networks.SMALL)
def test_training_repeats_bit_for_bit(name, memory, dtype, deterministic):
    """Uninitialised memory is filled with NaN in this mode, so that what is read must have been written."""
    model, x = networks.converted(name, torch.float32), networks.images(name, dtype=torch.float32)
    bcosification.fuse(model, memory=memory)
    targets = torch.eye(networks.CLASSES)[: len(x)]

    def train():
        network = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = network(x)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, network.state_dict()

    losses, state = train()
    again, same = train()
    assert losses == again and losses[-1] != losses[0] and all(torch.isfinite(loss) for loss in losses)
    assert all(torch.equal(state[k], same[k]) for k in state)


def test_explanations_repeat_bit_for_bit(deterministic):
    model, x = networks.converted("resnet", torch.float32), networks.images("resnet", dtype=torch.float32)
    first, second = (bcosification.explain(model, x) for _ in range(2))
    for part in ("logits", "weights", "contributions", "constant"):
        assert torch.equal(getattr(first, part), getattr(second, part)), part
