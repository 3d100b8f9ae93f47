"""What `transformers:NAME` and `transformers:FOLDER` stand for: classifiers of texts, and CLIP's image towers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from bcosification.convert.hub import check_hub

WANTED = "a classifier of texts (…ForSequenceClassification) or CLIP's image tower (CLIPVisionModelWithProjection)"
INSTEAD = "transformers:FOLDER takes a folder of transformers' save_pretrained that is here"
CLIP = ("clip", "clip_vision_model")
"""Types of configurations whose files have CLIP's image tower."""


def read_transformers(
    name: str, num_classes: int | None, pretrained: bool, weights: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a repository or folder of transformers, and what ``resolve`` tells of it.

    Of a CLIPModel the image tower with its projection is read: its text tower is left.

    Raises:
        ImportError: no transformers. FileNotFoundError: a path at which no folder is. RuntimeError: what cannot be
        downloaded. ValueError: another model; weights without a classifier and no num_classes, of CLIP without the
        projection; options that it has nothing for.
    """
    import transformers

    spec = f"transformers:{name}"
    if weights is not None:
        raise ValueError(f"resolve: {spec}: expected the weights to be those of the name or folder, got {weights!r}")
    _check_there(name, spec)
    config = None
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(name)
            read = _tower if config.model_type in CLIP else _classifier
            network, loading = read(name, config, num_classes, pretrained, spec)
    except OSError as error:
        raise RuntimeError(
            f"resolve: {spec}: expected a folder of transformers' save_pretrained, or a repository that can be "
            f"downloaded, got {type(error).__name__}: {_first_line(error)}"
        ) from None
    except ValueError as error:
        if str(error).startswith("resolve: "):
            raise
        saved = config and ", ".join(config.architectures or [type(config).__name__])
        raise ValueError(f"resolve: {spec}: expected {WANTED}, got {saved or _first_line(error)}") from None
    # transformers draws what a file lacks at random, with no more than a warning.
    missing = sorted(loading["missing_keys"])
    if missing and num_classes is None:
        saved = ", ".join(getattr(config, "architectures", None) or ["a model"])
        what, hint = "a sequence classifier", "; num_classes= gives a new classifier with random weights"
        if config.model_type in CLIP:
            what, hint = "CLIP's image tower and its projection", ", which a CLIPModel's files have"
        raise ValueError(
            f"resolve: {spec}: expected weights of {what}, got {saved}'s without {', '.join(missing)}{hint}"
        )
    return network, {"library": "transformers", "name": name, "weights": name if pretrained else None}


def _classifier(
    name: str, config: Any, num_classes: int | None, pretrained: bool, spec: str
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForSequenceClassification as kind

    another = num_classes not in (None, config.num_labels)
    if another:
        config.num_labels = num_classes
    if not pretrained:
        return kind.from_config(config), {"missing_keys": ()}
    return kind.from_pretrained(name, config=config, ignore_mismatched_sizes=another, output_loading_info=True)


def _tower(
    name: str, config: Any, num_classes: int | None, pretrained: bool, spec: str
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPVisionModelWithProjection as kind

    if num_classes is not None:
        raise ValueError(f"resolve: {spec}: expected no num_classes, as CLIP has no classifier, got {num_classes}")
    if config.model_type == "clip":  # both towers'; the size of the embeddings is told outside of them
        config, size = config.vision_config, config.projection_dim
        config.projection_dim = size
    if not pretrained:
        return kind(config), {"missing_keys": ()}
    return kind.from_pretrained(name, config=config, output_loading_info=True)


def _check_there(name: str, spec: str) -> None:
    """Raises at once where ``name`` is no folder and cannot be downloaded either."""
    if Path(name).is_dir():
        return
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(
            f"resolve: {spec}: expected a folder of transformers' save_pretrained, or the name of a repository "
            "(NAME or USER/NAME), found no such folder"
        ) from None
    check_hub(name, f"resolve: {spec}", INSTEAD)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar of weights that are loaded and its list of those that are not: what is missing is told
    by an error. Downloads keep their bars, which are huggingface_hub's."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
