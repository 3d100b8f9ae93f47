"""Files of weights, and copying them into models. Nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcosification.names import shortened

__all__ = ["load_state", "misfits", "read_file", "read_weights", "safetensors_library", "shortened", "tensors_of"]


def safetensors_library() -> Any:
    """The package safetensors; RuntimeError with the pip line where it is missing."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise RuntimeError(f"checkpoints: need safetensors ({error}): pip install 'bcos-kernels[train]'") from None
    return safetensors


def read_file(path: str | os.PathLike) -> Any:
    """What a weights file holds: safetensors, or tensors and plain values in a file of ``torch.save``.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file (which, is told), a pickle that needs more
            than tensors and plain values (what, is told), or a truncated file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a weights file, found none at {str(path)!r}")
    with open(path, "rb") as file:
        head = file.read(200)
    if path.suffix == ".safetensors" or _begins_as_safetensors(head):
        library = safetensors_library()
        try:
            return library.torch.load_file(str(path))
        except (library.SafetensorError, ValueError, RuntimeError, OSError) as error:
            _refuse_other_kinds(path, head)
            raise ValueError(f"{path}: expected a safetensors file, got one that cannot be read: {error}") from None
    try:
        with warnings.catch_warnings():  # of protocols, and how to have them supported; what cannot be read is refused
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text goes on to tell how to switch the check off
        _refuse_other_kinds(path, head)
        raise ValueError(
            f"{path}: expected a file of tensors (safetensors, or torch.save(model.state_dict())), got another format "
            f"or a pickle with other objects (a whole model){_what_it_needs(path)}, which could run code when it is "
            "read, so it is refused"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        _refuse_other_kinds(path, head)
        raise ValueError(f"{path}: expected a file of tensors, got one that cannot be read: {error}") from None


def _begins_as_safetensors(head: bytes) -> bool:
    """Its first 8 bytes are the length of a JSON object, which follows."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raises ValueError if a file that could not be read is, by how it begins, something else than weights."""
    if not head:
        kind = "an empty file"
    elif head.startswith(b"version https://git-lfs"):
        kind = "a pointer of Git LFS, whose file was not fetched (git lfs pull)"
    elif head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        kind = "a web page"
    elif head.startswith(b"\x89HDF"):
        kind = "an HDF5 file"
    elif head.startswith((b"\x93NUMPY", b"\x1f\x8b", b"7z\xbc\xaf", b"\xfd7zXZ")):
        kind = "a NumPy array" if head[1:6] == b"NUMPY" else "a compressed archive"
    else:
        text = head.decode("utf-8", errors="ignore")
        if len(text.encode()) < len(head) - 3 or not all(c.isprintable() or c in "\t\r\n" for c in text):
            return
        kind = f"a text file, which begins {(text.split(chr(10))[0].strip() or text.strip())[:40]!r}"
    raise ValueError(
        f"{path}: expected a file of tensors (safetensors, or torch.save(model.state_dict()): .safetensors, .pt, .pth, "
        f".ckpt, .bin), got {kind}"
    )


def _what_it_needs(path: Path) -> str:
    """The classes and functions that a pickle asks for, read without calling any of them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file of torch.save: there is nothing to list
        return ""
    return f" ({shortened(sorted(names))})" if names else ""


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a weights file, by name. Nothing in the file is executed.

    Takes safetensors, and files of ``torch.save`` that hold tensors only; a "state_dict" or "model" entry is unpacked.

    Raises:
        FileNotFoundError: no such file. ValueError: a pickle with other objects than tensors, a truncated file, or one
            without tensors.
    """
    content = read_file(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return tensors_of(content, str(path))


def tensors_of(content: Any, origin: str) -> dict[str, Tensor]:
    """The entries of a mapping that are tensors; ValueError, naming ``origin``, if there are none."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{origin}: expected tensors by name, got {type(content).__name__}")
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{origin}: expected tensors by name, got {len(content)} entries without a tensor")
    return state


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    origin: str,
    asked: str | None = None,
    *,
    kind: str | None = None,
    assign: bool = False,
) -> None:
    """Put ``state`` into ``model``, all of it: copied, or with ``assign`` as the very tensors (models on "meta").

    ``origin``, ``asked`` and ``kind`` (default: the class of ``model``) name the file, the architecture and its class
    in errors.

    Raises:
        ValueError: naming what is missing, left over or of another shape; ``model`` may then be filled in part.
    """
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        kind = kind or type(model).__name__
        expected = kind if asked is None else f"{asked} ({kind})"
        raise ValueError(
            f"{origin}: expected weights of {expected}, got another architecture's:\n"
            + (misfits(model.state_dict(), state) or f"  {error}")
        ) from None


def misfits(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """A line each for the names that are missing, left over, and of another shape; "" where all fits."""
    shapes = [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(got[name].shape)}"
        for name in sorted(set(expected) & set(got))
        if expected[name].shape != got[name].shape
    ]
    problems = [
        ("missing", sorted(set(expected) - set(got))),
        ("unexpected", sorted(set(got) - set(expected))),
        ("other shape", shapes),
    ]
    return "\n".join(f"  {label} ({len(names)}): {shortened(names)}" for label, names in problems if names)
