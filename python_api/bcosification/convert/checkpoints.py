"""Checkpoints: a folder with model.safetensors and config.json, and weights files of others, never a pickle."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.conversion import FORMAT, check_convertible, convert
from bcosification.convert.families import FAMILIES, family_of
from bcosification.convert.preprocessing import Preprocessing
from bcosification.convert.rules import Options
from bcosification.convert.wrapper import BcosifiedModel, reset_head
from bcosification.folders import best_of_run
from bcosification.json_files import json_text
from bcosification.weights_files import load_state, read_weights, safetensors_library, shortened

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"


def require_writable(folder: str | os.PathLike, what: str = "output folder") -> Path:
    """Make sure that files can be written into ``folder`` (made if missing), before any work is done for them.

    Raises:
        OSError: naming the folder, what was expected, and what the system says.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"expected the {what} to be a folder that can be written to: {error.strerror}", str(folder)
        ) from None
    return folder


def save_pretrained(model: BcosifiedModel, folder: str | os.PathLike, *, card: str | None = None) -> None:
    """Write ``model`` into ``folder`` as model.safetensors (weights) and config.json (everything else).

    All are written in full under other names first, then renamed: a reader never sees half a file.

    Args:
        model: what ``bcosify`` or ``load`` returned, fine-tuned or not.
        folder: made if missing.
        card: text of a README.md, written unless there is one; default: none.

    Raises:
        TypeError: not a B-cosified model. OSError: the folder cannot be written to (nothing has been written then).
    """
    if not isinstance(model, BcosifiedModel):
        raise TypeError(f"save_pretrained: expected a model made by bcosify, got {type(model).__name__}")
    save_file = safetensors_library().torch.save_file
    folder = require_writable(folder)
    config = {**model.config, "options": dict(model.config["options"])}
    exponents = fixed_exponents(model)
    if len(set(exponents.values())) == 1:
        config["options"]["b"] = next(iter(exponents.values()))
    elif exponents:
        config["layer_b"] = exponents
    parameter = next(model.parameters(), None)
    if parameter is not None:
        config["dtype"] = str(parameter.dtype).removeprefix("torch.")
    texts = {CONFIG_NAME: json_text(config, indent=2)}
    if card is not None and not (folder / CARD_NAME).exists():
        texts[CARD_NAME] = card
    state: dict[str, Tensor] = {}
    storages = set()
    for name, value in model.saved_state().items():
        value = value.detach().contiguous()
        # A layer in two places has its tensors here twice; safetensors refuses shared memory.
        state[name] = value.clone() if value.data_ptr() in storages else value
        storages.add(value.data_ptr())
    made: list[Path] = []
    try:
        for name in (WEIGHTS_NAME, *texts):
            handle, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            made.append(Path(path))
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                if name in texts:
                    file.write(texts[name])
                    file.flush()
                    os.fsync(file.fileno())
        save_file(state, str(made[0]), metadata={"format": "pt", "library": "bcosification"})
        mode = 0o666 & ~_umask()
        for path, name in zip(made, (WEIGHTS_NAME, *texts), strict=True):
            path.chmod(mode)
            os.replace(path, folder / name)
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def fixed_exponents(model: nn.Module) -> dict[str, float]:
    """Layer name -> exponent B of every B-cos layer whose B is no parameter (those are in state_dict)."""
    return {
        name: float(module.b)
        for name, module in model.named_modules()
        if isinstance(module, (bnn.BcosConv2d, bnn.BcosLinear)) and not isinstance(module.b, nn.Parameter)
    }


def load(folder: str | os.PathLike, model: nn.Module | None = None) -> BcosifiedModel:
    """Read a B-cosified model that ``save_pretrained`` wrote.

    Args:
        folder: with model.safetensors and config.json; that of a run of ``finetune`` or ``distill`` stands for its
            best epoch.
        model: needed only where config.json does not tell how to build the network (own classes): the *standard*
            network of the same architecture, whatever its weights; it is not changed. A whole open_clip model also
            gives its text tower where that was not stored.

    Returns:
        The model as it was saved, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: no such folder or files. ValueError: not a config of ours, a network that cannot be built
            without ``model=``, or weights of another architecture (missing, unexpected and misshapen ones are named).

    Example:
        >>> model.save_pretrained("resnet18-bcos")
        >>> model = bcosification.load("resnet18-bcos")
    """
    folder, own = best_of_run(folder), model
    config = read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f" ({', '.join(pickled)} may hold pickled objects and is not read)" if pickled else ""
        raise FileNotFoundError(f"load: expected {WEIGHTS_NAME} in {folder}, found none{hint}")
    state = read_weights(weights)
    try:
        options = Options(**{**config["options"], "logit_bias": config["logit_bias"]})
        preprocessing = None if "max_tokens" in config else Preprocessing.from_dict(config)  # None: it reads text
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: expected {folder / CONFIG_NAME} as save_pretrained writes it, got {error!r}") from None
    whole = model if model is not None else standard_network(config, folder)
    check_convertible(whole)
    model = family_of(whole).tower(whole)
    dtype = getattr(torch, config.get("dtype", "float32"))
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        model = copy.deepcopy(model).to(dtype)
    converted = convert(model, options, preprocessing, source=_source(config), warn=False)
    if config["num_classes"] is not None and converted.num_classes != config["num_classes"]:
        reset_head(converted, config["num_classes"])
    converted.prepare_for(config, state)
    for name, value in config.get("layer_b", {}).items():
        converted.get_submodule(name).set_b(value)
    for name in config.get("without_bias", []):
        converted.get_submodule(name.removesuffix(".bias"))._parameters["bias"] = None
    for name, value in state.items():
        if name.endswith(".b"):
            converted.get_submodule(name.removesuffix(".b")).set_b(nn.Parameter(value.clone()))
    load_state(converted, state, str(weights), kind=type(converted.model).__name__)
    config.pop("layer_b", None)
    converted.config = config
    if model is not whole and own is not None and converted.text is None:
        converted.attach_text(whole)
    converted.loaded_from(folder)
    return converted.eval()


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json of a folder that ``save_pretrained`` wrote, checked."""
    path = Path(folder) / CONFIG_NAME
    if not Path(folder).is_dir():
        got = "which is a file" if Path(folder).exists() else "where nothing is"
        raise FileNotFoundError(f"load: expected a folder written by save_pretrained, got {str(folder)!r}, {got}")
    if not path.is_file():
        raise FileNotFoundError(
            f"load: expected {CONFIG_NAME} in {folder} (save_pretrained, bcosify convert and bcosify finetune write "
            f"it), found {_listing(Path(folder))}"
        )
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: expected {path} to be JSON, got {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        theirs = isinstance(config, dict) and "model_type" in config
        hint = f", of a Hugging Face model: bcosify it as transformers:{folder}" if theirs else ""
        raise ValueError(f"load: expected {path} with format {FORMAT}, got {got!r}{hint}")
    return config


def _listing(folder: Path) -> str:
    """What lies in a folder, in words; folders in it that can be loaded are pointed out."""
    loadable = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG_NAME}"))
    if loadable:
        return f"none there, but in {', '.join(loadable)}"
    names = sorted(path.name for path in folder.iterdir())
    return f"only {shortened(names)}" if names else "an empty folder"


def _source(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "spec": config.get("source"),
        "num_classes": config.get("source_num_classes"),
        "weights": config.get("source_weights"),
    }


def standard_network(config: dict[str, Any], folder: str | os.PathLike) -> nn.Module:
    """The standard network that the config.json of ``folder`` describes, with random weights."""
    family = next((family for family in FAMILIES.values() if family.name == config.get("family")), None)
    if family is not None and config.get("architecture"):
        return family.build(config["architecture"])
    if config.get("source"):
        from bcosification.convert.resolver import resolve

        model, _ = resolve(config["source"], pretrained=False, num_classes=_source(config)["num_classes"])
        return family_of(model).tower(model)
    raise ValueError(
        f"load: {folder} holds a {config.get('class')}, which cannot be built from its config: "
        "expected model=, the standard network of that class, got None"
    )
