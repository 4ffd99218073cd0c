"""Metrics of a step, reduced once from whole-batch arrays, under TRL's names.

Deviations from TRL, where a value would depend on how the batch is split over microbatches or devices:
`clip_ratio/low_min` and `high_max` are the extremes over completions of the completion's clipped fraction;
`reward_std` is always the mean of the groups' standard deviations; a group counts in `frac_reward_zero_std` when its
rewards are exactly equal. `sampling/importance_sampling_ratio` is the ratio before it is truncated or masked.
A mean over nothing is 0.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jgrpo.algorithms.masked import masked_max, masked_mean, masked_min, masked_std
from jgrpo.algorithms.ratios import clamped_log_ratio
from jgrpo.algorithms.rewards import zero_variance_groups

Metrics = dict[str, Float[Array, ""]]


def reward_metrics(
    rewards: Float[Array, "Q G"], rewards_per_function: Float[Array, "K Q G"], names: Sequence[str]
) -> Metrics:
    """reward, reward_std, frac_reward_zero_std and rewards/{name}/mean, std. NaN rewards are left out.

    `rewards` are the combined ones; `names` are the K reward functions'.
    """
    valid = ~jnp.isnan(rewards)
    metrics = {
        "reward": masked_mean(rewards, valid),
        "reward_std": jnp.mean(masked_std(rewards, valid, axis=-1)),
        "frac_reward_zero_std": jnp.mean(zero_variance_groups(rewards), dtype=rewards.dtype),
    }
    for name, values in zip(names, rewards_per_function, strict=True):
        given = ~jnp.isnan(values)
        metrics[f"rewards/{name}/mean"] = masked_mean(values, given)
        metrics[f"rewards/{name}/std"] = masked_std(values, given)
    return metrics


def completion_metrics(lengths: Int[Array, "*S"], terminated: Bool[Array, "*S"]) -> Metrics:
    """completions/{mean,min,max}_length over all rows, _terminated_length over rows with EOS, clipped_ratio."""
    lengths = lengths.astype(jnp.float32)
    everything = jnp.ones_like(terminated)
    return {
        **_summary("completions/{}_length", lengths, everything, ("mean", "min", "max")),
        **_summary("completions/{}_terminated_length", lengths, terminated, ("mean", "min", "max")),
        "completions/clipped_ratio": 1.0 - jnp.mean(terminated, dtype=jnp.float32),
    }


def policy_metrics(terms: dict[str, Float[Array, "*S C"]], mask: Bool[Array, "*S C"]) -> Metrics:
    """kl, entropy, clip_ratio/* and sampling/* from the terms of `policy_loss`, for the whole batch.

    A metric whose term is absent (no reference, no sampler log-probabilities, …) is absent.
    """
    metrics = {name: masked_mean(terms[name], mask) for name in ("kl", "entropy") if name in terms}
    metrics |= clip_metrics(terms["clipped_low"], terms["clipped_high"], mask)
    if "sampler_log_ratio" in terms:
        metrics |= sampling_metrics(terms["sampler_log_ratio"], mask)
    return metrics


def clip_metrics(low: Bool[Array, "*S C"], high: Bool[Array, "*S C"], mask: Bool[Array, "*S C"]) -> Metrics:
    """clip_ratio/{low_mean,low_min,high_mean,high_max,region_mean}: fractions of the masked tokens."""
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    rows = jnp.any(mask, axis=-1)
    return {
        "clip_ratio/low_mean": masked_mean(low, mask),
        "clip_ratio/low_min": masked_min(masked_mean(low, mask, axis=-1), rows),
        "clip_ratio/high_mean": masked_mean(high, mask),
        "clip_ratio/high_max": masked_max(masked_mean(high, mask, axis=-1), rows),
        "clip_ratio/region_mean": masked_mean(low + high, mask),
    }


def sampling_metrics(log_rho: Float[Array, "*S C"], mask: Bool[Array, "*S C"]) -> Metrics:
    """sampling/sampling_logp_difference/{mean,max} of |ℓ_old − ℓ_s| and importance_sampling_ratio/{min,mean,max}."""
    rho = jnp.exp(clamped_log_ratio(log_rho, jnp.zeros_like(log_rho)))
    return {
        **_summary("sampling/sampling_logp_difference/{}", jnp.abs(log_rho), mask, ("mean", "max")),
        **_summary("sampling/importance_sampling_ratio/{}", rho, mask, ("min", "mean", "max")),
    }


_REDUCTIONS = {"mean": masked_mean, "min": masked_min, "max": masked_max}


def _summary(pattern: str, x: Float[Array, "*S"], mask: Bool[Array, "*S"], kinds: Sequence[str]) -> Metrics:
    return {pattern.format(kind): _REDUCTIONS[kind](x, mask) for kind in kinds}
