"""Advantages of whole completions: one number for each row of a question's group.

All take rewards of shape [Q, G] in which NaN means "no reward": that row gets A = 0 and takes no part in its
group's (or the batch's) statistics. std is the sample standard deviation (n − 1), as in TRL and verl, and
every division by a std adds `STD_EPSILON` = 1e-4, TRL's value (verl: 1e-6).

Deviations: REINFORCE++ whitens over completions (each counts once); verl whitens over tokens, which gives long
completions more say in the mean.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jgrpo.algorithms.masked import masked_centre, masked_max, masked_std, masked_sum

STD_EPSILON = 1e-4


def group_advantages(rewards: Float[Array, "Q G"], *, scale: str = "group") -> Float[Array, "Q G"]:
    """GRPO: the reward minus its group's mean, divided by a std.

    `scale`: "group" the group's std (Shao et al. 2024, arXiv:2402.03300); "batch" the std over all rewards
    (REINFORCE++ practice; ScaleRL, arXiv:2510.13786); "none" no division (Dr. GRPO, arXiv:2503.20783).
    Raises KeyError for any other `scale`.
    """
    valid = ~jnp.isnan(rewards)
    # A = (R − mean_g) / (std + ε)
    return masked_centre(rewards, valid, axis=-1) / REWARD_SCALES[scale](rewards, valid)


def group_scale(rewards: Float[Array, "Q G"], valid: Bool[Array, "Q G"]) -> Float[Array, "Q 1"]:
    """std_g + ε."""
    return masked_std(rewards, valid, axis=-1, keepdims=True) + STD_EPSILON


def batch_scale(rewards: Float[Array, "Q G"], valid: Bool[Array, "Q G"]) -> Float[Array, ""]:
    """std over the batch + ε."""
    return masked_std(rewards, valid) + STD_EPSILON


def no_scale(rewards: Float[Array, "Q G"], valid: Bool[Array, "Q G"]) -> float:
    """1: differences of reward stay differences of advantage."""
    return 1.0


REWARD_SCALES = {"group": group_scale, "batch": batch_scale, "none": no_scale}


def whiten_rewards(rewards: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """(R − mean) / (std + ε) over the whole batch, NaN excluded and mapped to 0."""
    valid = ~jnp.isnan(rewards)
    return masked_centre(rewards, valid) / (masked_std(rewards, valid) + STD_EPSILON)


def gdpo_advantages(
    rewards_per_function: Float[Array, "K Q G"], reward_weights: Float[Array, " K"]
) -> Float[Array, "Q G"]:
    """GDPO (arXiv:2601.05242): every reward function is normalised in its group before the weighted sum.

    Functions of different scale or variance then keep their say. TRL: `normalize_then_sum`.
    """
    missing = jnp.all(jnp.isnan(rewards_per_function), axis=0)
    # z_k = (r_k − mean_g) / (std_g + ε);  S = Σ_k w_k z_k;  A = (S − mean) / (std + ε) over the batch
    z = group_advantages(rewards_per_function, scale="group")
    total = jnp.einsum("k,kqg->qg", reward_weights, z)
    return whiten_rewards(jnp.where(missing, jnp.nan, total))


def rloo_advantages(rewards: Float[Array, "Q G"]) -> Float[Array, "Q G"]:
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): the baseline is the mean of the other completions.

    A group with one rewarded completion has no baseline: A = 0.
    """
    valid = ~jnp.isnan(rewards)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    # A_i = R_i − mean_{j≠i} R_j = n / (n − 1) · (R_i − mean_g)
    return masked_centre(rewards, valid, axis=-1) * count / jnp.maximum(count - 1, 1)


def reinforce_plus_plus_advantages(rewards: Float[Array, "Q G"]) -> Float[Array, "Q G"]:
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): no group at all, the batch is whitened."""
    return whiten_rewards(rewards)


def reinforce_plus_plus_baseline_advantages(rewards: Float[Array, "Q G"]) -> Float[Array, "Q G"]:
    """REINFORCE++-baseline (arXiv:2501.03262): minus the group's mean, then whitened over the batch."""
    valid = ~jnp.isnan(rewards)
    centred = masked_centre(rewards, valid, axis=-1)
    return whiten_rewards(jnp.where(valid, centred, jnp.nan))


def remax_advantages(rewards: Float[Array, "Q G"], greedy_rewards: Float[Array, " Q"]) -> Float[Array, "Q G"]:
    """ReMax (Li et al. 2023, arXiv:2310.10505): the baseline is the reward of the greedy completion.

    A = 0 where either reward is missing.
    """
    # A = R − R(greedy)
    return jnp.nan_to_num(rewards - greedy_rewards[:, None], nan=0.0)


def opo_advantages(rewards: Float[Array, "Q G"], lengths: Int[Array, "Q G"]) -> Float[Array, "Q G"]:
    """OPO (Hao et al. 2025, arXiv:2505.23585): the variance-optimal baseline, rewards weighted by length.

    `lengths` are completion tokens |o|. A group without tokens gets its rewards minus 0.
    """
    valid = ~jnp.isnan(rewards)
    tokens = masked_sum(lengths, valid, axis=-1, keepdims=True)
    # b = Σ |o| R / Σ |o|
    baseline = masked_sum(lengths * rewards, valid, axis=-1, keepdims=True) / jnp.maximum(tokens, 1)
    return jnp.where(valid, rewards - baseline, 0)


def pass_at_k_advantages(rewards: Float[Array, "Q G"]) -> Float[Array, "Q G"]:
    """Pass@k (arXiv:2503.19595; verl's `grpo_passk`): only the best of a group learns, by its lead over the second.

    Ties at the top give 0. A group with fewer than two rewards gives 0.
    """
    valid = ~jnp.isnan(rewards)
    best = jnp.argmax(jnp.where(valid, rewards, -jnp.inf), axis=-1)
    is_best = (jnp.arange(rewards.shape[-1]) == best[:, None]) & valid
    others = valid & ~is_best
    # A_best = (r_max − r_2nd) / (std_g + ε)
    lead = rewards - masked_max(rewards, others, axis=-1)[:, None]
    has_second = jnp.any(others, axis=-1, keepdims=True)
    return jnp.where(is_best & has_second, lead / group_scale(rewards, valid), 0)
