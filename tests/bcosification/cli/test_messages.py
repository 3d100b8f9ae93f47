"""The library's messages in the command's options."""

import argparse

import pytest

from bcosification.cli import main, parser
from bcosification.cli.messages import in_options
from bcosification.convert.rules import RULES


def test_messages_name_options(monkeypatch):
    """How every way in which the library writes a parameter reads for a user of the command."""
    commands = {}
    monkeypatch.setattr(
        argparse.ArgumentParser, "set_defaults", lambda self, **d: commands.update({d["parser"].prog: d["parser"]})
    )
    parser()
    for command, text, expected in (
        ("convert", "bcosify: expected mean= and std=, got mean=None and std=0.5",
         "expected --mean and --std, got no --mean and --std 0.5"),
        ("convert", "bcosify: on_unknown='keep' leaves them", "--on-unknown keep leaves them"),
        ("convert", "resolve: weights=FILE or pretrained=False, not pretrained=True",
         "--weights FILE or --no-pretrained, not no --no-pretrained"),
        ("convert", "expected model=, a network, or inverse=False", "expected model= in Python, a network, or "
         "inverse=False in Python"),
        ("explain", "load: expected model=, the network, got None", "expected model= in Python, the network, got None"),
        ("finetune", "finetune: expected model='a'; got mean=[0.5, 0.5]", "expected --model a; got --mean [0.5, 0.5]"),
        ("finetune", "output: expected a folder, got x", "--out: expected a folder, got x"),
        ("finetune", "data: expected one of these", "--data: expected one of these"),
        ("finetune", "recipe mine: expected lr to be float", "recipe mine: expected lr to be float"),
        ("finetune", "data/mean=3: no 'b=2' in x.mean=4 there", "data/mean=3: no 'b=2' in x.mean=4 there"),
        ("explain", "explain: expected targets in (0, 1)", "expected --target in (0, 1)"),
        ("verify", "verify: expected images (N, 3, H, W) in [0, 1]", "expected images (N, 3, H, W) in [0, 1]"),
    ):  # fmt: skip
        assert in_options(text, commands[f"bcosify {command}"]) == expected


def test_warnings_are_one_line_with_options(tmp_path, capsys):
    arguments = ["convert", "squeezenet1_1", "--no-pretrained", "--head", "keep", "--out", str(tmp_path / "x")]
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(RULES, "torch.nn.modules.pooling.AdaptiveAvgPool2d")
        assert main([*arguments, "--on-unknown", "keep"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("bcosify convert: warning: 1 layer without a rule is kept as it is; explanations may not")
