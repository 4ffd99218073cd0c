"""A run whose completions are conversations: with an environment, and with tools that go into the system message."""

import json

import jax
import pytest

from jgrpo import evaluate
from jgrpo.cli import resolve_config
from jgrpo.errors import UserError
from jgrpo.training.loop import train
from tests.rollout.environments import Echo

HERE = "tests.rollout.environments"


def configured(settings, output_dir, **changes):
    return resolve_config(overrides={**settings, "output_dir": str(output_dir), **changes})


def completions(directory, step):
    return [json.loads(line) for line in (directory / "completions" / f"step_{step:06}.jsonl").read_text().splitlines()]


class Interrupting(Echo):
    """Any vowel ends the turn: a random model writes one soon."""

    stop_strings = tuple("aeiouAEIOU")
    turns, answer = 2, "~~"


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    settings = {**tiny_run, "steps": 2, "max_completion_length": 16, "max_turns": 3, "eval_every": 2}
    state = train(configured(settings, directory), environment=Interrupting)
    return directory, state


def test_run_with_an_environment(finished):
    directory, state = finished
    assert state.step == 2
    assert any((jax.device_get(module["b"]) != 0).any() for module in state.lora.values())
    texts = [row["completion"] for step in (1, 2) for row in completions(directory, step)]
    assert sum("~~" in text for text in texts) >= 4
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert metrics[1]["sampling/sampling_logp_difference/mean"] < 1e-4  # of the model's tokens only


def test_run_with_tools(tiny_run, tmp_path):
    settings = {**tiny_run, "tools": (f"{HERE}.add",), "steps": 1, "eval_every": 0}
    # The byte-level tokenizer makes the description long; the prompts are strings, which become user messages.
    settings |= {"system_prompt": "Count.", "max_completion_length": 8, "overlong_prompts": "truncate"}
    settings |= {"max_prompt_length": 240}
    config = configured(settings, tmp_path / "run")
    train(config)
    (first, *_) = completions(tmp_path / "run", 1)
    assert "<tool_call>" in first["prompt"]


def test_evaluate_meets_the_same_environment(tiny_run, tmp_path, capsys):
    """The environment of a configuration file is the evaluation's too."""
    settings = {k: v for k, v in tiny_run.items() if k in ("model", "dataset", "eval_dataset", "group_size")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    flags += [f"--environment={HERE}.Echo", "--samples=0", "--max-prompt-length=16", "--max-completion-length=8"]
    assert evaluate.main([*flags, "--reward-functions", "tests.end_to_end.rewards.vowels"]) == 0
    assert "greedy" in capsys.readouterr().out


def test_tools_and_an_environment(tiny_run, tmp_path):
    with pytest.raises(UserError, match="--tools and --environment are both given"):
        configured(tiny_run, tmp_path, tools=(f"{HERE}.add",), environment=f"{HERE}.Echo")


def test_tool_that_is_not_there(tiny_run, tmp_path):
    with pytest.raises(UserError, match="no function or class 'subtract'"):
        train(configured({**tiny_run, "tools": (f"{HERE}.subtract",)}, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
