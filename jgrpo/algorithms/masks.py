"""Which rows and tokens take part in the loss.

Masks that shrink the completion mask (truncated rows, zero-variance groups) come before the aggregation weights and
so leave its denominators. Masks that multiply the per-token loss (entropy, off-policy rows) do not: a masked
token there counts as a token with loss 0, as in TRL.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms.losses import per_token
from jgrpo.algorithms.masked import masked_mean


def drop_truncated(mask: Bool[Array, "*S C"], terminated: Bool[Array, "*S"]) -> Bool[Array, "*S C"]:
    """Overlong filtering of DAPO (arXiv:2503.14476): rows that never ended leave the loss.

    Their rewards stay in the group's statistics, as in TRL's `mask_truncated_completions`.
    """
    return mask & terminated[..., None]


def drop_groups(mask: Bool[Array, "Q G C"], dropped: Bool[Array, " Q"]) -> Bool[Array, "Q G C"]:
    """Zero-variance filter (ScaleRL, arXiv:2510.13786): whole groups leave the loss and its denominators."""
    return mask & ~dropped[:, None, None]


def top_entropy_mask(
    entropy: Float[Array, "*S C"], mask: Bool[Array, "*S C"], *, fraction: float
) -> Bool[Array, "*S C"]:
    """The `fraction` of the batch's tokens with the highest entropy (Wang et al. 2025, arXiv:2506.01939; 0.2 there).

    The threshold is one quantile over all masked tokens, so it has to be computed from the whole batch.
    """
    # keep H ≥ quantile_{1 − ρ}(H over masked tokens)
    threshold = jnp.nanquantile(jnp.where(mask, entropy, jnp.nan), 1.0 - fraction)
    return mask & (entropy >= threshold)


def off_policy_sequence_mask(
    logprobs: Float[Array, "*S C"],
    sampler_logprobs: Float[Array, "*S C"],
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    *,
    threshold: float,
) -> Bool[Array, "*S C"]:
    """Off-policy sequence masking of DeepSeek-V3.2 (arXiv:2512.02556): drop rows that are both bad and stale.

    Keeps a row iff A ≥ 0 or mean_t(ℓ_s − ℓ) ≤ threshold.
    """
    drift = masked_mean(jax.lax.stop_gradient(sampler_logprobs - logprobs), mask, axis=-1, keepdims=True)
    keep = (per_token(advantages, logprobs) >= 0) | (drift <= threshold)
    return jnp.broadcast_to(keep, mask.shape)
