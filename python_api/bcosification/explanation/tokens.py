"""Explanations of classifiers of texts: what every token contributed to a logit.

    logit = Σ_t Σ_d E_td * W_td + constant,        contributions_t = Σ_d E_td * W_td

with E_t the embedding of token t before positions and segments are added to it, and W = ∂logit/∂E in explanation mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from bcosification.convert.linear_map import dynamic_linear_map
from bcosification.convert.text import BcosifiedText
from bcosification.explanation.explaining import Targets, check_sum, checked_targets
from bcosification.json_files import json_text
from bcosification.nn import explanation_mode
from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = ["TokenExplanation", "explain_tokens"]

# Tokens explained at once where no batch_size is given: 16 texts of 512.
_TOKENS_AT_ONCE = 16 * 512

BODY = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: #fff;
  color: #111; }
section { margin: 1.6rem 0; border-top: 1px solid #ddd; }
.key { color: #555; }
"""
"""Of a whole page."""
STYLE = """
.text { line-height: 2.3; margin: .4rem 0 0; } .text span { padding: .15rem .2rem; border-radius: .2rem; }
.about { color: #555; font-size: 14px; }
"""


@dataclasses.dataclass(frozen=True, repr=False)
class TokenExplanation:
    """What `explain` returns for a classifier of texts: N texts of T tokens, padding included.

    Attributes:
        input_ids: (N, T), the tokens' numbers.
        attention_mask: (N, T), 1 of tokens, 0 of padding; all 1 where none was given.
        embeddings: E, the words' embeddings (N, T, D).
        logits: (N, classes).
        targets: Explained classes (N,), int64.
        weights: W of the target logits (N, T, D).
        contributions: Σ over D of E * W, (N, T); 0 of padding.
        constant: (N,), everything else that adds to the logit: contributions.sum(1) + constant = logit. That is the
            logit bias, the embeddings of positions and segments, and kept biases.
        tokens: N tuples of T words or parts of words; their numbers where the model has no tokenizer.
        class_names: those of the model, if it tells.
    """

    input_ids: Tensor
    attention_mask: Tensor
    embeddings: Tensor
    logits: Tensor
    targets: Tensor
    weights: Tensor
    contributions: Tensor
    constant: Tensor
    tokens: tuple[tuple[str, ...], ...]
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.targets.size(0)

    def __repr__(self) -> str:
        shape = tuple(self.weights.shape)
        return f"TokenExplanation({len(self)} texts, targets {self.targets.tolist()[:16]}, weights {shape})"

    def __getitem__(self, index: int | slice | Sequence[int]) -> TokenExplanation:
        """The explanations of some texts; an int gives one, still with its first dimension."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"TokenExplanation: expected an index below {len(self)}, got {index}")
            index = [index]
        numbers = list(range(len(self)))[index] if isinstance(index, slice) else [int(i) for i in index]
        chosen = {name: tensor[numbers] for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **chosen, tokens=tuple(self.tokens[i] for i in numbers))

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, *args, **kwargs) -> TokenExplanation:
        """All tensors moved as by `Tensor.to` (device, dtype); those of integers keep their type."""
        moved = {name: t.to(*args, **kwargs) for name, t in self._tensors().items()}
        for name in ("input_ids", "attention_mask", "targets"):
            moved[name] = getattr(self, name).to(moved["logits"].device)
        return dataclasses.replace(self, **moved)

    def class_name(self, target: int) -> str:
        """What a class is called: its name, or "class" and its number."""
        return self.class_names[target] if self.class_names else f"class {target}"

    def pairs(self, i: int, tokens: Sequence[str] | None = None) -> list[tuple[str, float]]:
        """(token, contribution) of text i in its order, without padding.

        Args:
            i: which text.
            tokens: T other words for the tokens; default: the tokenizer's.
        """
        tokens = self.tokens[i] if tokens is None else list(tokens)
        if len(tokens) != self.input_ids.shape[1]:
            raise ValueError(
                f"TokenExplanation: expected {self.input_ids.shape[1]} tokens for text {i}, got {len(tokens)}"
            )
        kept = self.attention_mask[i].bool().tolist()
        values = self.contributions[i].double().tolist()
        return [(token, value) for token, value, there in zip(tokens, values, kept, strict=True) if there]

    def table(self, i: int, tokens: Sequence[str] | None = None) -> str:
        """Text i as lines of token, contribution and a bar, then the constant and the logit."""
        pairs = self.pairs(i, tokens)
        largest = max((abs(value) for _, value in pairs), default=0.0)
        width = max(8, *(len(token) for token, _ in pairs))
        lines = [f"{'token':<{width}}  contribution"]
        for token, value in pairs:
            bar = ("+" if value > 0 else "-") * (round(20 * abs(value) / largest) if largest else 0)
            lines.append(f"{token:<{width}}  {value:>+12.4g}  {bar}".rstrip())
        lines.append(f"{'constant':<{width}}  {float(self.constant[i]):>+12.4g}")
        target = int(self.targets[i])
        name = self.class_name(target)
        lines.append(f"{'logit':<{width}}  {float(self.logits[i, target]):>+12.4g}  {name}")
        return "\n".join(lines)

    def html(self, i: int, tokens: Sequence[str] | None = None) -> str:
        """Text i as a piece of HTML: tokens on red where they add to the logit, on blue where they take from it.

        Colours are as strong as the contribution is relative to the text's largest; numbers show under the pointer.
        """
        pairs = self.pairs(i, tokens)
        largest = max((abs(value) for _, value in pairs), default=0.0)
        words = " ".join(
            f'<span style="background: rgba({"214, 39, 40" if value > 0 else "31, 119, 180"}, '
            f'{0.75 * abs(value) / largest if largest else 0:.3f})" title="{value:+.4g}">{escape(token)}</span>'
            for token, value in pairs
        )
        target, predicted = int(self.targets[i]), int(self.logits[i].argmax())
        note = "" if target == predicted else f" (predicted: {escape(self.class_name(predicted))})"
        name = escape(self.class_name(target))
        return (
            f'<section><p class="text">{words}</p>\n<p class="about"><b>{name}</b>{note}: logit '
            f"{float(self.logits[i, target]):.4g} = contributions {float(self.contributions[i].double().sum()):+.4g} "
            f"and constant {float(self.constant[i]):+.4g}</p></section>"
        )

    def page(self, title: str = "Contributions of tokens") -> str:
        """All texts as one HTML page that needs nothing else."""
        key = (
            'Red tokens add to the logit of the class, <span style="background: rgba(31, 119, 180, .5)">blue</span> '
            "ones take from it; the strongest colour of a text is its largest contribution."
        ).replace("Red", '<span style="background: rgba(214, 39, 40, .5)">Red</span>')
        inside = "\n".join(self.html(i) for i in range(len(self)))
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{BODY}{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
            f'<p class="key">{key}</p>\n{inside}\n</body></html>\n'
        )

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return f"<style>{STYLE}</style>" + "".join(self.html(i) for i in range(len(self)))

    def figure(self, i: int, tokens: Sequence[str] | None = None):
        """Text i as a matplotlib figure of horizontal bars, a token each."""
        from matplotlib.figure import Figure

        pairs = self.pairs(i, tokens)
        figure = Figure(figsize=(6, 0.9 + 0.24 * len(pairs)), layout="constrained")
        axes = figure.subplots()
        values = [value for _, value in pairs]
        places = range(len(pairs))
        axes.barh(places, values, color=["#d62728" if value > 0 else "#1f77b4" for value in values])
        axes.set_yticks(places, [token.replace("$", r"\$") for token, _ in pairs])
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        target = int(self.targets[i])
        axes.set_xlabel(f"contribution to the logit of {self.class_name(target)}, {float(self.logits[i, target]):.4g}")
        return figure

    def save(self, folder: str | Path, *, figures: bool = True) -> list[Path]:
        """Write `explanations.html` (all texts), a PNG of bars per text (0000.png, …) and `explanations.json`.

        Args:
            folder: Where to; made if it is missing.
            figures: False leaves out the PNGs, which need matplotlib.

        Returns:
            The files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "explanations.html", folder / "explanations.json"]
        files[0].write_text(self.page(), encoding="utf-8")
        summary = [self._summary(i) for i in range(len(self))]
        files[1].write_text(json_text(summary, indent=2, ensure_ascii=False), encoding="utf-8")
        if figures:
            for i in range(len(self)):
                files.append(folder / f"{i:04d}.png")
                self.figure(i).savefig(files[-1], dpi=110)
        return files

    def _summary(self, i: int) -> dict:
        target, predicted = int(self.targets[i]), int(self.logits[i].argmax())
        return {
            "target": target,
            "predicted": predicted,
            "target_name": self.class_name(target),
            "predicted_name": self.class_name(predicted),
            "logit": float(self.logits[i, target]),
            "contributions": float(self.contributions[i].double().sum()),
            "constant": float(self.constant[i]),
            "tokens": [{"token": token, "contribution": value} for token, value in self.pairs(i)],
        }


def explain_tokens(
    model: BcosifiedText, inputs: Mapping[str, Tensor], targets: Targets = None, *, batch_size: int | None = None
) -> TokenExplanation:
    """What `explain` does for a classifier of texts; see there.

    Args:
        model: made by `bcosify`; it runs in eval and explanation mode and gets its modes back.
        inputs: what its tokenizer returns (`model.tokenize`): input_ids (N, T), and attention_mask, token_type_ids,
            position_ids as far as there are. Tokens without attention_mask are all attended to, padding too.
        targets: classes to explain: one int for all, N ints, or None for the predicted ones.
        batch_size: texts explained at once; default as many as have the tokens of 16 texts of 512.

    Returns:
        A `TokenExplanation` on the device of the inputs.
    """
    checked = model.checked_inputs(inputs)
    ids = checked["input_ids"]
    if batch_size is None:
        batch_size = max(1, _TOKENS_AT_ONCE // ids.shape[1])
    elif batch_size < 1:
        raise ValueError(f"explain: expected batch_size >= 1, got {batch_size}")
    device, parts = inputs["input_ids"].device, []
    with torch.inference_mode(False), evaluation_mode(model), explanation_mode(model):
        targets = checked_targets(targets, ids.shape[0])
        for start in range(0, ids.shape[0], batch_size):
            batch = slice(start, start + batch_size)
            chosen = {name: t.expand(ids.shape[0], -1)[batch].clone() for name, t in checked.items()}
            function, embeddings = model.on_embeddings(chosen)
            logits, weights, constant = dynamic_linear_map(
                function, embeddings, None if targets is None else targets[batch]
            )
            summands = embeddings * weights
            sizes = summands.abs().sum((1, 2))
            explained = logits.argmax(1) if targets is None else targets[batch].to(logits.device)
            parts.append((embeddings, logits, explained, weights, summands.sum(2), constant, sizes))
        *tensors, sizes = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
        mask = checked.get("attention_mask", torch.ones_like(ids))
    names = model.config.get("class_names")
    tokens, names = tuple(map(tuple, model.tokens_of(ids))), None if names is None else tuple(names)
    explanation = TokenExplanation(ids.to(device), mask.to(device), *tensors, tokens, names)
    check_sum(explanation, sizes)
    return explanation
