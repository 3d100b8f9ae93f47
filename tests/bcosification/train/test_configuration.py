"""Recipes, and configurations as YAML files."""

import os

import pytest
import yaml

from bcosification.train.configuration import FinetuneConfig, load_recipe, recipes
from bcosification.train.run_folder import saved_config


def test_recipes_are_complete_configurations():
    assert {"digits", "scenes", "imagenet_resnet50", "imagenet_densenet121", "imagenet_vit_b16"} <= set(recipes())
    for name in recipes():
        values = {"data": "digits", "output": "x"} | load_recipe(name)
        FinetuneConfig(**values).check()
    paper = load_recipe("imagenet_resnet50")
    assert (paper["lr"], paper["epochs"], paper["loss"], paper["optimizer"]) == (1e-4, 90, "bce_uniform", "adam")


def test_own_recipe_and_its_errors(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1e-4\nepochs: 5\nconversion:\n  pool: keep\n")  # YAML reads 1e-4 as a string
    assert load_recipe(str(file)) == {"lr": 1e-4, "epochs": 5, "conversion": {"pool": "keep"}}
    for text, message in (
        ("learning_rate: 1", "expected options among .*got 'learning_rate'"),
        ("epochs: many", "expected epochs to be int, got 'many'"),
        ("epochs: 1.5", "expected epochs to be int, got 1.5"),
        ("compile: 1", "expected compile to be bool, got 1"),
        ("lr:", "expected lr to be float, got None"),
        ("- 1", "expected a mapping of options, got list"),
        ("lr: [", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(str(file))
    with pytest.raises(FileNotFoundError, match="expected a YAML file or one of digits, .*got 'nothing'"):
        load_recipe("nothing")


def test_configuration_survives_yaml(tmp_path):
    config = FinetuneConfig(
        data="digits", output=str(tmp_path), model="resnet18", agc=0.01, precision="bf16-mixed", b=1.7
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert saved_config(tmp_path) == config
    assert yaml.safe_load(config.to_yaml())["agc"] == 0.01
    assert os.listdir(tmp_path) == ["config.yaml"]
