"""From several reward functions to one reward per completion, and the terms that are added to it.

NaN stands for "no reward" (a reward function returned None), as in TRL.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jgrpo.algorithms.masked import masked_sum


def combine_rewards(
    rewards_per_function: Float[Array, "K *S"], reward_weights: Float[Array, " K"]
) -> Float[Array, "*S"]:
    """R = Σ_k w_k r_k over the functions that gave a reward; NaN where none did."""
    valid = ~jnp.isnan(rewards_per_function)
    weighted = jnp.einsum("k,k...->k...", reward_weights, rewards_per_function)
    return jnp.where(jnp.any(valid, axis=0), masked_sum(weighted, valid, axis=0), jnp.nan)


def soft_overlong_penalty(lengths: Int[Array, "*S"], *, max_length: int, cache: int) -> Float[Array, "*S"]:
    """Soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13), to be added to the reward.

    0 up to max_length − cache tokens, then linear down to −1 at max_length, −1 above. `cache` > 0.
    """
    # ((L − C) − |o|) / C, kept within [−1, 0]
    return jnp.clip((max_length - cache - lengths) / cache, -1.0, 0.0)


def kl_shaped_rewards(
    rewards: Float[Array, "*S"],
    logprobs: Float[Array, "*S C"],
    ref_logprobs: Float[Array, "*S C"],
    mask: Bool[Array, "*S C"],
    beta: Float[Array, ""] | float,
) -> Float[Array, "*S"]:
    """KL in the reward (RLOO, REINFORCE++): R − β Σ_t (ℓ_old − ℓ_ref), the k1 estimate of the row's KL.

    NaN rewards stay NaN. `logprobs` are the old policy's; no gradient is meant to pass.
    """
    return rewards - beta * masked_sum(logprobs - ref_logprobs, mask, axis=-1)


def zero_variance_groups(rewards: Float[Array, "Q G"]) -> Bool[Array, " Q"]:
    """True for a group whose rewards are all equal (or all missing): it carries no gradient.

    Compares least and greatest, so no tolerance is involved. Used by the zero-variance filter (ScaleRL,
    arXiv:2510.13786) and by dynamic sampling (DAPO, arXiv:2503.14476).
    """
    valid = ~jnp.isnan(rewards)
    least = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=-1)
    return ~(jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=-1) > least)


def dynamic_sampling_order(rewards: Float[Array, "Q G"]) -> tuple[Int[Array, " Q"], Int[Array, ""]]:
    """Dynamic sampling (DAPO): (question indices with the informative groups first, how many those are).

    The order is stable. A loop that samples more groups than it trains on keeps the first ones, and samples again,
    up to a bound, while there are too few.
    """
    uninformative = zero_variance_groups(rewards)
    return jnp.argsort(uninformative, stable=True), jnp.sum(~uninformative)
