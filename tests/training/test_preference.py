"""The online DPO step: an oracle for its loss and gradient, and invariance to how pairs are batched."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.algorithms import objective_from_config
from jgrpo.training.forward import rows_of
from jgrpo.training.preference import largest_divisor, online_dpo_step, slice_pairs
from tests.training.setup import (
    GENERATIONS,
    MODEL,
    QUESTIONS,
    assert_trees_equal,
    batch,
    rollout,
    settings,
    state,
    tiny_base,
    token_logprobs,
    trained_lora,
)

BETA = 0.1


def step(config, data, reference=None, base=None):
    before, optimizer = state(trained_lora(), config)
    before = before.replace(reference=jax.tree.map(jnp.copy, reference or {}))
    kept = jax.tree.map(np.asarray, (before.lora, before.opt_state))
    after, metrics = online_dpo_step(before, base or tiny_base(), data, model=MODEL, optimizer=optimizer, config=config)
    return kept, after, {name: float(value) for name, value in metrics.items()}


def tied(data):
    """Question 1 without a pair: its rewards are equal."""
    return data.replace(rewards=data.rewards.at[1].set(0.5))


@cache
def gradient(size, scale=8.0):
    config = settings(algorithm="online_dpo", microbatch_size=size, max_grad_norm=1e9)
    _, after, metrics = step(config, tied(batch()), base=tiny_base(scale))
    return after.opt_state[1].inner_state[0].mu, metrics


def test_loss_is_that_of_the_formula():
    """−log σ(β z) averaged over the three questions whose rewards differ, in float64 from the two policies' log-probabilities."""
    data = tied(batch())
    mask = np.asarray(data.rollout.completion_mask, bool)
    sums = [
        (
            np.asarray(token_logprobs(MODEL, tiny_base(), lora, rows_of(rollout()))[0], np.float64).reshape(mask.shape)
            * mask
        ).sum(-1)
        for lora in (trained_lora(), {})
    ]
    gains, rewards = sums[0] - sums[1], np.asarray(data.rewards)
    z = np.array([gains[q, rewards[q].argmax()] - gains[q, rewards[q].argmin()] for q in (0, 2, 3)])
    metrics = gradient(QUESTIONS * GENERATIONS)[1]
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(-BETA * z)).mean(), rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx(BETA * z.mean(), rel=1e-3)
    assert metrics["rewards/accuracies"] == pytest.approx((z > 0).mean())
    assert metrics["pairs/valid"] == 0.75


def test_split_into_microbatches_does_not_matter():
    # At scale 1 the problem is well conditioned: what differs is the split's doing, not amplified rounding.
    (whole, expected), (split, got) = gradient(QUESTIONS * GENERATIONS, 1.0), gradient(2, 1.0)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, whole, split)) <= 2e-6 * optax.tree.norm(whole)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_ties_alone_change_nothing_and_the_reference_starts_at_log_2():
    """With every group tied the update is skipped; with the policy as its own reference z is 0."""
    config = settings(algorithm="online_dpo", weight_decay=0.1)
    data = batch().replace(rewards=jnp.ones((QUESTIONS, GENERATIONS)))
    before, after, metrics = step(config, data, reference=trained_lora())
    assert_trees_equal(before, (after.lora, after.opt_state))
    assert (metrics["updates/skipped"], metrics["loss"], metrics["pairs/valid"]) == (1, 0, 0)
    _, _, same = step(config, batch(), reference=trained_lora())
    assert same["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert same["rewards/margins"] == 0


def test_pairs_keep_their_completions():
    data, size = tied(batch()), 4
    slices = slice_pairs(data, objective_from_config(settings().algorithm), 2, size)
    assert slices.mask.shape[:3] == (2, 1, 4)
    tokens = slices.rows.completion_tokens.reshape(QUESTIONS, 2, -1)
    best, worst = data.rewards.argmax(1), data.rewards.argmin(1)
    for question in (0, 2, 3):
        ours, drawn = tokens[question], data.rollout.completion_tokens[question]
        np.testing.assert_array_equal(ours, drawn[jnp.stack([best, worst], 1)[question]])
    np.testing.assert_array_equal(slices.weights.reshape(-1), [1, 0, 0.5, 0.5])


def test_missing_rewards_make_no_pair():
    data = batch().replace(rewards=batch().rewards.at[0].set(jnp.nan).at[1, 1:].set(jnp.nan))
    slices = slice_pairs(data, objective_from_config(settings().algorithm), 1, 16)
    np.testing.assert_array_equal(slices.weights.reshape(-1) > 0, [False, False, True, True])


@pytest.mark.parametrize(("total", "bound", "expected"), [(12, 5, 4), (7, 6, 1), (8, 100, 8), (6, 0, 1)])
def test_largest_divisor(total, bound, expected):
    assert largest_divisor(total, bound) == expected
