"""Importance ratio r = π / π_old, in log space, at three levels.

Every log-ratio is clamped to ±20 per token (e^20 ≈ 5e8 stays finite in float32 after a product with any sane
advantage); outside the clamp the gradient is 0. A level maps per-token log-ratios to per-token log-ratios, so a
loss need not know which one it is given.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms.masked import masked_mean

LOG_RATIO_BOUND = 20.0


def clamped_log_ratio(logprobs: Float[Array, "*S C"], old_logprobs: Float[Array, "*S C"]) -> Float[Array, "*S C"]:
    """log r = clip(ℓ − ℓ_old, ±20)."""
    return jnp.clip(logprobs - old_logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def token_level(log_ratio: Float[Array, "*S C"], mask: Bool[Array, "*S C"]) -> Float[Array, "*S C"]:
    """Each token its own ratio (PPO, GRPO)."""
    return log_ratio


def sequence_level(log_ratio: Float[Array, "*S C"], mask: Bool[Array, "*S C"]) -> Float[Array, "*S C"]:
    """GSPO (Zheng et al. 2025, arXiv:2507.18071): r_i = exp(mean_t log r_t) for every token of the row."""
    return jnp.broadcast_to(masked_mean(log_ratio, mask, axis=-1, keepdims=True), log_ratio.shape)


def sequence_token_level(log_ratio: Float[Array, "*S C"], mask: Bool[Array, "*S C"]) -> Float[Array, "*S C"]:
    """GSPO-token (arXiv:2507.18071): the row's value, each token its own gradient.

    r = exp(ℓ − sg ℓ + sg(mean_t log r_t)); with equal advantages in a row its gradient is that of GSPO.
    """
    row = jax.lax.stop_gradient(sequence_level(log_ratio, mask))
    return log_ratio - jax.lax.stop_gradient(log_ratio) + row


RATIO_LEVELS = {"token": token_level, "sequence": sequence_level, "sequence_token": sequence_token_level}
