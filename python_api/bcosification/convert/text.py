"""The B-cosified classifier of texts: tokens in, logits out, and the same network as a function of word embeddings."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.hub import check_hub
from bcosification.convert.wrapper import BcosifiedModel, values_readable

__all__ = ["BcosifiedText", "OnEmbeddings"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""What a tokenizer gives that a model reads, each (N, T)."""
TOKENIZER_FOLDER = "tokenizer"


class BcosifiedText(BcosifiedModel):
    """A classifier of texts converted by ``bcosify``, called as the Hugging Face model that it was made of.

        output = model(**tokenizer(texts, padding=True, return_tensors="pt"))
        output.logits                                           # (N, classes), the logit bias included
        output.loss                                             # with labels=

    There is no encoding and no normalisation of the input. Images are encoded as [x, 1 - x] because a dark pixel, 0,
    would contribute nothing whatever its weight; the embedding of a word is a learnt vector of either sign, and 0 means
    nothing in it. Nor has it a mean and a std to subtract and divide by: the network's first layer is a LayerNorm.

    Args and shapes of the forward: input_ids (N, T), integers, or inputs_embeds (N, T, D) in their place;
    attention_mask, token_type_ids and position_ids (N, T), optional; labels, optional: (N,) integers, or (N, classes)
    numbers; return_dict, output_attentions, output_hidden_states as transformers takes them.

    Returns transformers' SequenceClassifierOutput. The loss is the binary cross-entropy of each class (of integers: of
    their one-hot rows), which the logit bias is made for, where the original's is the softmax's cross-entropy; with
    one class it is the squared error, as there.

    Attributes:
        model, logit_bias, config, conversion: as BcosifiedModel's; config["tokenizer"] names the tokenizer.
        tokenizer: the Hugging Face tokenizer, read when it is first asked for, or set to one.

    Source: B-cosification (2024), section 3; of language models: B-cos LM (Wang et al., 2025), arXiv:2502.12992.

    Example:
        >>> model = bcosify(BertForSequenceClassification.from_pretrained("textattack/bert-base-uncased-SST-2"))
        >>> explanation = explain(model, model.tokenize(["a gripping film"]))
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], **parts: Any) -> None:
        super().__init__(model, config, **parts)
        told = model.config
        name = getattr(model, "name_or_path", "") or None
        labels = [told.id2label[i] for i in sorted(told.id2label)]
        config.setdefault("tokenizer", str(Path(name).absolute()) if name and os.path.isdir(name) else name)
        config.setdefault("max_tokens", self._family.max_tokens(model))
        if any(label != f"LABEL_{i}" for i, label in enumerate(labels)):
            config.setdefault("class_names", labels)
        self._tokenizer: Any = None
        self._tokenizer_folder: str | None = None

    def _prepare_input(self, config: dict[str, Any], model: nn.Module) -> None:
        pass

    @property
    def _family(self) -> Any:
        from bcosification.convert.families import FAMILIES

        return next(family for family in FAMILIES.values() if family.name == self.config["family"])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        given = {name: value for name, value in given.items() if value is not None}
        self._check(given)
        as_dict = options.pop("return_dict", None)
        output = self.model(**given, **options, return_dict=True)
        logits = self.logit_bias(output.logits)
        output = replace(output, logits=logits, loss=None if labels is None else self.loss(logits, labels))
        wanted = getattr(self.model.config, "return_dict", True) if as_dict is None else as_dict
        return output if wanted else output.to_tuple()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean binary cross-entropy over texts and classes, 0-dim; with one class the mean squared error.

        Args:
            logits: (N, classes).
            labels: (N,) integers, the classes; or (N, classes), 0 to 1. With one class: N numbers.
        """
        classes = logits.shape[-1]
        if classes == 1:
            return F.mse_loss(logits.view(-1), labels.view(-1).to(logits))
        if not isinstance(labels, Tensor):
            raise TypeError(f"BcosifiedText: expected labels as a tensor, got {type(labels).__name__}")
        if labels.shape != logits.shape:
            if labels.is_floating_point() or labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"BcosifiedText: expected labels {tuple(logits.shape[:1])} of integers or {tuple(logits.shape)}, "
                    f"got {tuple(labels.shape)} {labels.dtype}"
                )
            readable = labels.device.type == "cpu" and not torch.compiler.is_compiling() and values_readable(labels)
            if readable and not bool(((labels >= 0) & (labels < classes)).all()):
                raise ValueError(
                    f"BcosifiedText: expected labels from 0 to {classes - 1}, got {int(labels.min())} to "
                    f"{int(labels.max())}"
                )
            labels = F.one_hot(labels.long(), classes)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))

    def _check(self, given: dict[str, Tensor]) -> None:
        """Of tokens or embeddings, and of what comes with them."""
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (embeddings is None):
            got = "neither" if ids is None else "both"
            raise ValueError(f"BcosifiedText: expected input_ids or inputs_embeds, got {got}")
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"BcosifiedText: expected {name} to be a tensor, got {type(value).__name__} (a tokenizer gives "
                    'tensors with return_tensors="pt")'
                )
        if ids is not None:
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise TypeError(
                    f"BcosifiedText: expected input_ids (N, T) of integers, the numbers of tokens, got "
                    f"{tuple(ids.shape)} {ids.dtype}; this model reads texts, no images"
                )
            if ids.dim() != 2 or ids.shape[1] == 0:
                hint = " (one text: input_ids[None])" if ids.dim() == 1 else ""
                raise ValueError(f"BcosifiedText: expected input_ids (N, T), T >= 1, got {tuple(ids.shape)}{hint}")
            shape = tuple(ids.shape)
        else:
            width = self.word_embeddings.embedding_dim
            if embeddings.dim() != 3 or embeddings.shape[2] != width or not embeddings.is_floating_point():
                raise ValueError(
                    f"BcosifiedText: expected inputs_embeds (N, T, {width}), floating point, got "
                    f"{tuple(embeddings.shape)} {embeddings.dtype}"
                )
            shape = tuple(embeddings.shape[:2])
        most = self.config["max_tokens"]
        if shape[1] > most and "position_ids" not in given:
            raise ValueError(
                f"BcosifiedText: expected at most {most} tokens, for which the model has positions, got {shape[1]} "
                "(a tokenizer cuts with truncation=True, max_length=)"
            )
        for name in INPUTS[1:]:
            value = given.get(name)
            if value is not None and tuple(value.shape) not in (shape, *([(1, shape[1])] * (name == "position_ids"))):
                raise ValueError(f"BcosifiedText: expected {name} {shape}, got {tuple(value.shape)}")
        sizes = {
            "input_ids": self.word_embeddings.num_embeddings,
            "token_type_ids": getattr(self.model.config, "type_vocab_size", None),
        }
        for name, size in sizes.items():
            value = given.get(name)
            # On other devices the values would have to be waited for.
            if size is None or value is None or value.device.type != "cpu" or torch.compiler.is_compiling():
                continue
            low, high = torch.aminmax(value) if values_readable(value) else (0, 0)
            if low < 0 or high >= size:
                raise ValueError(
                    f"BcosifiedText: expected {name} in [0, {size - 1}], got {int(low)} to {int(high)}: another "
                    "model's tokenizer?"
                )

    # --- as a function of the words' embeddings ---

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The embedding of tokens, (vocabulary, D)."""
        return self._family.word_embeddings(self.model)

    def checked_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``inputs`` of a tokenizer, checked, as a dict of tensors (N, T) on the model's device.

        Raises:
            TypeError: not a mapping of tensors. ValueError: no input_ids, names that the model does not read, wrong
            shapes, tokens that it does not know, a text of which everything is masked.
        """
        if not isinstance(inputs, Mapping):
            got = f"a tensor {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(
                "BcosifiedText: expected the mapping that a tokenizer returns (input_ids, attention_mask, …), got "
                f"{got}"
            )
        unknown = [name for name in inputs if name not in INPUTS]
        if unknown or inputs.get("input_ids") is None:
            raise ValueError(
                f"BcosifiedText: expected input_ids and, optionally, {', '.join(INPUTS[1:])}; got "
                f"{', '.join(map(str, inputs)) or 'nothing'}"
            )
        checked = {name: value for name, value in inputs.items() if value is not None}
        self._check(checked)
        device = self.word_embeddings.weight.device
        checked = {name: value.detach().to(device) for name, value in checked.items()}
        mask = checked.get("attention_mask")
        if checked["input_ids"].shape[0] == 0 or (mask is not None and not mask.bool().any(1).all()):
            raise ValueError("BcosifiedText: expected texts of at least one token each, got none, or a masked one")
        return checked

    def on_embeddings(self, inputs: Mapping[str, Tensor]) -> tuple[OnEmbeddings, Tensor]:
        """The classifier as a function of the embeddings of these tokens, and the embeddings (N, T, D), detached."""
        inputs = self.checked_inputs(inputs)
        ids = inputs.pop("input_ids")
        if "position_ids" not in inputs:
            positions = self._family.position_ids(self.model, ids)
            inputs |= {} if positions is None else {"position_ids": positions}
        with torch.no_grad():
            embeddings = self.word_embeddings(ids)
        return OnEmbeddings(self, inputs), embeddings.detach()

    # --- the tokenizer ---

    @property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the model, or the one that config["tokenizer"] names.

        Raises:
            ValueError: none is known, or it cannot be read. RuntimeError: transformers is not installed, or the
            repository cannot be reached.
        """
        if self._tokenizer is None:
            name = self._tokenizer_folder or self.config["tokenizer"]
            if name is None:
                raise ValueError("tokenizer: expected model.tokenizer = a tokenizer of transformers, as none is known")
            self._tokenizer = read_tokenizer(name)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def tokenize(self, texts: str | Sequence[str], **options: Any) -> Mapping[str, Tensor]:
        """What the model and ``explain`` take, of N texts: padded, cut at the model's number of positions (warns then).

        Args:
            texts: one or N texts.
            options: the tokenizer's (text_pair=, max_length=, …).

        Returns:
            transformers' BatchEncoding of tensors (N, T), on the model's device.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        options = {"padding": True, "truncation": True, "max_length": self.config["max_tokens"], **options}
        encoded = self.tokenizer(texts, return_tensors="pt", **options)
        longest = encoded["input_ids"].shape[-1]
        if options["truncation"] is True and longest >= options["max_length"]:
            whole = self.tokenizer(texts, **{**options, "truncation": False, "padding": False}, verbose=False)
            cut = [i for i, ids in enumerate(whole["input_ids"]) if len(ids) > longest]
            if cut:
                more = f" (and too many in {len(cut) - 1} others)" if len(cut) > 1 else ""
                warnings.warn(
                    f"tokenize: expected texts of at most {longest} tokens, got {len(whole['input_ids'][cut[0]])} in "
                    f"text {cut[0]}{more}: what is beyond is left out",
                    stacklevel=2,
                )
        return encoded.to(self.word_embeddings.weight.device)

    def _tokenizer_at_hand(self) -> Any:
        """The tokenizer as far as it is on this machine, else None: nothing is downloaded unasked."""
        name = self._tokenizer_folder or self.config["tokenizer"]
        if self._tokenizer is None and name is not None:
            try:
                self._tokenizer = read_tokenizer(name, local_files_only=True)
            except (ValueError, RuntimeError):
                return None
        return self._tokenizer

    def tokens_of(self, input_ids: Tensor) -> list[list[str]]:
        """The tokens of numbers (N, T) in words; the numbers where no tokenizer is at hand."""
        rows, tokenizer = input_ids.tolist(), self._tokenizer_at_hand()
        if tokenizer is None:
            return [[str(number) for number in row] for row in rows]
        return [tokenizer.convert_ids_to_tokens(row) for row in rows]

    # --- saving and loading ---

    def save_pretrained(self, folder: str | os.PathLike, **options: Any) -> str | None:
        """As BcosifiedModel's; the tokenizer, where it is on this machine, goes into the folder's ``tokenizer/``."""
        address = super().save_pretrained(folder, **options)
        tokenizer = self._tokenizer_at_hand()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(Path(folder) / TOKENIZER_FOLDER))
        return address

    def loaded_from(self, folder: Path) -> None:
        if (folder / TOKENIZER_FOLDER).is_dir():
            self._tokenizer_folder = str(folder / TOKENIZER_FOLDER)

    # --- what there is of images ---

    def _no_images(self, what: str) -> TypeError:
        return TypeError(
            f"{what}: expected a model of images, got {self.config['class']}, which reads texts (model.tokenize); "
            "finetune, distill, evaluate, benchmark and sweep are for images"
        )

    @property
    def transform(self) -> Any:
        raise self._no_images("transform")

    @property
    def channels(self) -> int:
        raise self._no_images("channels")

    def encode(self, images: Tensor) -> Tensor:
        raise self._no_images("encode")


class OnEmbeddings(nn.Module):
    """A BcosifiedText as a function of its words' embeddings (N, T, D) alone, all else of N texts given: logits.

    In explanation mode an affine one: logit = Σ W(E) ⊙ E + constant, with E the embeddings before positions, segments
    and LayerNorm.

    Args:
        model: shared, not copied.
        inputs: attention_mask, token_type_ids, position_ids (N, T), as far as the texts have them.
    """

    input_dims = 3

    def __init__(self, model: BcosifiedText, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.explained = model  # so explanations of one model wait for each other, of whatever texts
        self.inputs = inputs
        self.training = model.training

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.explained(inputs_embeds=embeddings, **self.inputs).logits


def read_tokenizer(name: str, *, local_files_only: bool = False) -> Any:
    """The Hugging Face tokenizer in a folder or of a repository's name; no code of a repository is run.

    Raises:
        ValueError: no tokenizer there. RuntimeError: no transformers, or a repository that cannot be reached.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise RuntimeError(f"tokenizer: needs transformers ({error}): pip install 'bcos-kernels[text]'") from None
    if not local_files_only and not Path(name).is_dir() and not Path(name).is_absolute():
        check_hub(name, "tokenizer", "model.tokenizer = takes a tokenizer of transformers that is here")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"tokenizer: expected one of transformers at {name!r}, got {reason}") from None
