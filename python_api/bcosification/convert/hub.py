"""Models on the Hugging Face Hub: the mixin of `BcosifiedModel`, and the model card.

huggingface_hub's own mixin does the work where that package is installed (timm and open_clip bring it); without it
models are still saved and read as folders.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

if TYPE_CHECKING:
    from bcosification.convert.wrapper import BcosifiedModel

try:
    from huggingface_hub import ModelHubMixin
except ImportError as missing:
    _missing: ImportError | None = missing
    ModelHubMixin = object
else:
    _missing = None

__all__ = ["HubMixin", "model_card"]

REPOSITORY_FILES = ("config.json", "model.safetensors")
"""What is read from a repository. Nothing else is downloaded, so no pickle and no code."""
TOKENIZER_FILES = ("tokenizer/*.json", "tokenizer/*.txt")
"""And of classifiers of texts."""
CONNECTION_TIMEOUT = 5.0
_INSTEAD = "weights=FILE takes a file that is here, pretrained=False random weights"
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def _require_hub(what: str) -> None:
    if _missing is not None:
        raise RuntimeError(
            f"{what}: needs huggingface_hub ({_missing}): pip install huggingface_hub; folders are saved and read "
            "without it"
        )


def check_hub(repository: str, what: str, instead: str = _INSTEAD) -> None:
    """Raises at once where a repository's files are neither in the cache nor to be had.

    huggingface_hub tries for most of a minute before it says so. Nothing is checked without huggingface_hub, without a
    repository (""), or behind a proxy, where only a download can tell.

    Raises:
        RuntimeError: offline (HF_HUB_OFFLINE), or no connection within CONNECTION_TIMEOUT seconds; beginning with
            ``what``, and ending with what to do ``instead``.
    """
    if not repository or _missing is not None or _is_cached(repository):
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        problem = unreachable(constants.ENDPOINT)
        if problem is None:
            return
        reason = f"{constants.ENDPOINT} cannot be reached ({problem})"
    raise RuntimeError(
        f"{what}: expected to download {repository} from the Hugging Face Hub, but {reason}, and its files are not in "
        f"{constants.HF_HUB_CACHE}; {instead}"
    )


def _is_cached(repository: str) -> bool:
    """Whether any file of a repository has been downloaded: which ones suffice is the library's to say."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def unreachable(address: str) -> str | None:
    """Why no connection to an address can be made, or None: it can, or a proxy stands between."""
    parts = urlsplit(address)
    if getproxies().get(parts.scheme) or getproxies().get("all"):
        return None
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECTION_TIMEOUT).close()
    except OSError as error:
        return str(error) or type(error).__name__
    return None


class HubMixin(ModelHubMixin):
    """``from_pretrained`` and ``push_to_hub``, as huggingface_hub's ModelHubMixin defines them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> HubMixin:
        # huggingface_hub's would keep a copy of __init__'s arguments; the model's own config is what is saved.
        return nn.Module.__new__(cls)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, model: nn.Module | None = None, **options: Any):
        """Read a B-cosified model from a folder, or from a repository on the Hugging Face Hub.

        Args:
            name: a folder that ``save_pretrained`` wrote, or the id of a repository ("user/resnet50-bcos").
            model: as in ``bcosification.load``: the standard network, where config.json does not tell how to build it.
            options: huggingface_hub's: revision, token, cache_dir, force_download, local_files_only.

        Returns:
            The model in eval mode, on the CPU.

        Raises:
            FileNotFoundError, ValueError: as ``bcosification.load``. TypeError: another option. RuntimeError: a
            repository, without huggingface_hub. huggingface_hub's errors where the repository cannot be read.

        Example:
            >>> model = BcosifiedModel.from_pretrained("user/resnet50-bcos")
        """
        unknown = sorted(set(options) - set(DOWNLOAD_OPTIONS))
        if unknown:
            raise TypeError(
                f"from_pretrained: expected options among {', '.join(DOWNLOAD_OPTIONS)}; got {', '.join(unknown)}"
            )
        if _missing is not None:
            if not os.path.isdir(name):
                _require_hub(f"from_pretrained({str(name)!r})")
            return cls._from_pretrained(model_id=str(name), model=model)
        if not os.path.isdir(name) and not {"cache_dir", "local_files_only"} & set(options):
            check_hub(str(name), f"from_pretrained({str(name)!r})", "a folder is read without a connection")
        return super().from_pretrained(name, model=model, **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        model: nn.Module | None = None,
        **options: Any,  # those of the download, and what huggingface_hub read from config.json; load reads it itself
    ) -> BcosifiedModel:
        from bcosification.convert.checkpoints import load

        folder = model_id
        if not os.path.isdir(folder):
            from huggingface_hub import snapshot_download

            download = {name: value for name, value in options.items() if name in DOWNLOAD_OPTIONS}
            folder = snapshot_download(model_id, allow_patterns=[*REPOSITORY_FILES, *TOKENIZER_FILES], **download)
        return load(folder, model=model)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        **push_options: Any,
    ) -> str | None:
        """Write model.safetensors, config.json and a model card, README.md, into ``folder``.

        ``bcosification.load(folder)`` reads them. A README.md that is there is left as it is.

        Args:
            folder: made if missing.
            push_to_hub: upload it, too, as ``push_to_hub`` does. repo_id: where to; default: the folder's name.
            model_card_kwargs: options of ``model_card``.
            config: not used (huggingface_hub passes it): a model has its own.
            push_options: options of ``push_to_hub``.

        Returns:
            The address of the commit with push_to_hub=True, else None.
        """
        from bcosification.convert.checkpoints import save_pretrained

        save_pretrained(self, folder, card=model_card(self, **(model_card_kwargs or {})))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(folder).name, model_card_kwargs=model_card_kwargs, **push_options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with its card to the Hugging Face Hub, into a new or an existing repository.

        Args:
            repo_id: "user/name".
            options: huggingface_hub's: commit_message, private, token, branch, create_pr, …, and model_card_kwargs,
                the options of ``model_card``.

        Returns:
            The address of the commit.

        Raises:
            RuntimeError: huggingface_hub is not installed.
        """
        _require_hub(f"push_to_hub({repo_id!r})")
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, **options: Any):
        """The model card as huggingface_hub's ModelCard; options are those of ``model_card``."""
        _require_hub("generate_model_card")
        from huggingface_hub import ModelCard

        return ModelCard(model_card(self, **options))


def model_card(
    model: BcosifiedModel, *, license: str | None = None, base_model: str | None = None, notes: str = ""
) -> str:
    """A model card, Markdown with the Hub's metadata: what the model is, what of, whose licence, how to use it.

    Args:
        model: a B-cosified model.
        license: an identifier of the Hub ("apache-2.0", "mit"). Default: "other", as the licence of weights is that of
            those they come from, which a model does not tell; none where it started from random weights.
        base_model: id of the Hub's repository with the weights that the model was made of. Default: timm's, where the
            model was converted from a timm model of that name.
        notes: a paragraph of one's own.
    """
    config = model.config
    options, source = config["options"], config.get("source")
    if base_model is None and source and source.startswith("timm:") and "." in source and config.get("source_weights"):
        base_model = f"timm/{source.removeprefix('timm:')}"
    if base_model is None and source and source.startswith("transformers:") and not Path(source[13:]).is_absolute():
        base_model = source.removeprefix("transformers:")
    classes, reads_text = config["num_classes"], "max_tokens" in config
    task = "text-classification" if reads_text else "image-classification"
    metadata: dict[str, Any] = {
        "library_name": "bcosification",
        "pipeline_tag": "image-feature-extraction" if classes is None else task,
        "tags": ["b-cos", "b-cosification", "interpretability", "explainability", "pytorch"],
    }
    made_of = f"`{source}`" if source else f"a `{config['class']}`"
    weights = config.get("source_weights")
    # Of a network of one's own nobody told where its weights are from; "source_weights" is None where they were drawn.
    drawn = bool(source) and weights is None
    if license is not None:
        metadata["license"] = license
    elif not drawn:
        metadata |= {"license": "other", "license_name": "that-of-the-base-model"}
    if base_model is not None:
        metadata["base_model"] = base_model
    # JSON's values are YAML's.
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in metadata.items())

    if source:
        made_of += f" (weights: {f'`{Path(weights).name}`' if weights else 'random'})"
    layers = sum(entry["was"] != entry["becomes"] for entry in model.conversion)
    facts = [
        f"made of: {made_of}; {layers} layers became B-cos layers and their companions",
        f"B = {options['b']:g}; biases: {options['bias']}; weights "
        + ("are divided by their norms" if options["normalize_weight"] else "are not normalised"),
    ]
    if config.get("finetuned_on"):
        facts.append(f"fine-tuned on `{config['finetuned_on']}`")
    elif options["b"] != 1 or options["bias"] != "keep":
        facts.append("not fine-tuned since the conversion: another B and missing biases change what it computes")
    size = config.get("input_size")
    pixels = f"{size[0]} × {size[1]} pixels" if size else "any size"
    if reads_text:
        facts.append(f"texts: up to {config['max_tokens']} tokens (tokenizer: `{config['tokenizer'] or 'not named'}`)")
    else:
        facts.append(f"images: values in [0, 1], {pixels}; encoded as [x, 1 − x] and normalised inside the model")
    if classes is not None:
        names = config.get("class_names")
        facts.append(f"classes: {classes}" + (f" ({', '.join(map(str, names[:10]))}{', …' if len(names) > 10 else ''})"
                                              if names else ""))  # fmt: skip
    if config.get("kept"):
        facts.append(f"{len(config['kept'])} layers without a conversion rule were kept: explanations may not be exact")
    origin = f"the licence of {f'`{base_model}`' if base_model else made_of}"
    if license:
        terms = f"`{license}`."
    elif drawn:
        terms = "These weights start from random ones, so nobody else's licence holds for them."
    else:
        terms = f"These weights start from others', so {origin} holds for them."
    name = base_model or source or config["class"]
    calls = ("logits = model(images)", "explanation = bcosification.explain(model, images)          # W(x) and more")
    of, axes, mapped = "logits", "(1, 2)", "W(x) of the image"
    if "attention_pool" in config:  # an image tower of CLIP
        texts = 'text=["a dog", "a cat"]'
        calls = ("embeddings = model(images)", f"explanation = bcosification.explain(model, images, {texts})")
        of, axes = "similarities with a text", "(2, 3)"
    imported = "from PIL import Image\n"
    read = 'images = model.transform(Image.open("photo.jpg"))[None]     # (1, 3, H, W) in [0, 1], not normalised'
    if reads_text:
        imported, read = "", 'inputs = model.tokenize(["a gripping film"])'
        calls = ("logits = model(**inputs).logits", "explanation = bcosification.explain(model, inputs)   # per token")
        axes, mapped = "1", "W(x) of its words' embeddings"
    called = "\n".join((read, *calls))
    return f"""---
{head}
---

# {name}, B-cosified

A B-cos network: each of its {of} is a linear map {mapped}, which is its explanation. Made with
`bcosification` after [B-cosification](https://arxiv.org/abs/2411.00715) (Arya, Rao, Böhle, Schiele, 2024).

{chr(10).join(f"- {fact}" for fact in facts)}
{f"{chr(10)}{notes}{chr(10)}" if notes else ""}
## How to use it

```python
import bcosification
{imported}
model = bcosification.BcosifiedModel.from_pretrained("REPOSITORY_OR_FOLDER")
{called}
explanation.save("pictures")
```

`explanation.contributions.sum({axes}) + explanation.constant` is what is explained.

## Licence

{terms}
"""
