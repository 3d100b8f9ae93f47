"""The peers' checkpoints: into models of this package, without the peers' packages, and back.

layout      B-cos v2 (package ``bcos``)                 B-cosification
names       fc.linear.weight; SimpleViT 0.…             model.fc.linear.weight; children of Sequentials numbered (CNNs)
Lightning   model.fc.linear.weight; ema.module.fc.…     model.model.fc.linear.weight; of CLIP also clip_model.…, the
                                                        standard tower that was distilled from
networks    weights normalised, no activations, images  weights as they are, activations kept, images normalised inside
            not normalised
CLIP                                                    the image tower, with attnpool.q_proj.weight, …, k_proj, v_proj,
                                                        c_proj.linear.weight; q and k only where it can "pool"
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.clip import BcosifiedCLIP
from bcosification.convert.conversion import check_convertible, check_options, convert
from bcosification.convert.families import family_of
from bcosification.convert.linear_map import bare_model
from bcosification.convert.peer_architectures import (
    ARCHITECTURES,
    TOWERS,
    class_count,
    guess,
    is_tower,
    output_count,
)
from bcosification.convert.peer_towers import SCALES, absent, check_tower, fit_pooling, is_scale, text_of
from bcosification.convert.preprocessing import detect
from bcosification.convert.rules import Options
from bcosification.convert.wrapper import BcosifiedModel, auto_logit_bias
from bcosification.weights_files import load_state, misfits, read_file, shortened, tensors_of

__all__ = ["LAYOUTS", "export_peer", "load_peer"]

LAYOUTS = ("bcos", "b-cosification")

_OPTIONS = {
    "bcos": {"pool": "average", "activation": "remove", "normalize_weight": True, "normalize_input": False},
    "b-cosification": {"pool": "average", "activation": "keep", "normalize_weight": False, "normalize_input": True},
}
_FAMILIES = {
    "bcos": (
        "torchvision_resnet",
        "torchvision_densenet",
        "fully_convolutional_vgg",
        "fully_convolutional_convnext",
        "simple_vit",
    ),
    "b-cosification": ("torchvision_resnet", "torchvision_densenet", "simple_vit", "open_clip_resnet"),
}
_TOWER = "open_clip_resnet"


def load_peer(
    checkpoint: str | os.PathLike | Mapping[str, Any],
    *,
    arch: str | nn.Module | None = None,
    layout: str | None = None,
    ema: bool = False,
    **options: Any,
) -> nn.Module:
    """Read a checkpoint of B-cos v2 or of B-cosification into a model of this package.

    Neither peer need be installed. Files are read without executing anything in them.

    Args:
        checkpoint: a file (of torch.hub, torch.save, safetensors, Lightning's last.ckpt), or its content.
        arch: None (default): told from names and shapes. Else a name of B-cos v2's ("resnet50", "convnext_tiny_bnu",
            "simple_vit_s_patch16_224", …) or of CLIP's ResNets ("RN50", …), or the *standard* network of the same
            structure (whatever its weights). A whole open_clip model also gives its text tower.
        layout: "bcos" (B-cos v2), "b-cosification", or None (default) to tell from the names. Only a state_dict taken
            out of a Lightning checkpoint of a ResNet leaves that open: then a norm with a running mean is taken as
            B-cosification's, for B-cos v2's never have one.
        ema: True takes the averaged weights of a Lightning checkpoint, default False.
        options: options of ``bcosify`` in which the model differs from the published ones: b, head, logit_bias, …

    Returns:
        A BcosifiedModel in eval mode on the CPU, in the dtype of the weights, which takes images (N, 3, H, W) in [0, 1]
        or encoded ones (N, 6, H, W). For B-cos v2's it has normalised weights, no activations, uncentered norms and no
        input normalisation. Of B-cos v2's *standard* SimpleViTs: the standard network, a SimpleViT. A ResNet's
        stochastic depth, which B-cos v2's long runs trained with, is left out (it does nothing when evaluating).
        Of B-cosified CLIP: a BcosifiedCLIP, the image tower without texts (``attach_text(open_clip model)`` adds them:
        those of "open_clip:RN50/openai" for the published files), with logit_scale and logit_bias where they were
        learnt. A tower that was trained with "unpool" alone has no q and k, and stays in that mode.

    Raises:
        FileNotFoundError: no such file. ValueError: a pickle with more than tensors in it, a truncated file, an
            architecture that is not known or that the weights do not fit (what is missing and what is left over is
            told). TypeError: a checkpoint or arch of another type.

    Warns:
        UserWarning: biases of an attention pooling, which the peer's "pool" does not read, are left out.

    Source: B-cos networks v2, arXiv:2306.10898; B-cosification, arXiv:2411.00715.

    Example:
        >>> model = bcosification.load_peer("resnet_50-ead259efe4.pth")
        >>> explanation = bcosification.explain(model, images)
    """
    _check_layout("load_peer", layout, optional=True)
    origin = str(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else "checkpoint"
    state, layout = _canonical(checkpoint, origin, layout, ema)
    learnt = {}
    if tower := is_tower(state):
        check_tower(state, layout, origin)
        learnt = {name: state.pop(name) for name in SCALES if name in state}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    standard = "linear_head.norm.weight" in shapes and "to_patch_embedding.linear.linear.weight" not in shapes
    if not standard and not any(name.endswith(".linear.weight") for name in shapes):
        raise ValueError(
            f"load_peer: {origin}: expected B-cos layers, whose weights are named *.linear.weight, got a standard "
            f"model's: {shortened(sorted(shapes))}; bcosification.resolve(FILE, arch=NAME) reads those"
        )
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    network, asked = _network(arch, shapes, origin)
    network = network.to(dtype)
    source = {"weights": origin}
    if standard:
        load_state(network, state, f"load_peer: {origin}", asked, assign=True)
        network.bcosification_source = {**source, "spec": None, "num_classes": None, "preprocessing": None}
        return network.eval()
    family = family_of(network)
    if any(name.endswith(".bias") for name in shapes):
        options.setdefault("bias", "keep")
    chosen = _options(layout, family.name, class_count(shapes), options)
    preprocessing = detect(network, family.preprocessing, family.input_size(network))
    if preprocessing is None:
        raise ValueError(f"load_peer: expected arch= to be a network of {', '.join(_FAMILIES[layout])}, got {asked}")
    model = convert(network, chosen, preprocessing, source=source)
    if tower != isinstance(model, BcosifiedCLIP):
        expected = "an image tower, as the weights have an attention pooling" if tower else "a classifier"
        raise ValueError(f"load_peer: {origin}: expected arch= to be {expected}, got {asked}")
    _set_exponents(model, state, layout, origin)
    _drop_biases(model, state, layout)
    if tower:
        fit_pooling(model, state)
        for name, value in learnt.items():
            setattr(model, name, nn.Parameter(torch.empty_like(value, device="meta")))
        model.config |= {"peer_scales": list(learnt), "text": text_of(network)}
    names = _peer_names(model, layout)
    state |= learnt
    own = model.state_dict()
    problems = misfits({peer: own[name] for name, peer in names.items()}, state)
    if problems:
        expected = f"weights of {asked} in {layout}'s names"
        raise ValueError(f"load_peer: {origin}: expected {expected}, got others:\n{problems}")
    found = {name: _laid_out(state[peer]) for name, peer in names.items()}
    for name in absent(model):
        found[name] = torch.zeros(own[name].shape, dtype=own[name].dtype)
    load_state(model, found, origin, asked, assign=True)
    model.config["peer_layout"] = layout
    if tower and isinstance(arch, nn.Module) and callable(getattr(arch, "encode_text", None)):
        model.attach_text(arch)
    return model.eval()


def _check_layout(name: str, layout: str | None, optional: bool = False) -> None:
    if layout not in (*LAYOUTS, *([None] if optional else [])):
        raise ValueError(f"{name}: expected layout to be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")


# --- names ----------------------------------------------------------------------------------------------------------


def _canonical(checkpoint: Any, origin: str, layout: str | None, ema: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by their names without any prefix, as copies of their own, and the layout."""
    content = checkpoint
    if isinstance(checkpoint, (str, os.PathLike)):
        try:
            content = read_file(checkpoint)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"load_peer: {error}") from None
    elif not isinstance(checkpoint, Mapping):
        raise TypeError(f"load_peer: expected a file or tensors by name, got {type(checkpoint).__name__}")
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = tensors_of(content, f"load_peer: {origin}")
    # Beside the image tower, CLIP's network may have these two.
    scales = {name.rpartition(".")[2]: value for name, value in state.items() if is_scale(name, ema)}
    state = {name: value for name, value in state.items() if not any(is_scale(name, e) for e in (True, False))}
    averaged = {name: value for name, value in state.items() if name.startswith("ema.module.")}
    if ema and not averaged:
        raise ValueError(f"load_peer: {origin}: expected averaged weights (ema.module.*) with ema=True, got none")
    # Beside the network, Lightning's module has losses and metrics.
    inside = sum(name.startswith("model.") for name in state)
    lightning = lightning or bool(averaged) or 0 < inside < len(state)
    if ema:
        state = {name.removeprefix("ema.module."): value for name, value in averaged.items()}
    elif lightning:
        kept = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        state = kept or state
    prefixes = 0
    while True:
        prefix = next((p for p in ("module.", "_orig_mod.", "model.") if all(n.startswith(p) for n in state)), None)
        if prefix is None:
            break
        prefixes += prefix == "model."
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if layout is None:
        layout = _layout_of(state, prefixes, lightning)
    if layout == "bcos" and all(name.startswith("0.") for name in state):
        state = {name.removeprefix("0."): value for name, value in state.items()}
    state |= scales
    # Nothing is shared with a mapping that the caller gave.
    given = not isinstance(checkpoint, (str, os.PathLike))
    return {name: value.detach().clone() if given else value for name, value in state.items()}, layout


def _layout_of(state: Mapping[str, Tensor], prefixes: int, lightning: bool) -> str:
    """B-cosification wraps its network as "model"; Lightning's own prefix is off already where it was seen."""
    if is_tower(state):
        return "b-cosification"
    if all(name.startswith("0.") for name in state):
        return "bcos"
    if "features.0.linear.weight" in state and any(".denselayer1." in name for name in state):
        return "b-cosification"
    if prefixes != 1 or lightning:
        return "b-cosification" if prefixes else "bcos"
    means = [value for name, value in state.items() if name.endswith(".running_mean")]
    return "b-cosification" if not means or any(bool(value.any()) for value in means) else "bcos"


def _peer_names(model: BcosifiedModel, layout: str) -> dict[str, str]:
    """Name in ``model.state_dict()`` -> the peer's, without prefixes; without the text tower, which the peer keeps out
    of its checkpoints, and what a peer's tower does not have."""
    numbered = layout == "b-cosification" and model.config["family"] != "simple_vit"
    names = {name: name for name in model.config.get("peer_scales", ())}
    missing = absent(model)
    for name in model.state_dict():
        if not name.startswith("model.") or name in missing:
            continue
        path, _, leaf = name.removeprefix("model.").rpartition(".")
        module: nn.Module = model.model
        parts = []
        for part in path.split(".") if path else []:
            # B-cosification makes Sequentials anew from their children, whose names are lost.
            number = numbered and isinstance(module, nn.Sequential)
            parts.append(str(list(module._modules).index(part)) if number else part)
            module = module._modules[part]
        holder = ["linear"] if isinstance(module, (bnn.BcosConv2d, bnn.BcosLinear)) and leaf != "b" else []
        names[name] = ".".join([*parts, *holder, leaf])
    return names


# --- the model ------------------------------------------------------------------------------------------------------


def _network(arch: str | nn.Module | None, shapes: Mapping[str, tuple[int, ...]], origin: str) -> tuple[nn.Module, str]:
    """The standard network on "meta", and what to call it in errors."""
    if isinstance(arch, nn.Module):
        check_convertible(arch)
        arch = family_of(arch).tower(arch)
        return copy.deepcopy(arch).to("meta"), type(arch).__name__
    with torch.device("meta"):
        if arch is None:
            network = guess(shapes)
            if network is None:
                known = TOWERS if is_tower(shapes) else ARCHITECTURES
                raise ValueError(
                    f"load_peer: {origin}: expected weights of one of {', '.join(known)} or of their kinds, "
                    f"got {shortened(sorted(shapes))}; arch= takes the standard network of another"
                )
            return network, type(network).__name__
        if not isinstance(arch, str):
            raise TypeError(f"load_peer: expected arch to be a name or a network, got {type(arch).__name__}")
        known = {**ARCHITECTURES, **TOWERS}
        if arch not in known:
            raise ValueError(f"load_peer: expected arch to be one of {', '.join(known)}, got {arch!r}")
        return known[arch](output_count(shapes) or 1000), arch


def _head(layout: str, family: str) -> str:
    """Where the peer has the classifier: of all networks only B-cos v2's SimpleViTs average first."""
    return "keep" if layout == "bcos" and family == "simple_vit" else "before_pool"


def _options(layout: str, family: str, classes: int | None, given: dict[str, Any]) -> Options:
    """The options under which ``bcosify`` makes the network that the peer's code makes."""
    defaults = {**vars(Options()), **_OPTIONS[layout], "head": _head(layout, family)}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise TypeError(f"load_peer: expected options of bcosify ({', '.join(defaults)}), got {', '.join(unknown)}")
    chosen = {**defaults, **given}
    if chosen["logit_bias"] == "auto" and classes is not None and classes > 1:
        # B-cosification's code has the number of ImageNet's classes whatever the head has.
        bias = -math.log((1000 if layout == "b-cosification" else classes) - 1)
        chosen["logit_bias"] = "auto" if auto_logit_bias(chosen["bias"], classes) == bias else bias
    try:
        return check_options(**chosen)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("bcosify:", "load_peer:", 1)) from None


def _set_exponents(model: BcosifiedModel, state: Mapping[str, Tensor], layout: str, origin: str) -> None:
    """Learnable exponents, which B-cosification's layers may have, where the checkpoint has one."""
    paths = {peer.removesuffix(".linear.weight"): name for name, peer in _peer_names(model, layout).items()}
    for name, value in state.items():
        path = name.removesuffix(".b")
        if path == name or path not in paths:
            continue
        if not bool((value >= 1).all()):
            raise ValueError(
                f"load_peer: {origin}: expected exponents >= 1, got {name} = {float(value):.4g}; those of networks "
                "trained with decayed exponents (b_loss) are stored less 2: add it first"
            )
        layer = model.get_submodule(paths[path].removesuffix(".weight"))
        layer.set_b(nn.Parameter(torch.empty((), device="meta", dtype=value.dtype)))


def _drop_biases(model: BcosifiedModel, state: Mapping[str, Tensor], layout: str) -> None:
    """The biases of all norms, or of all B-cos layers, where the peer's network has none of them but has others."""
    groups: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for name, peer in _peer_names(model, layout).items():
        if name.endswith(".bias"):
            groups[peer.endswith(".linear.bias")][name] = peer
    dropped = []
    for group in groups.values():
        if any(peer in state for peer in group.values()):
            continue
        for name in group:
            model.get_submodule(name.removesuffix(".bias"))._parameters["bias"] = None
            dropped.append(name)
    if dropped:
        model.config["without_bias"] = dropped


def _laid_out(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def export_peer(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """The weights of a model under the names of a peer, for its code to load.

        peer = bcos.models.resnet.resnet50(norm_layer=NoBias(BatchNormUncentered2d))
        peer.load_state_dict(export_peer(model, "bcos"))

    Args:
        model: a BcosifiedModel that computes what the peer's network does: of ``load_peer``, or of ``bcosify`` with the
            options that it takes (for B-cosification the defaults).
        layout: "bcos" for B-cos v2's networks (SimpleViTs in their Sequential), "b-cosification" for the
            BcosifyNetwork of B-cosification's code. Lightning's checkpoints have "model." before these names. Of a
            BcosifiedCLIP the image tower is written.

    Returns:
        name -> contiguous tensor. Exponents are not in it unless they are learnable, and neither is the logit bias.

    Raises:
        TypeError: no BcosifiedModel. ValueError: an unknown layout, or a model with options under which the peer's
            network computes something else. NotImplementedError: a family that the peer has no network of.

    Example:
        >>> torch.save(bcosification.export_peer(model, "b-cosification"), "resnet18.pth")
    """
    _check_layout("export_peer", layout)
    model = bare_model(model) if isinstance(model, nn.Module) else model
    if not isinstance(model, BcosifiedModel):
        raise TypeError(f"export_peer: expected a model made by bcosify or load_peer, got {type(model).__name__}")
    family, options = model.config["family"], model.config["options"]
    if family not in _FAMILIES[layout]:
        raise NotImplementedError(
            f"export_peer: expected a network that {layout} has, of {', '.join(_FAMILIES[layout])}, got {family}"
        )
    expected = {**_OPTIONS[layout], "inverse": True, "head": _head(layout, family)}
    if family == _TOWER:  # without a head, and without max pooling
        expected = {name: value for name, value in expected.items() if name not in ("head", "pool")}
    other = [f"{name}={options[name]!r}, not {value!r}" for name, value in expected.items() if options[name] != value]
    if other:
        raise ValueError(
            f"export_peer: expected a model that computes what {layout}'s network does, got one with {'; '.join(other)}"
        )
    prefix = "model." if layout == "b-cosification" else "0." if family == "simple_vit" else ""
    state = model.state_dict()
    return {
        peer if peer in SCALES else f"{prefix}{peer}": state[name].detach().contiguous()
        for name, peer in _peer_names(model, layout).items()
    }
