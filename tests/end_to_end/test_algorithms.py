"""Whole runs of the algorithms beside GRPO, and of what the loop does around a step."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jgrpo.cli import resolve_config
from jgrpo.training.loop import train
from tests.end_to_end.rewards import vowels


def configured(settings, output_dir, **changes):
    quiet = {"eval_every": 0, "save_every": 0, "log_completions_every": 1, "reward_functions": ()}
    return resolve_config(overrides={**settings, **quiet, "output_dir": str(output_dir), **changes})


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def rows(directory, step):
    text = (directory / "completions" / f"step_{step:06}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_ppo_goes_on_after_a_stop_as_if_there_had_been_none(tiny_run, tmp_path):
    """Critic, adapted beta and optimizer come back from the checkpoint: four steps equal two and two."""
    changes = {"algorithm": "ppo", "beta": 0.05, "kl_target": 0.01, "kl_horizon": 100, "num_minibatches": 2}
    whole = train(configured(tiny_run, tmp_path / "whole", steps=4, **changes), [vowels])
    config = configured(tiny_run, tmp_path / "parts", steps=2, **changes)
    train(config, [vowels])
    training = dataclasses.replace(config.training, steps=4)
    rest = dataclasses.replace(config, training=training, run=dataclasses.replace(config.run, resume=True))
    resumed = train(rest, [vowels])
    for name in ("lora", "critic", "coefficients", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, name), getattr(resumed, name))
    assert np.any(np.asarray(whole.critic["head"]["weight"]) != 0)
    written = lines(tmp_path / "parts")
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    assert written[0]["kl"] == pytest.approx(0, abs=1e-6)
    # The KL is far below its target at first, so beta falls.
    assert written[1]["coefficients/beta"] < written[0]["coefficients/beta"] == pytest.approx(0.05)
    assert {"value/loss", "value/explained_variance", "clip_ratio/region_mean"} <= set(written[0])


def sometimes(completions, answer, **_):
    """Question 0 and 1 of eight tell completions apart; the rest give everyone the same."""
    return [
        sum(map(ord, text)) % 97 / 97 if int(number) < 2 else 0.5
        for text, number in zip(completions, answer, strict=True)
    ]


def test_refill_greedy_baseline_and_a_moving_reference(tiny_run, tmp_path):
    """Eight prompts, four a step, two of them informative: two rollouts a step, an epoch a step, both in the batch."""
    changes = {"max_generation_batches": 2, "filter_zero_variance": True, "advantage_estimator": "remax"}
    changes |= {"reference_sync_steps": 1, "beta": 0.1, "top_entropy_quantile": 0.5, "num_minibatches": 1}
    state = train(configured(tiny_run, tmp_path / "run", steps=2, **changes), [sometimes])
    written = lines(tmp_path / "run")
    assert [row["dynamic_sampling/batches"] for row in written] == [2, 2]
    assert [row["dynamic_sampling/frac_informative"] for row in written] == [0.25, 0.25]
    assert [row["epoch"] for row in written] == [1, 2]
    # Synced after every step, the reference is the policy that each step starts from.
    assert [row["kl"] for row in written] == pytest.approx([0, 0], abs=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.lora, state.reference)
    assert any(np.any(np.asarray(module["b"]) != 0) for module in state.lora.values())
    for step in (1, 2):
        groups = [rows(tmp_path / "run", step)[start : start + 4] for start in range(0, 16, 4)]
        assert sorted(group[0]["prompt"] for group in groups[:2]) == ["question 0", "question 1"]
        for group in groups:  # One greedy completion for the group: reward − advantage is the same in all rows.
            baselines = [row["rewards"]["sometimes"] - row["advantage"] for row in group]
            assert np.ptp(baselines) == pytest.approx(0, abs=1e-6)
        assert all(row["advantage"] == 0 for group in groups[2:] for row in group)


def test_rloo_takes_the_kl_off_the_reward(tiny_run, tmp_path):
    """Group sums of RLOO's advantages are 0 with the KL inside; without the KL they would be those of the rewards alone."""
    train(configured(tiny_run, tmp_path / "run", steps=2, algorithm="rloo", beta=2.0, overlong_buffer=4), [vowels])
    second = rows(tmp_path / "run", 2)
    advantages = np.array([row["advantage"] for row in second]).reshape(4, 4)
    rewards = np.array([row["rewards"]["vowels"] for row in second]).reshape(4, 4)
    lengths = np.array([row["length"] for row in second]).reshape(4, 4)
    shaped = rewards + np.clip((8 - 4 - lengths) / 4, -1, 0)
    alone = (shaped - shaped.mean(1, keepdims=True)) * 4 / 3
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-5)
    assert np.abs(advantages - alone).max() > 1e-3
    first = rows(tmp_path / "run", 1)
    assert lines(tmp_path / "run")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines(tmp_path / "run")[1]["kl"] != 0
    assert len(first) == 16
