"""The examples do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jgrpo.cli import resolve_config
from jgrpo.training.loop import train

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_custom_loss(capsys):
    state = load("custom_loss").main()
    assert state.step == 3
    assert any(jnp.any(module["b"] != 0) for module in jax.device_get(state.lora).values())
    assert capsys.readouterr().out.count("reward") == 3


def test_custom_reward_functions_train(tiny_run, tmp_path):
    """The example's functions on the tests' tiny checkpoint (its main runs the demo)."""
    example = load("custom_reward")
    settings = {**tiny_run, "reward_functions": (), "reward_weights": (1.0, 0.5), "steps": 1, "eval_every": 0}
    config = resolve_config(overrides={**settings, "output_dir": str(tmp_path / "run")})
    state = train(config, reward_functions=[example.closed_tags, example.brevity])
    assert state.step == 1
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "rewards/closed_tags/mean" in first
    assert "rewards/brevity/mean" in first


def test_custom_reward_command_line():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "custom_reward.py", "--steps", "zero"], capture_output=True, text=True, check=False
    )
    assert "steps" in done.stderr
    assert done.returncode != 0


def test_calculator_writes_values_behind_equals_signs():
    calculator = load("calculator_tool").Calculator()
    calculator.reset({})
    turns = ["<think>\n(3 * 4 =", " * 5 =", " no\n5 - (3 + 1 =", " =", " yes\n</think>\n<answer>5 - (3 + 1)</answer>"]
    assert [calculator.step(turn) for turn in turns] == [" 12)", " 60", " 4)", " 1", None]
    calculator.reset({})
    assert calculator.step("nonsense =") == " ?"


def test_calculator_trains(tiny_run, tmp_path):
    """The example's environment on the tests' tiny checkpoint (its main runs the demo)."""
    settings = {**tiny_run, "steps": 1, "eval_every": 0, "round_length": 4, "output_dir": str(tmp_path / "run")}
    assert train(resolve_config(overrides=settings), environment=load("calculator_tool").Calculator).step == 1
