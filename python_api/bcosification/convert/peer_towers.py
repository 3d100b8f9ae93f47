"""B-cosification's CLIP checkpoints: what is peculiar to image towers among the peers' files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bcosification.convert.clip import BcosifiedCLIP
from bcosification.convert.families import family_of
from bcosification.convert.peer_architectures import TOWERS
from bcosification.convert.wrapper import BcosifiedModel
from bcosification.weights_files import shortened

__all__ = ["SCALES", "TEXT_MODEL", "absent", "check_tower", "fit_pooling", "is_scale", "text_of"]

TEXT_MODEL = "open_clip:RN50/openai"
"""What B-cosification's code starts from, distils from and takes texts' embeddings from."""

SCALES = ("logit_scale", "logit_bias")


def is_scale(name: str, ema: bool) -> bool:
    """Whether this is what the cosines of CLIP are scaled and shifted by: nothing but wrappers are before its name."""
    *wrappers, leaf = name.split(".")
    known = {"model", "module", "_orig_mod", "ema"}
    return leaf in SCALES and set(wrappers) <= known and ("ema" in wrappers) == ema


def check_tower(state: dict[str, Tensor], layout: str, origin: str) -> None:
    """Take out what the peer's attention pooling has but does not read; refuse what no peer's tower is."""
    if layout != "b-cosification":
        raise ValueError(
            f"load_peer: {origin}: expected layout 'b-cosification' for a CLIP tower (attnpool.*), which B-cos v2 has "
            f"none of, got {layout!r}"
        )
    if "attnpool.c_proj.linear.weight" not in state and "attnpool.c_proj.weight" in state:
        raise ValueError(
            f"load_peer: {origin}: expected B-cos layers, whose weights are named *.linear.weight, got a standard CLIP "
            "tower's; bcosification.resolve reads those"
        )
    state.pop("attnpool.positional_embedding", None)
    biases = [name for name in state if name.startswith("attnpool.") and name.endswith(".bias")]
    for name in biases:
        del state[name]
    if biases:
        warnings.warn(
            f"load_peer: {origin}: left out {shortened(biases)}, which the attention pooling does not read with "
            "'pool'; with 'unpool' the peer adds those of v and c",
            stacklevel=3,
        )


def text_of(network: nn.Module) -> dict[str, Any] | None:
    """What is known of the texts that a tower's embeddings are compared with: B-cosification's code has one model."""
    architecture = family_of(network).architecture
    with torch.device("meta"):
        if architecture(network) != architecture(TOWERS["RN50"](1024)):
            return None
    told = {"model": TEXT_MODEL, "class": "open_clip.model.CLIP", "architecture": None, "stored": False}
    return {**told, "context_length": 77, "vocab_size": 49408}


def fit_pooling(model: BcosifiedCLIP, state: Mapping[str, Tensor]) -> None:
    """A tower that was trained with "unpool" alone, whose pooling has no q and k, stays in that mode."""
    if not any(name.startswith(("attnpool.q_proj.", "attnpool.k_proj.")) for name in state):
        model.config["attention_pool"]["only"] = "unpool"
        model.set_attention_pool("unpool")


def absent(model: BcosifiedModel) -> tuple[str, ...]:
    """Parameters of ours that the peer's tower does not have."""
    if (model.config.get("attention_pool") or {}).get("only") != "unpool":
        return ()
    return ("model.attnpool.q_proj.weight", "model.attnpool.k_proj.weight")
