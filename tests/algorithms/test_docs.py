"""docs/algorithms.md names functions and settings that exist, leaves none out, and its example runs."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from jgrpo.config import AlgorithmConfig
from tests.algorithms.test_registry import CHOICES

TEXT = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
FUNCTIONS = sorted(set(re.findall(r"`([a-z_]+)\.([a-z_0-9]+)`", TEXT)) - {("config", "algorithm"), ("registry", "py")})
TRAINING = sorted(set(re.findall(r"`training\.([a-z_]+)\.([a-z_0-9]+)`", TEXT)))
# How often a batch is used, which the training step's documentation describes.
OF_THE_LOOP = {"num_iterations", "num_minibatches"}


@pytest.mark.parametrize(("module", "function"), [pair for pair in FUNCTIONS if pair[0] not in ("jgrpo", "training")])
def test_functions_exist(module, function):
    assert callable(getattr(importlib.import_module(f"jgrpo.algorithms.{module}"), function))


@pytest.mark.parametrize(("module", "function"), TRAINING)
def test_functions_of_the_loop_exist(module, function):
    assert callable(getattr(importlib.import_module(f"jgrpo.training.{module}"), function))


@pytest.mark.parametrize("name", sorted({f.name for f in fields(AlgorithmConfig)} - OF_THE_LOOP))
def test_every_setting_is_documented(name):
    assert f"`{name}" in TEXT


@pytest.mark.parametrize(
    "choice", sorted({c for choices in CHOICES.values() for c in choices} - {"none", "batch", "group"})
)
def test_every_choice_is_documented(choice):
    assert f"`{choice}`" in TEXT


def test_the_example_runs():
    scope = {}
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1), scope)
    assert float(scope["loss"]) == pytest.approx(1.0)
