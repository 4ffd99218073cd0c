"""The PPO step: advantages and losses against loops in float64, the critic learns, microbatches do not matter."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.training import TrainState
from jgrpo.training.forward import rows_of
from jgrpo.training.ppo import init_critic, ppo_step, token_values
from tests.training.setup import (
    GENERATIONS,
    LORA,
    MODEL,
    MODEL_CONFIG,
    QUESTIONS,
    assert_trees_equal,
    batch,
    cached_optimizer,
    rollout,
    settings,
    tiny_base,
    token_logprobs,
    trained_lora,
)

ROWS = QUESTIONS * GENERATIONS
GAMMA, LAM, COEF = 0.9, 0.8, 0.1


@cache
def critic():
    """A critic that has learned something: its head is not 0."""
    fresh = init_critic(jax.random.key(7), LORA, MODEL_CONFIG)
    weight = 0.1 * jax.random.normal(jax.random.key(8), fresh["head"]["weight"].shape)
    return {**fresh, "head": {"weight": weight, "bias": jnp.asarray(0.2)}}


def configured(**changes):
    return settings(algorithm="ppo", gae_gamma=GAMMA, gae_lambda=LAM, value_coef=COEF, max_grad_norm=1e9, **changes)


def begin(config, critic_params):
    optimizer = cached_optimizer(config.optimizer)
    lora, critic_params = jax.tree.map(jnp.copy, (trained_lora(), critic_params))
    return TrainState.create(lora, optimizer, jax.random.key(0), critic_params), optimizer


def run(config, data, critic_params=None, steps=1, base=None):
    current, optimizer = begin(config, critic_params or critic())
    kept = jax.tree.map(np.asarray, (current.lora, current.critic, current.opt_state))
    history = []
    for _ in range(steps):
        current, metrics = ppo_step(current, base or tiny_base(), data, model=MODEL, optimizer=optimizer, config=config)
        history.append({name: float(value) for name, value in metrics.items()})
    return kept, current, history


@cache
def on_policy(size, scale=8.0):
    config = configured(microbatch_size=size, beta=0.05)
    _, after, history = run(config, batch(), base=tiny_base(scale))
    return after.opt_state[1].inner_state[0].mu, history[0]


def arrays(lora):
    rows = rows_of(rollout())
    return np.asarray(token_logprobs(MODEL, tiny_base(), lora, rows)[0], np.float64), np.asarray(rows.completion_mask)


def test_loss_is_that_of_the_formula():
    """Token rewards, GAE, whitening and both losses from loops; ratio 1 and V = V_old at the first update."""
    (logprobs, mask), (ref, _) = arrays(trained_lora()), arrays({})
    values = np.asarray(
        jax.jit(token_values, static_argnums=0)(MODEL, tiny_base(), critic(), rows_of(rollout())), np.float64
    )
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row, score in enumerate(np.asarray(batch().rewards).reshape(-1)):
        length, following, next_value = mask[row].sum(), 0.0, 0.0
        for t in reversed(range(length)):
            reward = -0.05 * (logprobs[row, t] - ref[row, t]) + (score if t == length - 1 else 0.0)
            following = reward + GAMMA * next_value - values[row, t] + GAMMA * LAM * following
            next_value = values[row, t]
            advantages[row, t], returns[row, t] = following, following + values[row, t]
    kept = advantages[mask]
    whitened = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
    value_loss = 0.5 * (values - returns)[mask] ** 2
    metrics = on_policy(ROWS)[1]
    assert metrics["loss"] == pytest.approx(-whitened.mean() + COEF * value_loss.mean(), rel=1e-3)
    assert metrics["value/loss"] == pytest.approx(value_loss.mean(), rel=1e-3)
    assert metrics["kl"] == pytest.approx((logprobs - ref)[mask].mean(), rel=1e-3)
    explained = 1 - (returns - values)[mask].var() / returns[mask].var()
    assert metrics["value/explained_variance"] == pytest.approx(explained, abs=1e-3)


def test_split_into_microbatches_does_not_matter():
    (whole, expected), (split, got) = on_policy(ROWS, 1.0), on_policy(4, 1.0)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, whole, split)) <= 2e-6 * optax.tree.norm(whole)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_the_critic_learns_the_scores_and_the_policy_moves():
    """On one batch over and over, from V = 0: the error of the values before an update falls to less than half."""
    data = batch().replace(rewards=jnp.full((QUESTIONS, GENERATIONS), 0.7))
    fresh = init_critic(jax.random.key(7), LORA, MODEL_CONFIG)
    kept, after, history = run(configured(num_iterations=2), data, fresh, steps=6)
    assert history[0]["value/mean"] == 0
    assert history[-1]["value/loss"] < 0.5 * history[0]["value/loss"]
    assert any(jnp.any(m["b"] != 0) for m in after.critic["lora"].values())
    assert any(np.any(np.asarray(after.lora[name]["b"]) != kept[0][name]["b"]) for name in after.lora)


def test_completions_without_a_reward_alone_change_nothing():
    data = batch().replace(rewards=jnp.full((QUESTIONS, GENERATIONS), jnp.nan))
    kept, after, history = run(configured(num_iterations=2), data)
    assert_trees_equal(kept, (after.lora, after.critic, after.opt_state))
    assert (history[0]["updates/skipped"], history[0]["loss"]) == (2, 0)
