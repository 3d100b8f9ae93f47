"""Training steps of whole networks: plain torchvision, the peer, the peer fused, the converted network.

pytest -q -s benchmarks/bench_models.py
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
import torchvision

import bcosification

from .protocol import Results, bytes_kept, interleaved, summarized

ROUNDS = int(os.environ.get("BCOS_BENCH_ROUNDS", "7"))


class Step:
    """zero_grad, forward, loss, backward, optimiser step."""

    def __init__(self, model, images, labels):
        self.model, self.images = model.train(), images
        self.targets = F.one_hot(labels, 1000).float()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loss(self):
        return F.binary_cross_entropy_with_logits(self.model(self.images), self.targets)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


def channels_last(t):
    return t.to(memory_format=torch.channels_last)


def peer_resnet(name):
    """The peer's ResNet as its ImageNet recipe builds it: uncentered BatchNorm without bias."""
    import bcos.models.resnet as resnets
    from bcos.modules import norms

    return getattr(resnets, name)(
        pretrained=False, num_classes=1000, norm_layer=norms.NoBias(norms.BatchNormUncentered2d)
    )


@pytest.mark.parametrize("name, batch", [("resnet50", 8), ("resnet18", 16)])
def test_training_step(name, batch):
    torch.manual_seed(0)
    images = channels_last(torch.rand(batch, 3, 224, 224))
    six = channels_last(torch.cat([images, 1 - images], dim=1))
    labels = torch.randint(1000, (batch,))
    plain = getattr(torchvision.models, name)(weights=None)
    converted = bcosification.bcosify(plain)
    peer = peer_resnet(name)
    fused = bcosification.fuse(peer_resnet(name))
    contenders = {
        "plain": Step(channels_last(plain), images, labels),
        "plain compiled": Step(torch.compile(channels_last(copy.deepcopy(plain))), images, labels),
        "peer": Step(channels_last(peer), six, labels),
        "peer compiled": Step(torch.compile(channels_last(copy.deepcopy(peer))), six, labels),
        "fused peer": Step(channels_last(fused), six, labels),
        "ours": Step(channels_last(converted), images, labels),
    }
    results = Results(f"training_{name}")
    # numbers before times: the fused peer is the peer
    fused.load_state_dict(peer.state_dict())
    expected, got = contenders["peer"].loss().item(), contenders["fused peer"].loss().item()
    assert abs(got - expected) <= 1e-4 * abs(expected), (got, expected)
    assert all(torch.isfinite(step.loss()) for step in contenders.values())
    kept = {label: bytes_kept(step.loss) for label, step in contenders.items()}
    for label, values in summarized(interleaved(contenders, rounds=ROUNDS)).items():
        results.add(name, label, batch=batch, dtype="float32", kept_MiB=kept[label] / 2**20,
                    kept_ratio=kept[label] / kept["plain"], **values)  # fmt: skip
        print(f"{name:10s} {label:14s} {values['median_ms']:8.1f} ms  {values['ratio']:.3f} "
              f"[{values['ratio_q1']:.2f}, {values['ratio_q3']:.2f}]  kept {kept[label] / 2**20:.0f} MiB "
              f"({kept[label] / kept['plain']:.3f})", flush=True)  # fmt: skip
