"""Activation checkpointing, offloading, and what a network keeps under them."""

import copy
import functools
import gc
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import bcosification
from bcos_kernels import dispatch
from tests.bcosification.contract import networks


def checkpointed(model, **options):
    return lambda x: checkpoint(model, x, **options)


@pytest.mark.parametrize("form", ["reentrant", "not reentrant", "selective"])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", networks.SMALL)
def test_checkpointing(name, memory, form):
    """The definition's gradients; statistics are updated twice, as those of torch's own norms are."""
    model, x = networks.converted(name), networks.images(name)
    bcosification.fuse(model, memory=memory)
    networks.set_mode(model, "training")
    options = {"use_reentrant": form == "reentrant"}
    if form == "selective":
        names = ("conv2d", "conv2d_batch_norm", "linear", "linear_gelu", "layer_norm")
        ops = {getattr(torch.ops.bcos_kernels, name).default for name in names}

        def policy(context, op, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    got = networks.results_of_copy(model, x, lambda twin: checkpointed(twin, **options))
    with networks.definition():
        expected = networks.results_of_copy(model, x)
    found = [k for k in got if not k.endswith("running_var")]
    networks.assert_same({k: got[k] for k in found}, {k: expected[k] for k in found}, 1e-9)


def test_selective_checkpointing_runs_a_saved_op_once():
    """The forward of a convolution that the policy saves is not launched again when its block is computed again."""
    model, x = networks.converted("densenet"), networks.images("densenet")
    networks.set_mode(model, "training")

    saved = {torch.ops.bcos_kernels.conv2d.default, torch.ops.bcos_kernels.conv2d_batch_norm.default}

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with mock.patch.object(dispatch, "run", wraps=dispatch.run) as run:
        checkpoint(model, x.requires_grad_(), use_reentrant=False, context_fn=contexts).sum().backward()
    launched = Counter(call.args[:2] for call in run.call_args_list)
    convolutions = sum(isinstance(m, bcosification.nn.BcosConv2d) for m in model.modules())
    norms = sum(isinstance(m, bcosification.nn.BatchNormUncentered2d) for m in model.modules())
    fused = launched["conv2d_batch_norm", "forward"]
    assert fused > 0 and launched["conv2d_batch_norm", "backward"] == fused
    assert launched["conv2d", "forward"] == launched["conv2d", "backward"] == convolutions - fused
    assert launched["batch_norm_uncentered", "forward"] == 2 * (norms - fused)


def live_bytes(function):
    """(bytes allocated in ``function`` and still there after it, what it returned)."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), result


@pytest.mark.parametrize("memory", ["default", "low"])
def test_checkpointing_keeps_little(memory):
    """A checkpointed network keeps its input and output; the backward frees all that it computes again."""
    model, x = networks.converted("resnet", torch.float32), networks.images("resnet", dtype=torch.float32)
    bcosification.fuse(model, memory=memory)
    networks.set_mode(model, "training")
    model(x).sum().backward()  # gradients, and what is allocated once
    whole, y = live_bytes(lambda: model(x))
    del y
    little, y = live_bytes(lambda: checkpoint(model, x, use_reentrant=False))
    assert little < 0.05 * whole, (little, whole)
    kept, _ = live_bytes(lambda: y.sum().backward())
    assert abs(kept) < 0.05 * whole, (kept, whole)


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", networks.SMALL)
def test_saved_tensor_hooks_see_all_that_is_kept(name, memory):
    """Offloading: with everything packed away, no activation of a B-cos layer stays alive."""
    model, x = networks.converted(name), networks.images(name)
    bcosification.fuse(model, memory=memory)
    networks.set_mode(model, "training")
    with networks.definition():
        expected = networks.results_of_copy(model, x)
    twin, outputs = copy.deepcopy(model), []
    for module in twin.modules():
        if isinstance(module, bcosification.nn.BcosConv2d | bcosification.nn.BcosLinear):
            module.register_forward_hook(lambda module, args, y: outputs.append(weakref.ref(y.untyped_storage())))

    def offloaded(x):
        # clones stand for copies on another device
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return twin(x)

    def function(x):
        y = offloaded(x)
        gc.collect()
        alive = sum(ref() is not None for ref in outputs)
        assert len(outputs) > 2 and alive <= 1, f"{alive} of {len(outputs)}"  # the last may be the logits
        return y

    networks.assert_same(networks.results(twin, x, function), expected, 1e-9)
    with torch.autograd.graph.save_on_cpu():
        networks.assert_same(networks.results_of_copy(model, x), expected, 1e-9)
