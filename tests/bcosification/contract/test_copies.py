"""deepcopy, pickle, torch.save and AveragedModel of converted and of fused networks."""

import copy
import io
import pickle

import pytest
import torch

import bcosification
from tests.bcosification import tiny_networks
from tests.bcosification.contract import networks


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(model):
    """Into a copy whose parameters are all different."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    # buffers that are no part of the state (a schedule's B, the images' mean) come from the module
    persistent = twin.state_dict().keys()
    for name, tensor in model.named_buffers():
        if name not in persistent:
            twin.get_buffer(name).copy_(tensor)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    return twin


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
    "state_dict": through_state_dict,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


def networks_to_copy(kind):
    if kind == "fused peer":
        # the peer's norms without bias cannot be pickled: their class is made inside a function
        return bcosification.fuse(tiny_networks.build("peer_transformer")), tiny_networks.images()
    model = networks.converted("resnet")
    return bcosification.fuse(model, memory="low" if kind == "low memory" else "default"), networks.images("resnet")


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["converted", "low memory", "fused peer"])
def test_copies_compute_the_same_and_share_nothing(kind, how):
    model, x = networks_to_copy(kind)
    networks.set_mode(model, "training")
    model(x).sum().backward()  # a network that has been used
    twin = COPIES[how](model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    mine = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not mine & {t.untyped_storage().data_ptr() for t in twin.state_dict().values()}
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    expected = networks.results_of_copy(model, x)
    networks.assert_same(networks.results_of_copy(twin, x), expected, 0.0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_in_the_mode_of_the_original(how):
    model, x = networks.converted("vit"), networks.images("vit")
    networks.set_mode(model, "explaining")
    expected = networks.results_of_copy(model, x)
    networks.assert_same(networks.results_of_copy(COPIES[how](model), x), expected, 0.0)
    networks.set_mode(model, "eval")
    assert not torch.equal(networks.results_of_copy(model, x)["dx"], expected["dx"])
