"""Metric names of the ecosystem, and their values on hand-made batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import completion_metrics, policy_metrics, reward_metrics
from tests.algorithms import oracle

NAN = float("nan")


def as_floats(metrics):
    return {name: float(value) for name, value in metrics.items()}


def test_reward_metrics():
    per_function = jnp.asarray([[[1.0, 0.0], [2.0, 2.0]], [[NAN, 3.0], [NAN, NAN]]])
    rewards = jnp.asarray([[1.0, 3.0], [2.0, 2.0]])
    assert as_floats(reward_metrics(rewards, per_function, ["accuracy", "format"])) == pytest.approx(
        {
            "reward": 2.0,
            "reward_std": np.sqrt(2.0) / 2,
            "frac_reward_zero_std": 0.5,
            "rewards/accuracy/mean": 1.25,
            "rewards/accuracy/std": oracle.std([1.0, 0.0, 2.0, 2.0]),
            "rewards/format/mean": 3.0,
            "rewards/format/std": 0.0,
        }
    )


def test_reward_metrics_of_no_rewards_are_zeros_not_nan():
    nothing = jnp.full((1, 2, 2), NAN)
    metrics = as_floats(reward_metrics(nothing[0], nothing, ["f"]))
    assert metrics.pop("frac_reward_zero_std") == 1.0
    assert set(metrics.values()) == {0.0}


def test_one_name_for_each_function():
    with pytest.raises(ValueError, match="zip"):
        reward_metrics(jnp.ones((1, 2)), jnp.ones((2, 1, 2)), ["f"])


def test_completion_metrics():
    lengths, terminated = jnp.asarray([[3, 8], [8, 1]]), jnp.asarray([[True, False], [False, True]])
    assert as_floats(completion_metrics(lengths, terminated)) == {
        "completions/mean_length": 5.0,
        "completions/min_length": 1.0,
        "completions/max_length": 8.0,
        "completions/mean_terminated_length": 2.0,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 3.0,
        "completions/clipped_ratio": 0.5,
    }
    none = as_floats(completion_metrics(lengths, jnp.zeros_like(terminated)))
    assert none["completions/mean_terminated_length"] == none["completions/max_terminated_length"] == 0.0
    assert none["completions/clipped_ratio"] == 1.0


MASK = np.array([[True, True, False], [True, False, False], [False, False, False], [True, True, True]])
LOW = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
HIGH = np.array([[0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)


def test_policy_metrics():
    values = np.where(MASK, np.arange(12.0).reshape(4, 3), NAN)
    log_rho = np.where(MASK, np.array([[0.1, -0.2, 0], [0, 0, 0], [0, 0, 0], [0.3, 0, 0]]), NAN)
    terms = {
        "clipped_low": LOW,
        "clipped_high": HIGH,
        "kl": values,
        "entropy": 2 * values,
        "sampler_log_ratio": log_rho,
    }
    metrics = as_floats(policy_metrics({k: jnp.asarray(v) for k, v in terms.items()}, jnp.asarray(MASK)))
    rho = np.exp(log_rho[MASK])
    assert metrics == pytest.approx(
        {
            "kl": values[MASK].mean(),
            "entropy": 2 * values[MASK].mean(),
            "clip_ratio/low_mean": 4 / 6,
            "clip_ratio/low_min": 0.5,
            "clip_ratio/high_mean": 2 / 6,
            "clip_ratio/high_max": 0.5,
            "clip_ratio/region_mean": 1.0,
            "sampling/sampling_logp_difference/mean": 0.6 / 6,
            "sampling/sampling_logp_difference/max": 0.3,
            "sampling/importance_sampling_ratio/min": rho.min(),
            "sampling/importance_sampling_ratio/mean": rho.mean(),
            "sampling/importance_sampling_ratio/max": rho.max(),
        }
    )


def test_absent_terms_give_absent_metrics():
    terms = {"clipped_low": jnp.asarray(LOW), "clipped_high": jnp.asarray(HIGH)}
    assert all(name.startswith("clip_ratio/") for name in policy_metrics(terms, jnp.asarray(MASK)))


def test_the_shape_of_the_batch_does_not_matter():
    terms = {"clipped_low": LOW, "clipped_high": HIGH, "kl": np.arange(12.0).reshape(4, 3)}
    flat = jax.jit(policy_metrics)({k: jnp.asarray(v) for k, v in terms.items()}, jnp.asarray(MASK))
    nested = {k: jnp.asarray(v).reshape(2, 2, 3) for k, v in terms.items()}
    assert as_floats(policy_metrics(nested, jnp.asarray(MASK).reshape(2, 2, 3))) == pytest.approx(as_floats(flat))
