"""Hugging Face's encoders with a sequence classifier (package transformers): BERT, RoBERTa, XLM-RoBERTa, DistilBERT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import SIBLINGS, TextFamily, register
from bcosification.convert.rules import (
    NoRule,
    Options,
    gated_activation,
    gelu,
    linear_as_it_is,
    rule,
    type_name,
)

MODELS = "transformers.models"
BERT, ROBERTA, XLM_ROBERTA, DISTILBERT = (
    f"{MODELS}.{name}.modeling_{name}" for name in ("bert", "roberta", "xlm_roberta", "distilbert")
)
LIKE_BERT = {BERT: "Bert", ROBERTA: "Roberta", XLM_ROBERTA: "XLMRoberta"}
"""Modules of the library with the same blocks -> how their classes' names begin."""

ATTENTION = ("eager", "sdpa")
"""Implementations of transformers' attention whose matrix is computed from q and k alone."""

SIBLINGS |= {
    f"{module.rpartition('.')[0]}.": "an encoder with a sequence classifier (BertForSequenceClassification, "
    "RobertaForSequenceClassification, XLMRobertaForSequenceClassification, DistilBertForSequenceClassification)"
    for module in (*LIKE_BERT, DISTILBERT)
}


class Encoder(TextFamily):
    """What the four have in common. Their own forwards run, with other layers inside."""

    body = ""
    """Name of the encoder in the model."""
    library = ""
    """Module that its classes come from."""

    keeps = "word embeddings, of which W is the map; q, k, v projections; q and k constant"
    cannot = "hold attentions other than eager and sdpa; convert decoders; be fine-tuned by bcosify finetune"

    def _encoder(self, model: nn.Module) -> nn.Module:
        return getattr(model, self.body)

    def _attentions(self, model: nn.Module) -> list[nn.Module]:
        return [layer.attention.self for layer in self._encoder(model).encoder.layer]

    def attention_class(self) -> str:
        """Dotted name of the class of its attentions, by which their projections have rules."""
        return f"{self.library}.{LIKE_BERT[self.library]}SelfAttention"

    def check(self, model: nn.Module) -> None:
        config = model.config
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise ValueError(
                f"bcosify: expected an encoder, got {type(model).__name__} with is_decoder={config.is_decoder} and "
                f"add_cross_attention={config.add_cross_attention}"
            )
        if config.problem_type == "regression" and config.num_labels > 1:
            raise ValueError(
                f"bcosify: expected a classifier, got {type(model).__name__} with problem_type='regression' and "
                f"{config.num_labels} outputs; its loss and the logit bias of a conversion are those of classes"
            )
        implementation = config._attn_implementation
        if implementation not in ATTENTION:
            raise ValueError(
                f"bcosify: expected attn_implementation to be one of {', '.join(map(repr, ATTENTION))}, got "
                f"{implementation!r}; model.set_attn_implementation('sdpa') changes it"
            )
        known = self.attention_class()
        for attention in self._attentions(model):
            if type_name(type(attention)) != known:
                raise ValueError(
                    f"bcosify: expected attentions of the class {known} (transformers >= 5), got "
                    f"{type_name(type(attention))}"
                )

    def word_embeddings(self, model: nn.Module) -> nn.Embedding:
        return self._encoder(model).embeddings.word_embeddings

    def max_tokens(self, model: nn.Module) -> int:
        return model.config.max_position_embeddings

    def output(self, value: Any) -> Tensor:
        return value.logits

    def input_layer(self, model: nn.Module) -> None:
        return None

    def head(self, model: nn.Module) -> str:
        return "classifier"

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        told = model.config.to_diff_dict()
        for name in ("transformers_version", "model_type", "dtype", "architectures", "_name_or_path", "label2id"):
            told.pop(name, None)  # label2id is made from id2label, whose numbers JSON makes words of
        return {**told, "id2label": {str(i): label for i, label in model.config.id2label.items()}}

    def configuration(self) -> type:
        """The library's class of configurations."""
        raise NotImplementedError

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        import transformers

        labels = {int(i): label for i, label in architecture["id2label"].items()}
        label2id = {label: i for i, label in labels.items()}
        config = self.configuration()(**{**architecture, "id2label": labels, "label2id": label2id})
        return getattr(transformers, self.model_name())(config)

    def model_name(self) -> str:
        """The name of the models' class in the library."""
        return f"{LIKE_BERT[self.library]}ForSequenceClassification"

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40,
        "max_position_embeddings": 16,
    }  # fmt: skip
    """Of ``example``, in the words of its configuration."""

    def example(self) -> nn.Module:
        return self.build({**self.sizes, "id2label": {str(i): f"LABEL_{i}" for i in range(3)}})

    def example_inputs(self, model: nn.Module) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0  # the second text is shorter
        inputs = {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}
        if getattr(model.config, "type_vocab_size", 1) > 1:
            inputs["token_type_ids"] = (torch.arange(9) > 4).long().expand(2, -1) * mask
        return inputs


@register(f"{BERT}.BertForSequenceClassification")
class HuggingFaceBert(Encoder):
    """bert (embeddings, encoder.layer, pooler), classifier on the pooled first token."""

    name = "huggingface_bert"
    title = "Hugging Face BertForSequenceClassification"
    converts = "attention outputs, MLPs, pooler, classifier; LayerNorms, GELUs, the pooler's tanh"
    body, library = "bert", BERT

    def configuration(self) -> type:
        from transformers import BertConfig

        return BertConfig


class ConvertedClassificationHead(ChangedForward):
    """RoBERTa's head with its tanh as a layer, which has an explanation mode: features (N, T, D) -> logits."""

    def forward(self, features: Tensor, **_: Any) -> Tensor:
        return self.out_proj(self.dropout(self.activation(self.dense(self.dropout(features[:, 0])))))


@register(f"{ROBERTA}.RobertaForSequenceClassification")
class HuggingFaceRoberta(Encoder):
    """roberta (embeddings, encoder.layer), classifier (dense, tanh, out_proj) on the first token."""

    name = "huggingface_roberta"
    title = "Hugging Face RobertaForSequenceClassification"
    converts = "attention outputs, MLPs, both layers of the classifier; LayerNorms, GELUs, the classifier's tanh"
    body, library = "roberta", ROBERTA

    def configuration(self) -> type:
        from transformers import RobertaConfig

        return RobertaConfig

    def head(self, model: nn.Module) -> str:
        return "classifier.out_proj"

    def max_tokens(self, model: nn.Module) -> int:
        return model.config.max_position_embeddings - model.config.pad_token_id - 1

    def position_ids(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """Numbers from the padding's on, which padding itself keeps; so they cannot be told from embeddings alone."""
        padding = model.config.pad_token_id
        words = (input_ids != padding).long()
        return words.cumsum(1) * words + padding

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model.classifier.activation = nn.Tanh().train(model.training)  # called as a function by the library
        change_class(model.classifier, ConvertedClassificationHead)
        return model


@register(f"{XLM_ROBERTA}.XLMRobertaForSequenceClassification")
class HuggingFaceXLMRoberta(HuggingFaceRoberta):
    """As RoBERTa."""

    name = "huggingface_xlm_roberta"
    title = "Hugging Face XLMRobertaForSequenceClassification"
    library = XLM_ROBERTA

    def configuration(self) -> type:
        from transformers import XLMRobertaConfig

        return XLMRobertaConfig


class ConvertedDistilBert(ChangedForward):
    """DistilBERT's forward with its last ReLU as a layer, which a conversion may remove."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        encoded = self.distilbert(input_ids, attention_mask=attention_mask, **{**options, "return_dict": True})
        pooled = self.activation(self.pre_classifier(encoded[0][:, 0]))
        return SequenceClassifierOutput(
            logits=self.classifier(self.dropout(pooled)),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


@register(f"{DISTILBERT}.DistilBertForSequenceClassification")
class HuggingFaceDistilBert(Encoder):
    """distilbert (embeddings, transformer.layer), pre_classifier, ReLU, classifier on the first token."""

    name = "huggingface_distilbert"
    title = "Hugging Face DistilBertForSequenceClassification"
    converts = "attention outputs, MLPs, both layers of the classifier; LayerNorms, GELUs"
    body, library = "distilbert", DISTILBERT
    sizes = {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40, "max_position_embeddings": 16,
    }  # fmt: skip

    def configuration(self) -> type:
        from transformers import DistilBertConfig

        return DistilBertConfig

    def model_name(self) -> str:
        return "DistilBertForSequenceClassification"

    def attention_class(self) -> str:
        return f"{DISTILBERT}.DistilBertSelfAttention"

    def _attentions(self, model: nn.Module) -> list[nn.Module]:
        return [layer.attention for layer in model.distilbert.transformer.layer]

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model.activation = nn.ReLU().train(model.training)  # made anew by every call of the library's forward
        return change_class(model, ConvertedDistilBert)


class HeldProjection(ChangedForward, bnn.HeldOutput):
    """A linear layer whose output, queries or keys, is a constant in explanation mode."""


@rule(
    *(f"{module}.{name}SelfAttention.{part}" for module, name in LIKE_BERT.items() for part in ("query", "key")),
    *(f"{DISTILBERT}.DistilBertSelfAttention.{part}" for part in ("q_lin", "k_lin")),
)
def held_projection(layer: nn.Module, options: Options) -> nn.Module:
    """The projections to queries and keys stay linear; they only make the attention matrix, which is a constant."""
    if type(layer) is not nn.Linear:
        raise NoRule("it projects to queries or keys: expected an nn.Linear")
    return change_class(layer, HeldProjection)


@rule(
    *(f"{module}.{name}SelfAttention.value" for module, name in LIKE_BERT.items()),
    f"{DISTILBERT}.DistilBertSelfAttention.v_lin",
)
def value_projection(layer: nn.Module, options: Options) -> nn.Module:
    """The projection to values stays linear, as in every other attention, and is a part of W."""
    return linear_as_it_is(layer, options)


_EMBEDDINGS = [*(f"{module}.{name}Embeddings" for module, name in LIKE_BERT.items()), f"{DISTILBERT}.Embeddings"]


@rule(*(f"{kind}.word_embeddings" for kind in _EMBEDDINGS))
def word_embeddings(layer: nn.Module, options: Options) -> nn.Module:
    """What W is a map of: kept."""
    return linear_as_it_is(layer, options)


@rule(*(f"{kind}.{part}_embeddings" for kind in _EMBEDDINGS for part in ("position", "token_type")))
def added_embeddings(layer: nn.Module, options: Options) -> nn.Module:
    """Embeddings of positions and segments, added to the words': a constant of the explanation."""
    if type(layer) is not nn.Embedding:
        raise NoRule("it embeds positions or segments: expected an nn.Embedding")
    layer.__class__ = bnn.ConstantEmbedding  # which keeps all that an nn.Embedding keeps
    return layer


@rule("transformers.activations.NewGELUActivation", "transformers.activations.GELUTanh")
def gelu_tanh(layer: nn.Module, options: Options) -> nn.Module:
    """Hugging Face's GELUs by tanh -> x times a gate that is a constant in explanation mode, or nothing."""
    return gelu(nn.GELU("tanh").train(layer.training), options)


@rule("transformers.activations.SiLUActivation")
def silu_activation(layer: nn.Module, options: Options) -> nn.Module:
    """Hugging Face's SiLU -> the same with a gate that is a constant in explanation mode, or nothing."""
    return gated_activation(nn.SiLU().train(layer.training), options)
