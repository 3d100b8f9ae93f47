"""One resolver of model names, for the commands and for ``load``.

torchvision:NAME, NAME      torchvision's classification models
timm:NAME                   timm
bcosification:NAME, NAME    SimpleViT and ViT_c of bcosification.models, with B-cos v2's standard weights
open_clip:NAME/TAG          open_clip, weights TAG
transformers:NAME           Hugging Face's sequence classifiers, and CLIP's image towers: a repository's name, or a
                            folder of save_pretrained
FOLDER                      written by save_pretrained: a B-cosified model
FILE (with arch=SPEC)       weights of a standard model
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torch import Tensor, nn

from bcosification.convert.checkpoints import CONFIG_NAME, load
from bcosification.convert.families import family_of
from bcosification.convert.hub import check_hub
from bcosification.convert.hugging_face import read_transformers
from bcosification.convert.preprocessing import detect, from_torchvision
from bcosification.convert.published import list_pretrained
from bcosification.convert.published import pretrained as published_network
from bcosification.convert.wrapper import BcosifiedModel, reset_head
from bcosification.models import CONSTRUCTORS
from bcosification.names import did_you_mean, meant
from bcosification.weights_files import load_state, read_weights, shortened

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def resolve(
    spec: str,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | None = None,
    model: nn.Module | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a name, folder or file stands for.

    Args:
        spec: see the module's docstring.
        arch: the name of the architecture, when ``spec`` is a weights file.
        num_classes: outputs of the head; another number than the weights have gives a new head with random weights.
        pretrained: False gives random weights (names only).
        weights: which weights: an entry of torchvision's enum ("IMAGENET1K_V1"), or a weights file.
        model: a network of an own class, for folders and files that cannot name theirs; it is not changed.

    Returns:
        The model in eval mode, and what it is: a dict with "spec", "library", "name", "weights" (None: random),
        "num_classes", "converted" (whether it is a B-cosified one) and "preprocessing" (mean, std, input_size, resize,
        crop, interpolation; None when unknown).

    Raises:
        ValueError: an unknown name (near ones are listed), arguments that do not fit the kind of spec, weights of
            another architecture. FileNotFoundError: no such file or folder. RuntimeError: a library that is not
            installed, weights that cannot be downloaded.

    Example:
        >>> network, info = resolve("torchvision:resnet18", num_classes=10)
    """
    if not isinstance(spec, str) or not spec:
        raise TypeError(f"resolve: expected a name, folder or file, got {spec!r}")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise ValueError(f"resolve: expected num_classes to be an int >= 1, got {num_classes!r}")
    path = Path(spec).expanduser()
    library, separator, name = spec.partition(":")
    if library == "transformers" and Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().absolute())  # config.json keeps it, and may be read from elsewhere
    if separator and library in LIBRARIES:
        kind = "name"
    elif path.is_dir() and ((path / CONFIG_NAME).is_file() or _looks_like_path(spec)):
        kind = "folder"
    elif path.is_file() or _looks_like_path(spec):
        kind = "file"
    elif separator:
        raise _unknown_prefix(library, spec)
    else:
        kind, library, name = "name", "bcosification" if spec in CONSTRUCTORS else "torchvision", spec
    if kind == "folder":
        return _from_folder(path, num_classes, model, {"arch": arch, "weights": weights})
    if kind == "file":
        if not path.exists():
            raise FileNotFoundError(f"resolve: expected a folder or file, found none at {spec!r}{_no_path(spec)}")
        return _from_file(path, arch, num_classes, model)
    if not separator and path.is_dir() and not _is_torchvision(spec):
        return _from_folder(path, num_classes, model, {})  # which says what it lacks
    if arch is not None:
        raise ValueError(f"resolve: expected arch= with a weights file only, got {spec!r} and arch={arch!r}")
    if model is not None:
        raise ValueError(f"resolve: expected model= with a folder or file only, got {spec!r}")
    if weights is not None and (Path(weights).expanduser().is_file() or _looks_like_path(weights)):
        return _from_file(Path(weights).expanduser(), spec, num_classes, None)
    network, info = LIBRARIES[library](name, num_classes, pretrained, weights)
    return _described(network, f"{library}:{name}", info, num_classes)


def _looks_like_path(text: str) -> bool:
    if text.partition(":")[0] in LIBRARIES:
        return False
    return text.endswith(SUFFIXES) or text.startswith("~") or "/" in text


def _is_torchvision(name: str) -> bool:
    try:
        from torchvision import models
    except ImportError:
        return False
    return name in models.list_models(module=models)


def _described(
    network: nn.Module, spec: str, info: dict[str, Any], num_classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    family = family_of(network)
    preprocessing = info.pop("preprocessing", None) or detect(network, family.preprocessing, family.input_size(network))
    head = _head(network)
    info = {
        "spec": spec,
        **info,
        "num_classes": None if head is None else _outputs(head),
        "converted": False,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
    }
    # bcosify reads this: which weights' preprocessing it is, and by what name ``load`` builds the network again.
    network.bcosification_source = {
        "spec": spec if spec.partition(":")[0] in LIBRARIES else None,
        "num_classes": num_classes,
        "weights": info["weights"],
        "preprocessing": info["preprocessing"],
    }
    return network.eval(), info


def _head(network: nn.Module) -> nn.Linear | nn.Conv2d | None:
    name = family_of(network).head(network)
    head = None if name is None else network.get_submodule(name)
    return head if isinstance(head, (nn.Linear, nn.Conv2d)) else None


def _outputs(head: nn.Linear | nn.Conv2d) -> int:
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels


def _new_head(network: nn.Module, num_classes: int, what: str) -> None:
    name = family_of(network).head(network)
    head = _head(network)
    if head is None:
        raise ValueError(f"resolve: {what}: expected a linear classifier to give num_classes={num_classes}, found none")
    if _outputs(head) == num_classes:
        return
    for place in (name, *family_of(network).other_heads(network)):
        old = network.get_submodule(place)
        if isinstance(old, nn.Linear):
            fresh: nn.Module = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        else:
            fresh = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None)
        network.set_submodule(place, fresh.to(old.weight))


def _unknown(library: str, name: str, known: Iterable[str]) -> ValueError:
    article = "an" if library[0] in "aeiou" else "a"
    error = f"resolve: expected the name of {article} {library} model ({_LISTS[library]} has them all), got {name!r}"
    if name == "small":
        return ValueError(f"{error}; small is the network of sweep's demo, and sweep's alone (try resnet18)")
    head, separator, rest = re.sub(r"^(\w+)\.models\.", r"\1.", name).partition(".")
    if separator and head in LIBRARIES:  # as in Python
        return ValueError(error + did_you_mean([f"{head}:{rest}"]))
    return ValueError(error + did_you_mean(specs_of(name) or meant(name, known)))


def _unknown_prefix(prefix: str, spec: str) -> ValueError:
    known = ", ".join(f"{library}:" for library in LIBRARIES)
    near = [f"{library}:{spec.partition(':')[2]}" for library in meant(prefix, LIBRARIES, most=1)]
    return ValueError(
        f"resolve: expected a name with a prefix among {known} (or none, which is torchvision:), got {spec!r} with "
        f"{prefix + ':'!r}{did_you_mean(near)}"
    )


def specs_of(name: str) -> list[str]:
    """The specs, library's prefix included, under which a model of this very name is found, in whichever library."""
    found = [f"{library}:{name}" for library, here in _NAMES.items() if here(name.partition(".")[0], name)]
    return [f"{spec}/TAG" if spec.startswith("open_clip:") and _lacks_tag(spec[10:]) else spec for spec in found]


def _lacks_tag(name: str) -> bool:
    """Whether a name of open_clip's needs the tag of its weights still: some architectures have none."""
    import open_clip

    return "/" not in name and bool(open_clip.list_pretrained_tags_by_model(name))


def _no_path(spec: str) -> str:
    """What may have been meant by what looks like a path and is none."""
    head, _, rest = spec.partition("/")
    if spec in list_pretrained():
        return f"; bcosification.pretrained({spec!r}) in Python gives the published model of that name"
    if not rest:
        return ""
    library = head.replace("-", "_").lower()
    library = {"openclip": "open_clip"}.get(library, library)
    if library in LIBRARIES:
        return did_you_mean([f"{library}:{rest}"])
    return did_you_mean([f"open_clip:{spec}"] if _NAMES["open_clip"](head, spec) else [])


def _needs(library: str, package: str, error: ImportError, extra: str = "train") -> RuntimeError:
    return RuntimeError(f"resolve: {library}: needs {package} ({error}): pip install 'bcos-kernels[{extra}]'")


def _undownloaded(spec: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"resolve: {spec}: expected to download its weights, got {type(error).__name__}: {error}; "
        "weights=FILE takes a file that is here, pretrained=False random weights"
    )


def _torchvision(
    name: str, num_classes: int | None, pretrained: bool, weights: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        from torchvision import models
    except ImportError as error:
        raise _needs("torchvision", "torchvision", error) from None
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    entries = models.get_model_weights(name)
    entry = None
    if weights is not None:
        try:
            entry = entries[weights.rpartition(".")[2]]
        except KeyError:
            choices = ", ".join(entries.__members__)
            raise ValueError(
                f"resolve: torchvision:{name}: expected weights to be a file or one of {choices}, got {weights!r}"
            ) from None
    elif pretrained:
        entry = entries.DEFAULT if "DEFAULT" in entries.__members__ else next(iter(entries))
    if entry is None:
        arguments = {} if num_classes is None else {"num_classes": num_classes}
        network = models.get_model(name, weights=None, **arguments)
        return network, {"library": "torchvision", "name": name, "weights": None}
    try:
        network = models.get_model(name, weights=entry)
    except (URLError, OSError, RuntimeError) as error:
        raise _undownloaded(f"torchvision:{name}", error) from None
    if num_classes is not None:
        _new_head(network, num_classes, f"torchvision:{name}")
    return network, {
        "library": "torchvision",
        "name": name,
        "weights": str(entry),
        "preprocessing": from_torchvision(entry.transforms(), str(entry)),
    }


def _timm(
    name: str, num_classes: int | None, pretrained: bool, weights: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import timm
    except ImportError as error:
        raise _needs("timm", "timm", error) from None
    if weights is not None:
        raise ValueError(f"resolve: timm:{name}: expected the weights' tag in the name (NAME.TAG), got {weights!r}")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    if pretrained:
        check_hub(_timm_repository(timm, name), f"resolve: timm:{name}")
    try:
        network = timm.create_model(name, pretrained=pretrained, **arguments)
    except (URLError, OSError) as error:
        raise _undownloaded(f"timm:{name}", error) from None
    except RuntimeError as error:
        if "pretrained" in str(error).lower():
            raise ValueError(f"resolve: timm:{name}: expected weights, or pretrained=False: {error}") from None
        raise
    return network, {"library": "timm", "name": name, "weights": name if pretrained else None}


def _timm_repository(timm: Any, name: str) -> str:
    """The repository of a model's weights on the Hugging Face Hub, "" where there is none."""
    try:
        told = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag: create_model tells
        return ""
    return (told and told.hf_hub_id) or ""


def _open_clip(
    name: str, num_classes: int | None, pretrained: bool, weights: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import open_clip
    except ImportError as error:
        raise _needs("open_clip", "open_clip_torch", error) from None
    if num_classes is not None or weights is not None:
        raise ValueError(
            f"resolve: open_clip:{name}: expected neither num_classes (it has no classifier) nor weights "
            f"(the tag is in the name), got {num_classes} and {weights!r}"
        )
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise _unknown("open_clip", architecture, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained and not tags:
        raise ValueError(
            f"resolve: open_clip:{name}: expected a model with pretrained weights, of which open_clip has none for "
            f"{architecture}; pretrained=False gives random ones"
        )
    if pretrained and tag not in tags:
        hint = did_you_mean(f"open_clip:{architecture}/{near}" for near in meant(tag, tags))
        raise ValueError(
            f"resolve: open_clip:{name}: expected {architecture}/TAG with TAG one of {shortened(tags)}, got {tag!r}"
            f"{hint}"
        )
    if pretrained:
        repository = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub") or ""
        check_hub("/".join(repository.split("/")[:2]), f"resolve: open_clip:{name}")
    if not pretrained:
        return _without_weights(open_clip, architecture), {"library": "open_clip", "name": name, "weights": None}
    try:
        network = open_clip.create_model(architecture, pretrained=tag)
    except (URLError, OSError, RuntimeError) as error:
        raise _undownloaded(f"open_clip:{name}", error) from None
    return network, {"library": "open_clip", "name": name, "weights": tag}


def _without_weights(open_clip: Any, architecture: str) -> nn.Module:
    """A model of random weights, without open_clip's warning that it has no others: they were asked for."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        return open_clip.create_model(architecture, pretrained=None)
    finally:
        logging.disable(disabled)


def _transformers(
    name: str, num_classes: int | None, pretrained: bool, weights: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise _needs("transformers", "transformers", error, "text") from None
    return read_transformers(name, num_classes, pretrained, weights)


def _own(
    name: str, num_classes: int | None, pretrained: bool, weights: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    if name not in CONSTRUCTORS:
        raise _unknown("bcosification", name, CONSTRUCTORS)
    if weights is not None:
        raise ValueError(f"resolve: bcosification:{name}: expected weights to be a file, got {weights!r}")
    if not pretrained:
        arguments = {} if num_classes is None else {"num_classes": num_classes}
        return CONSTRUCTORS[name](**arguments), {"library": "bcosification", "name": name, "weights": None}
    try:
        network = published_network(f"bcos/standard_{name}")
    except RuntimeError as error:
        hint = "weights=FILE takes a file that is here, pretrained=False random weights"
        raise RuntimeError(f"resolve: bcosification:{name}: {error}; {hint}") from None
    if num_classes is not None:
        _new_head(network, num_classes, f"bcosification:{name}")
    return network, {
        "library": "bcosification",
        "name": name,
        "weights": network.bcosification_source["weights"],
        "preprocessing": network.transform.preprocessing,
    }


LIBRARIES: dict[str, Callable[..., tuple[nn.Module, dict[str, Any]]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "open_clip": _open_clip,
    "transformers": _transformers,
    "bcosification": _own,
}
"""Prefix of a spec -> function (name, num_classes, pretrained, weights) -> (model, info)."""
_LISTS = {
    "torchvision": "torchvision.models.list_models()",
    "timm": "timm.list_models()",
    "open_clip": "open_clip.list_models()",
    "bcosification": "bcosification.models.CONSTRUCTORS",
}


def _in_timm(architecture: str, name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(architecture)


def _in_open_clip(architecture: str, name: str) -> bool:
    try:
        import open_clip
    except ImportError:
        return False
    return name.partition("/")[0] in open_clip.list_models()


_NAMES: dict[str, Callable[[str, str], bool]] = {
    "torchvision": lambda architecture, name: _is_torchvision(name),
    "bcosification": lambda architecture, name: name in CONSTRUCTORS,
    "timm": _in_timm,
    "open_clip": _in_open_clip,
}
"""Prefix of a spec -> whether the library has a model (name up to the first point, whole name)."""


def _from_folder(
    folder: Path, num_classes: int | None, model: nn.Module | None, unused: dict[str, Any]
) -> tuple[BcosifiedModel, dict[str, Any]]:
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"resolve: {folder}: expected no {name}= with a folder, got {value!r}")
    converted = load(folder, model=model)
    if num_classes is not None and num_classes != converted.num_classes:
        reset_head(converted, num_classes)
    config = converted.config
    return converted, {
        "spec": str(folder),
        "library": "bcosification",
        "name": config.get("source") or config.get("class"),
        "weights": str(folder),
        "num_classes": converted.num_classes,
        "converted": True,
        "preprocessing": None if "max_tokens" in config else converted.transform.preprocessing.to_dict(),
    }


def _from_file(
    path: Path, arch: str | None, num_classes: int | None, model: nn.Module | None
) -> tuple[nn.Module, dict[str, Any]]:
    if arch is None and model is None:
        read_weights(path)  # which says what else the file is
    if (arch is None) == (model is None):
        got = "neither" if arch is None else "both"
        raise ValueError(
            f"resolve: {path}: expected arch=NAME with a weights file (or model=, a network), got {got} of them"
        )
    state = _common_layout(read_weights(path))
    if any(name.startswith("model.") for name in state) and (path.parent / CONFIG_NAME).is_file():
        raise ValueError(
            f"resolve: {path}: expected a standard model's weights, got a converted one's: give its folder"
        )
    if model is not None:
        network = copy.deepcopy(model)
        info: dict[str, Any] = {"library": type(model).__module__, "name": type(model).__qualname__}
        spec = str(path)
    else:
        network, info = resolve(arch, pretrained=False)
        spec = info["spec"]
        name = family_of(network).head(network)
        rows = state.get(f"{name}.weight")
        if _head(network) is not None and rows is not None and rows.shape[0] != _outputs(_head(network)):
            _new_head(network, rows.shape[0], str(path))
        info = {"library": info["library"], "name": info["name"]}
    load_state(network, state, str(path), None if model is not None else spec)
    if num_classes is not None:
        _new_head(network, num_classes, str(path))
    network, info = _described(network, spec, {**info, "weights": str(path.absolute())}, num_classes)
    return network, {**info, "weights": str(path)}


def _common_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without DataParallel's prefix, and with the names that torchvision's published DenseNet files no longer have."""
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
    return {pattern.sub(r"\1\2.", name): value for name, value in state.items()}
