"""Every preset is a recipe that runs, stays overridable, and stands in the documentation's last column."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jgrpo.cli import load_config, resolve_config
from jgrpo.config import RewardConfig
from jgrpo.errors import UserError
from jgrpo.rewards import resolve_rewards
from jgrpo.settings import preset_names, preset_path
from jgrpo.training.loop import train
from tests.end_to_end.rewards import vowels

RECIPES = [name for name in preset_names() if name != "demo"]
DOCS = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", RECIPES)
def test_preset_trains(preset, tiny_run, tmp_path):
    """Two steps in which the adapter moves, from the preset's own objective."""
    settings = {**tiny_run, "steps": 2, "eval_every": 0, "save_every": 0, "log_completions_every": 0}
    # online_dpo makes no pairs of completions that were cut off, and a random model seldom draws its EOS.
    if preset == "online_dpo":
        settings |= {"stop_token_ids": tuple(range(60))}
    config = resolve_config(preset=preset, overrides={**settings, "output_dir": str(tmp_path / "run")})
    assert config.algorithm == load_config(preset_path(preset)).algorithm
    state = train(config, reward_functions=[vowels])
    assert state.step == 2
    assert all(np.any(np.asarray(module["b"]) != 0) for module in state.lora.values())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(row["loss"]) and row["updates/skipped"] == 0 for row in map(json.loads, lines))


@pytest.mark.parametrize("preset", RECIPES)
def test_preset_is_overridden_field_by_field(preset):
    plain, changed = (resolve_config(preset=preset, overrides=o) for o in ({}, {"epsilon": 0.1, "num_minibatches": 1}))
    assert changed.algorithm.epsilon == 0.1
    assert changed.algorithm.aggregation == plain.algorithm.aggregation


def table_rows():
    """{first cell: last cell} of every table."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in DOCS.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[-1].strip() for row in rows}


def rows_naming(preset):
    return {first for first, presets in table_rows().items() if preset in re.split(", ", presets)}


OWN_ROWS = {
    "ppo": {"token rewards", "GAE", "whitening", "value loss", "`token`", "`clipped`", "`bnpo`"},
    "online_dpo": {"pairs", "`sigmoid`", "truncated completions"},
}
"""Rows of algorithms that do not have the group's advantages."""


@pytest.mark.parametrize("preset", RECIPES)
def test_documentation_says_what_the_preset_uses(preset):
    config = load_config(preset_path(preset))
    chosen = config.algorithm
    if chosen.algorithm in OWN_ROWS:
        assert rows_naming(preset) == OWN_ROWS[chosen.algorithm]
        return
    scale = f", `scale_rewards: {chosen.scale_rewards}`" if chosen.advantage_estimator == "grpo" else ""
    names = {f"`{chosen.advantage_estimator}`{scale}", f"`{chosen.importance_sampling_level}`"}
    names |= {f"`{chosen.loss_type}`", f"`{chosen.aggregation}`"}
    kl = "`kl_in_reward`" if chosen.algorithm == "rloo" else f"`{chosen.kl_estimator}`"
    names |= {kl} if chosen.beta else set()
    names |= {"dynamic sampling"} if chosen.max_generation_batches > 1 else set()
    names |= {"zero-variance filter"} if chosen.filter_zero_variance else set()
    names |= {"soft overlong penalty"} if "soft_overlong" in config.reward.reward_functions else set()
    assert rows_naming(preset) == names


def test_task_stands_for_the_tasks_own_rewards():
    config = RewardConfig(reward_functions=("task", "soft_overlong"), reward_weights=(2.0, 0.5))
    rewards = resolve_rewards(config, ("gsm8k", "integer_answer"))
    assert [(r.name, r.weight) for r in rewards] == [("gsm8k", 2.0), ("integer_answer", 2.0), ("soft_overlong", 0.5)]
    with pytest.raises(UserError, match="reward_functions is task, soft_overlong, and the data set brings none"):
        resolve_rewards(config)
