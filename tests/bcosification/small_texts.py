"""Small encoders with a sequence classifier, random weights in which a mistake shows, and texts for them."""

import torch
import transformers

from bcosification.convert.families import FAMILIES
from bcosification.convert.family_checks import randomized

NAMES = ["bert", "roberta", "xlm_roberta", "distilbert"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film the ##s is was not very dull fine".split()


def family(name):
    return next(f for f in FAMILIES.values() if f.name == f"huggingface_{name}")


def classifier(name="bert", seed=0, attention="sdpa", **config):
    """In float64 and eval mode, of 2 layers, width 16, 40 tokens and 3 classes."""
    kind = family(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        labels = {str(i): f"LABEL_{i}" for i in range(3)}
        model = randomized(kind.build({**kind.sizes, "id2label": labels, **config}), seed)
    model.set_attn_implementation(attention)
    return model


def inputs(name="bert"):
    """Two texts of 9 and 6 tokens, what a tokenizer gives for them."""
    return family(name).example_inputs(classifier(name))


def tokenizer(folder):
    """A WordPiece tokenizer of the words above."""
    file = folder / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return transformers.BertTokenizerFast(str(file))


def saved(folder, **config):
    """The folder of a small BERT with its tokenizer, as save_pretrained writes it; classes negative and positive."""
    names = {"id2label": {"0": "negative", "1": "positive"}, "vocab_size": len(WORDS)}
    model = classifier(**{**names, **config}).float()
    model.save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return folder


def error(got, expected):
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())
