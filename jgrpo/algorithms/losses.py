"""Per-token policy losses: each returns one number per token, and aggregation is a separate choice.

One signature for all, so that a loss is a value that can be passed around:
`loss(logprobs, log_ratio, advantages, mask, *, own settings) -> per-token loss`, with logprobs, log_ratio and mask of
shape [*S, C] and advantages of shape [*S] (one per row) or [*S, C] (PPO). `log_ratio` is ℓ − ℓ_old, already clamped and
at the chosen level (`ratios.RATIO_LEVELS`). `logprobs` carry the gradient; `advantages` are constants.
Values outside the mask are unspecified but finite for finite input.

Below, r = exp(log_ratio) and sg = stop_gradient.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms.masked import masked_mean, masked_sum
from jgrpo.algorithms.ratios import LOG_RATIO_BOUND

WEIGHT_FLOOR = 1e-8


def per_token(advantages: Float[Array, "..."], like: Float[Array, "*S C"]) -> Float[Array, "..."]:
    """Advantages that broadcast against [*S, C]: [*S] gets a trailing axis, [*S, C] is unchanged.

    Raises ValueError for any other shape, which could broadcast into something not meant.
    """
    if advantages.shape == like.shape[:-1]:
        return advantages[..., None]
    if advantages.shape == like.shape:
        return advantages
    raise ValueError(
        f"advantages {advantages.shape} fit neither the rows {like.shape[:-1]} nor the tokens {like.shape}"
    )


def clipped_loss(
    logprobs: Float[Array, "*S C"],
    log_ratio: Float[Array, "*S C"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Float[Array, "*S C"]:
    """PPO's clipped surrogate (arXiv:1707.06347), asymmetric as in DAPO (arXiv:2503.14476).

    `delta` > 1 + ε_high also bounds what a negative advantage can cost when r explodes (INTELLECT-2, arXiv:2505.07291).
    """
    advantages = per_token(advantages, log_ratio)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else jnp.minimum(ratio, delta)
    # −min( min(r, δ) A, clip(r, 1 − ε, 1 + ε_high) A )
    return -jnp.minimum(bounded * advantages, clipped * advantages)


def cispo_loss(
    logprobs: Float[Array, "*S C"],
    log_ratio: Float[Array, "*S C"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    *,
    cap: float,
) -> Float[Array, "*S C"]:
    """CISPO (MiniMax-M1, arXiv:2506.13585): REINFORCE with a capped ratio, so no token loses its gradient.

    `cap` is a bound on r itself (5.0 in ScaleRL, arXiv:2510.13786), not PPO's distance from 1.
    """
    # −sg(min(r, cap)) A ℓ
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))
    return -weight * per_token(advantages, log_ratio) * logprobs


def sapo_loss(
    logprobs: Float[Array, "*S C"],
    log_ratio: Float[Array, "*S C"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    *,
    temperature_pos: float,
    temperature_neg: float,
) -> Float[Array, "*S C"]:
    """SAPO (arXiv:2511.20347): a sigmoid gate around r = 1 in place of the hard clip."""
    advantages = per_token(advantages, log_ratio)
    tau = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    # −A (4 / τ) σ(τ (r − 1))
    return -advantages * 4.0 / tau * jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1.0))


def vespo_loss(
    logprobs: Float[Array, "*S C"],
    log_ratio: Float[Array, "*S C"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Float[Array, "*S C"]:
    """VESPO (arXiv:2602.10693): REINFORCE weighted by a gamma-shaped function of the row's ratio.

    `log_ratio` is at token level, with the log of the sampler correction added to it where there is one.
    """
    advantages = per_token(advantages, log_ratio)
    positive = advantages >= 0
    k, lam = jnp.where(positive, k_pos, k_neg), jnp.where(positive, lambda_pos, lambda_neg)
    # log w = clip(Σ_t m log r_t, log 1e-8, 20);  log φ = λ + k log w − λ w
    log_w = jnp.clip(masked_sum(log_ratio, mask, axis=-1, keepdims=True), math.log(WEIGHT_FLOOR), LOG_RATIO_BOUND)
    phi = jax.lax.stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))
    return -phi * advantages * logprobs


def gmpo_loss(
    logprobs: Float[Array, "*S C"],
    log_ratio: Float[Array, "*S C"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    *,
    epsilon_low: float,
    epsilon_high: float,
) -> Float[Array, "*S C"]:
    """GMPO (arXiv:2507.20673): the geometric mean of the row's clipped token ratios; ε is in log space (0.4).

    `log_ratio` is at token level; the row's loss is returned for each of its tokens.
    """
    advantages = per_token(advantages, log_ratio)
    clamped = jnp.clip(log_ratio, -epsilon_low, epsilon_high)
    # c_t = min(log r, clamp(log r, −ε, ε_high)) where A > 0, else max;  −A exp(mean_t c_t)
    c = jnp.where(advantages > 0, jnp.minimum(log_ratio, clamped), jnp.maximum(log_ratio, clamped))
    row_loss = -advantages * jnp.exp(masked_mean(c, mask, axis=-1, keepdims=True))
    return jnp.broadcast_to(row_loss, log_ratio.shape)


def clip_indicators(
    log_ratio: Float[Array, "*S C"], advantages: Float[Array, "..."], clip_range: tuple[float, float]
) -> tuple[Bool[Array, "*S C"], Bool[Array, "*S C"]]:
    """(clipped low, clipped high): r below the range with A < 0, above it with A > 0, where PPO's gradient is 0."""
    low, high = clip_range
    advantages = per_token(advantages, log_ratio)
    ratio = jnp.exp(log_ratio)
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
