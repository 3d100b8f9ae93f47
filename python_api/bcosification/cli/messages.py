"""The library's messages in the words of the command: options for Python's parameters."""

from __future__ import annotations

import argparse
import re

# What the library's messages begin with: the function that speaks, which the user of a command did not call.
SPEAKERS = ("bcosify", "resolve", "load", "finetune", "distill", "explain", "evaluate", "verify", "benchmark")
SPEAKERS += ("families", "sweep", "explanation picture", "set_attention_pool")
# Parameters that are named otherwise on the command line.
RENAMED = {"targets": "target", "output": "out"}
# Parameters that no command has an option for.
PYTHON_ONLY = ("model", "inverse", "normalize_input", "logit_bias", "conversion", "num_classes")
_VALUE = r"""'[^']*'|"[^"]*"|\[[^\]]*\]|[\w.+-]+"""


def in_options(text: str, parser: argparse.ArgumentParser) -> str:
    """A message of the library, whose parameters are Python's, in the options of a command.

    The library writes a parameter as NAME=VALUE or NAME=, at the beginning ("output: …"), or after "expected" and
    before what is expected of it ("expected batch_size >= 1"); these become "--batch-size". Quoted words, which the
    user gave, stay. Messages about a file of options keep the names that the file uses.
    """
    if re.match(r"recipe\b|.*config\.yaml: ", text):
        return text
    speaker, separator, rest = text.partition(": ")
    if separator and speaker in SPEAKERS:
        text = rest
    options = {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "model_option")
    }
    options |= {name: options[dest] for name, dest in RENAMED.items() if dest in options}

    def option(name: str) -> str | None:
        return options[name].option_strings[-1] if name in options else None

    def assigned(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        flag = option(name)
        if flag is None or (name == "model" and not value):  # a MODEL is a name, Python's model= a network
            return f"{match[0]} in Python" if name in PYTHON_ONLY else match[0]
        if not value:
            return flag
        if value == "None":
            return f"no {flag}"
        if options[name].nargs == 0:  # a flag: its constant is what it means
            return flag if value == str(options[name].const) else f"no {flag}"
        return f"{flag} {value.strip(chr(39) + chr(34))}"

    def after_expected(match: re.Match) -> str:
        return f"expected {option(match['name']) or match['name']}"

    text = re.sub(rf"(?<![\w'\"/.-])(?P<name>[a-z]\w*)=(?P<value>{_VALUE})?", assigned, text)
    text = re.sub(r"\bexpected (?P<name>[a-z]\w*)(?= (?:[<>]|to be\b|in \(|between\b))", after_expected, text)
    return re.sub(r"^(?P<name>[a-z]\w*)(?=: )", lambda match: option(match["name"]) or match[0], text)
