"""The weights that the papers' authors publish: a table (published.json), the download, the model."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import nn

from bcosification.convert.peer_architectures import TOWERS
from bcosification.convert.peer_checkpoints import load_peer
from bcosification.convert.preprocessing import ImageTransform, Preprocessing, imagenet, openai
from bcosification.convert.wrapper import BcosifiedModel

__all__ = ["list_pretrained", "pretrained", "published_file"]

_TABLE = Path(__file__).with_suffix(".json")


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(_TABLE.read_text())


def list_pretrained() -> dict[str, dict[str, Any]]:
    """Name -> what is known of the published file, for every name that `pretrained` takes.

    Keys of an entry: "url" and "sha256" (the first digits of the hash), None where they are not known here; "arch",
    "layout"; "resize" and "crop", pixels; "top1" and "top5", the authors' own figures for ImageNet in percent or None;
    "page", where the file is published; "license".
    """
    table = _table()
    entries = {}
    for name, entry in table["files"].items():
        source = table["sources"][name.partition("/")[0]]
        page = source["clip_page"] if "_clip_" in name else source["page"]
        entries[name] = {**entry, "crop": 224, "layout": source["layout"], "page": page, "license": source["license"]}
    return entries


def pretrained(name: str, *, progress: bool = True) -> nn.Module:
    """A model with the weights that its authors published, downloaded once.

    Files go to torch.hub's cache (``torch.hub.get_dir()/checkpoints``), where the package bcos keeps the same ones.
    Their SHA-256 is compared with what is known of it at every call, and nothing in them is executed.

    Args:
        name: "bcos/NAME" of B-cos v2, with the names of the package bcos ("bcos/resnet50_long", "bcos/convnext_tiny",
            "bcos/standard_vitc_s_patch1_14", …); `list_pretrained` has all. B-cosification's files
            ("b-cosification/…") have to be downloaded by hand, from the page that the error names; ``load_peer`` reads
            them.
        progress: show the download's progress on stderr (default).

    Returns:
        What ``load_peer`` returns, in eval mode on the CPU, with ``.transform``: PIL image -> tensor (3, H, W) as the
        model takes it (in [0, 1]; for the standard networks, bcos/standard_*, normalised).

    Raises:
        ValueError: an unknown name (near ones are listed), a file of another hash. RuntimeError: no download, or no
            known address (both say how to go on).

    The weights are derived from ImageNet, whose terms allow non-commercial use only: "license" in `list_pretrained`.

    Example:
        >>> model = bcosification.pretrained("bcos/resnet50")
        >>> explanation = bcosification.explain(model, model.transform(image).unsqueeze(0))
    """
    entry = _entry(name)
    path = published_file(name, progress=progress)
    model = load_peer(path, arch=entry["arch"], layout=entry["layout"])
    known = openai if entry["arch"] in TOWERS else imagenet
    found = replace(known((entry["crop"],) * 2), resize=entry["resize"], origin=f"as {name} was evaluated")
    if isinstance(model, BcosifiedModel):
        model.config |= {**found.to_dict(), "source_weights": entry["url"], "published_name": name}
    else:
        model.transform = ImageTransform(found, normalize=True)
        model.bcosification_source = _source(entry, found)
    return model


def _source(entry: dict[str, Any], preprocessing: Preprocessing) -> dict[str, Any]:
    """What ``bcosify`` keeps of a standard network: by what name ``load`` builds it again."""
    return {
        "spec": f"bcosification:{entry['arch']}",
        "num_classes": None,
        "weights": entry["url"],
        "preprocessing": preprocessing.to_dict(),
    }


def _entry(name: str) -> dict[str, Any]:
    known = list_pretrained()
    if name not in known:
        near = [other for other in known if other.endswith(f"/{name}")]
        near = near or difflib.get_close_matches(str(name), known, n=5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"pretrained: expected a name of list_pretrained(), got {name!r}{hint}")
    return known[name]


def published_file(name: str, *, progress: bool = True) -> Path:
    """The published file of a name in torch.hub's cache, downloaded if it is not there, its hash checked.

    Raises as `pretrained`.
    """
    entry = _entry(name)
    if entry["url"] is None:
        raise RuntimeError(
            f"pretrained: {name}: expected the address of its file, which is not known to this package: download it "
            f"from {entry['page']} and read it with bcosification.load_peer(FILE, arch={entry['arch']!r}, "
            f"layout={entry['layout']!r})"
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / os.path.basename(urlparse(entry["url"]).path)
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(entry["url"], str(path), entry["sha256"], progress=progress)
        except (URLError, OSError) as error:
            raise RuntimeError(
                f"pretrained: {name}: expected to download {entry['url']}, got {type(error).__name__}: {error}; a copy "
                f"put at {path} is taken as well"
            ) from None
        except RuntimeError as error:  # torch.hub's word for another hash; it has removed the file
            raise ValueError(f"pretrained: {name}: {entry['url']}: {error}, so the file was not kept") from None
    elif entry["sha256"] is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(entry["sha256"]):
            raise ValueError(
                f"pretrained: {name}: expected {path} to have a SHA-256 that begins with {entry['sha256']}, got "
                f"{digest}: delete it to download it again"
            )
    return path
