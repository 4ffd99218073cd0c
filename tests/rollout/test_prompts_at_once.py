"""Sampling fewer prompts at a time changes what exists at once, not what is drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import RolloutConfig
from jgrpo.rollout import Prompts, Rollout, batch, generate
from tests.rollout.conftest import Policy

CONFIG = RolloutConfig(num_generations=4, max_completion_length=40, compaction=False)
LIMITS = jnp.arange(20, dtype=jnp.int32).reshape(5, 4) + 3


def sample(policy: Policy, prompts: Prompts, at_once: int | None, limits=None, **settings) -> Rollout:
    config = dataclasses.replace(CONFIG, prompts_at_once=at_once, **settings)
    return generate(*policy, prompts, jax.random.key(1), config, eos_ids=(5,), pad_id=3, row_limits=limits)


@pytest.mark.parametrize("at_once", [1, 2, 5, 9])
@pytest.mark.parametrize("limits", [None, LIMITS], ids=["free", "limited"])
def test_draws_what_all_at_once_draw(policy: Policy, prompts: Prompts, at_once: int, limits) -> None:
    one, whole = sample(policy, prompts, at_once, limits), sample(policy, prompts, None, limits)
    assert one.completion_tokens.shape == (5, 4, 40)
    for name in (
        "prompt_tokens",
        "prompt_lengths",
        "completion_tokens",
        "completion_mask",
        "completion_lengths",
        "finish",
    ):
        np.testing.assert_array_equal(getattr(one, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(one.logprobs, whole.logprobs, atol=2e-5)


@pytest.mark.parametrize("settings", [dict(kv_cache="int8", compaction=True), dict(rollout_weights="bf16", top_p=0.8)])
def test_with_other_settings_of_the_rollout(policy: Policy, prompts: Prompts, settings: dict) -> None:
    one, whole = (sample(policy, prompts, at_once, LIMITS, **settings) for at_once in (2, None))
    np.testing.assert_array_equal(one.completion_tokens, whole.completion_tokens)


def test_the_parts_share_one_program(policy: Policy, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts of two prompts, of which the last holds one: one shape, compiled once."""
    shapes, program = [], batch.rollout_program

    def recorded(model, base, lora, prompts, key, config, **how):
        shapes.append((prompts.tokens.shape, key.shape, how["row_limits"].shape))
        return program(model, base, lora, prompts, key, config, **how)

    monkeypatch.setattr(batch, "rollout_program", recorded)
    before = program._cache_size()
    sample(policy, prompts, 2, max_completion_length=33)
    assert shapes == [((2, 12), (2, 4), (2, 4))] * 3
    assert program._cache_size() == before + 1
