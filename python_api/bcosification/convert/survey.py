"""Which of a library's models convert: every name is built without memory for its weights, and converted."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bcosification.convert.conversion import bcosify
from bcosification.convert.families import family_of
from bcosification.convert.resolver import resolve

TIMM_GLOBS = (
    "resnet*", "resnext*", "vit_*", "deit*", "convnext*", "swin_*", "swinv2*", "efficientnet*", "mobilenetv3*",
    "mixer*",
)  # fmt: skip
"""timm's names that people bring most; "*" is all of them."""


@dataclass
class SurveyRow:
    """One model: its name, class and family, whether it converts, why not, and what is to be known of it if it does.

    bcos_layers: how many layers became B-cos. head: "before the pooling", "where it is" or "none". head_move_changes:
    why the moved head is not exact at B = 1, "" if it is. rebuilt_from: "description" where config.json tells how to
    build the network, else "name".
    """

    name: str
    pattern: str
    type: str = ""
    family: str = ""
    converts: bool = False
    reason: str = ""
    bcos_layers: int = 0
    head: str = ""
    head_move_changes: str = ""
    rebuilt_from: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)


def survey(patterns: Sequence[str] = TIMM_GLOBS, *, progress: bool = True, **options: Any) -> list[SurveyRow]:
    """Convert every timm model whose name fits one of the patterns, on torch's meta device: no weights, no forward.

    Args:
        patterns: as timm.list_models takes them; a name that fits several counts for the first.
        progress: show a progress bar (tqdm) on stderr, default True.
        options: of ``bcosify``, default its own.

    Returns:
        One row per model, in the order of the patterns and of timm's list. Nothing is raised for a model that does not
        convert; its row says why.

    Raises:
        RuntimeError: timm is not installed. ValueError: a pattern that no name fits.

    Example:
        >>> rows = survey(["resnet1*"], progress=False)
        >>> all(row.converts for row in rows)
        True
    """
    try:
        import timm
    except ImportError as error:
        raise RuntimeError(f"survey: needs timm ({error}): pip install 'bcos-kernels[train]'") from None

    def build(name: str) -> nn.Module:
        return resolve(f"timm:{name}", pretrained=False)[0]

    return _rows("timm", timm.list_models, patterns, build, progress, options)


def survey_open_clip(patterns: Sequence[str] = ("*",), *, progress: bool = True, **options: Any) -> list[SurveyRow]:
    """Convert every open_clip model whose name fits one of the patterns, on torch's meta device, as `survey` does.

    Of models whose texts are read by a model of Hugging Face's hub, which is downloaded to build them, the image tower
    alone is built and converted.

    Args:
        patterns: shell patterns; default: all names of open_clip.list_models().
        progress, options: as `survey`.

    Raises:
        RuntimeError: open_clip is not installed. ValueError: a pattern that no name fits.
    """
    try:
        import open_clip
    except ImportError as error:
        raise RuntimeError(f"survey: needs open_clip ({error}): pip install 'bcos-kernels[train]'") from None

    def build(name: str) -> nn.Module:
        config = open_clip.get_model_config(name)
        if config["text_cfg"].get("hf_model_name") is None:
            return open_clip.create_model(name, pretrained=None, device="meta")
        return open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )

    def fitting(pattern: str) -> list[str]:
        return fnmatch.filter(open_clip.list_models(), pattern)

    return _rows("open_clip", fitting, patterns, build, progress, options)


def _rows(
    library: str,
    fitting: Callable[[str], list[str]],
    patterns: Sequence[str],
    build: Callable[[str], nn.Module],
    progress: bool,
    options: dict[str, Any],
) -> list[SurveyRow]:
    """One row per name that fits a pattern; ``build`` makes the model of a name."""
    names: dict[str, str] = {}
    for pattern in patterns:
        found = fitting(pattern)
        if not found:
            raise ValueError(f"survey: expected a pattern of {library}'s model names, got {pattern!r}, which none fits")
        for name in found:
            names.setdefault(name, pattern)
    iterator: Iterable[str] = names
    if progress:
        from tqdm import tqdm

        iterator = tqdm(names, unit="model", desc="survey")
    return [_row(name, names[name], build, options) for name in iterator]


def _row(name: str, pattern: str, build: Callable[[str], nn.Module], options: dict[str, Any]) -> SurveyRow:
    row = SurveyRow(name, pattern)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what timm and open_clip have to say about random weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                network = build(name)
            tower = family_of(network).tower(network)
            family = family_of(tower)
            row.type, row.family = type(tower).__qualname__, family.name
            converted = bcosify(network, **options)
    except Exception as error:  # whatever a library raises is a model that does not convert
        row.reason = _short(f"{type(error).__name__}: {error}")
        return row
    finally:
        logging.disable(level)
    config = converted.config
    row.converts = True
    row.bcos_layers = sum(hasattr(module, "set_b") for module in converted.modules())
    row.head = "before the pooling" if config["head_before_pool"] else "where it is" if config["head"] else "none"
    row.head_move_changes = (family.head_move_changes(tower) or "") if config["head_before_pool"] else ""
    row.rebuilt_from = "description" if config["architecture"] else "name"
    return row


def _short(message: str) -> str:
    """An error's first line, or, of one that lists layers, the first types and what is wrong with them, each once."""
    listed = [line.strip().rpartition(": ")[0] for line in message.splitlines() if line.startswith("  ")]
    more = [f"{len(listed) - 4} more"] if len(listed) > 4 else []
    return "; ".join([*listed[:4], *more]) or message.partition("\n")[0]


def summary(rows: Iterable[SurveyRow]) -> str:
    """Rows as text: how many convert per pattern and in all, and every failure with its reason."""
    rows = list(rows)
    lines = []
    for pattern in [*dict.fromkeys(row.pattern for row in rows), "all"]:
        group = [row for row in rows if pattern in (row.pattern, "all")]
        good = sum(row.converts for row in group)
        lines.append(f"{pattern:<15} {good:>4} of {len(group):>4}  {100 * good / max(len(group), 1):5.1f} %")
    lines += [f"{row.name}: {row.reason}" for row in rows if not row.converts]
    return "\n".join(lines)
