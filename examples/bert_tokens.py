"""A BERT that says which word decided: train a small one on made-up reviews, B-cosify it, fine-tune, explain.

    python examples/bert_tokens.py [--out bert_tokens] [--steps N] [--finetune-steps N]

A review is a row of neutral words with one word in it that praises or blames ("the plot of this film was dreadful in a
way"); which one it is decides the class. Nothing is downloaded: the tokenizer's vocabulary is made of the words, the
model is drawn at random and trained here.

    original    BertForSequenceClassification (2 layers, width 32), trained with its own loss
    converted   the same, B-cosified, not trained since
    fine-tuned  that after a few more steps, with the loss that the converted model computes

Reported: accuracy on reviews that none of them has seen, and in how many of these the deciding word is the one with the
largest contribution (the original's contributions are input x gradient). Chance is one in the number of tokens.

Written to --out: explanations.html (reviews with coloured words), explanations.json, pictures of bars, table.md, and
the three models and the tokenizer.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import bcosification

GOOD = "wonderful gripping superb moving delightful brilliant charming masterful".split()
BAD = "dreadful boring clumsy tedious awful shallow lifeless painful".split()
NEUTRAL = """the a this that film movie plot story actor scene camera ending music of in with and was is it to at way
 about one two first last long short old new night day city house train letter told shown made seen""".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLASSES = ("negative", "positive")


def reviews(count: int, seed: int) -> tuple[list[str], list[int], list[str]]:
    """Texts of 6 to 14 words, their classes, and the words that decided them."""
    draw = random.Random(seed)
    texts, labels, words = [], [], []
    for _ in range(count):
        label = draw.randrange(2)
        deciding = draw.choice(GOOD if label else BAD)
        row = draw.choices(NEUTRAL, k=draw.randint(5, 13))
        row.insert(draw.randint(0, len(row)), deciding)
        texts.append(" ".join(row))
        labels.append(label)
        words.append(deciding)
    return texts, labels, words


def tokenizer_of(folder: Path) -> BertTokenizerFast:
    """A WordPiece tokenizer whose vocabulary is the words above, and single letters."""
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = list(dict.fromkeys([*SPECIAL, *GOOD, *BAD, *NEUTRAL, *letters, *(f"##{c}" for c in letters)]))
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return BertTokenizerFast(str(file))


def small_bert(tokenizer: BertTokenizerFast, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, id2label=dict(enumerate(CLASSES)), label2id={c: i for i, c in enumerate(CLASSES)},
    )  # fmt: skip
    return BertForSequenceClassification(config)


def train(model: torch.nn.Module, tokenizer: BertTokenizerFast, steps: int, rate: float, seed: int) -> None:
    """Steps of AdamW on new reviews each, with the loss that the model itself computes; ends in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        texts, labels, _ = reviews(32, seed=seed + step)
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        optimizer.zero_grad()
        model(**inputs, labels=torch.tensor(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def input_x_gradient(model: BertForSequenceClassification, inputs, targets: torch.Tensor) -> torch.Tensor:
    """What is left to a plain model: Σ over the width of embedding x gradient, (N, T)."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    logits = model(inputs_embeds=embeddings, **rest).logits
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), embeddings)
    return (embeddings * gradient).sum(2).detach()


def measure(model: torch.nn.Module, tokenizer: BertTokenizerFast, count: int = 400) -> dict[str, float]:
    """Accuracy, and the share of reviews whose deciding word has the largest contribution to the true class."""
    texts, labels, words = reviews(count, seed=10**6)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    targets = torch.tensor(labels)
    if isinstance(model, bcosification.BcosifiedText):
        explanation = bcosification.explain(model, inputs, targets)
        logits, contributions = explanation.logits, explanation.contributions
    else:
        with torch.no_grad():
            logits = model(**inputs).logits
        contributions = input_x_gradient(model, inputs, targets)
    real = inputs["attention_mask"].bool()
    largest = contributions.masked_fill(~real, -torch.inf).argmax(1)
    found = inputs["input_ids"][torch.arange(count), largest]
    deciding = torch.tensor(tokenizer.convert_tokens_to_ids(words))
    return {
        "accuracy": float((logits.argmax(1) == targets).double().mean()),
        "deciding word first": float((found == deciding).double().mean()),
        "chance": float((1 / real.sum(1).double()).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bert_tokens"), help="where to (default: bert_tokens)")
    parser.add_argument("--steps", type=int, default=300, help="of the original's training (default: 300)")
    parser.add_argument("--finetune-steps", type=int, default=300, help="after the conversion (default: 300)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    tokenizer = tokenizer_of(arguments.out)
    original = small_bert(tokenizer)
    train(original, tokenizer, arguments.steps, 2e-3, seed=0)
    original.save_pretrained(arguments.out / "original")
    tokenizer.save_pretrained(arguments.out / "original")
    rows = {"original": measure(original, tokenizer)}

    # As for a model of one's own: the folder's model and tokenizer.
    model = bcosification.bcosify(bcosification.resolve(f"transformers:{arguments.out / 'original'}")[0])
    sample = model.tokenize(reviews(4, seed=10**6)[0])
    report = bcosification.verify(original, model, sample)
    print(f"verified: {report.ok} (error at B = 1, biases kept: {report.equivalence.error:.1e})")
    model.save_pretrained(arguments.out / "converted")
    rows["converted"] = measure(model, tokenizer)
    train(model, tokenizer, arguments.finetune_steps, 2e-3, seed=10**5)
    model.save_pretrained(arguments.out / "fine-tuned")
    rows["fine-tuned"] = measure(model, tokenizer)

    names = list(rows["original"])
    table = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    table += [f"| {name} | " + " | ".join(f"{100 * row[n]:.1f} %" for n in names) + " |" for name, row in rows.items()]
    (arguments.out / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))

    explanation = bcosification.explain(model, model.tokenize(reviews(12, seed=10**6 + 1)[0]))
    explanation.save(arguments.out)
    print(f"\n{explanation.table(0)}\n\n{arguments.out / 'explanations.html'}: 12 reviews with coloured words")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
