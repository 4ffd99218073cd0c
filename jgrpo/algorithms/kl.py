"""Per-token estimators of KL(π ‖ π_ref) (Schulman 2020, "Approximating KL divergence") and the β controller.

As a term of the loss, k3 is the default and k2 has the exact gradient on-policy; the gradient of k1 there has
expectation 0, so k1 belongs in the reward (`rewards.kl_shaped_rewards`), or has to be multiplied by the ratio.
The log-ratio is clamped to ±20, as everywhere in this package.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jgrpo.algorithms.ratios import clamped_log_ratio


def kl_k1(logprobs: Float[Array, "*S C"], ref_logprobs: Float[Array, "*S C"]) -> Float[Array, "*S C"]:
    """k1 = ℓ − ℓ_ref: unbiased, of either sign."""
    return clamped_log_ratio(logprobs, ref_logprobs)


def kl_k2(logprobs: Float[Array, "*S C"], ref_logprobs: Float[Array, "*S C"]) -> Float[Array, "*S C"]:
    """k2 = ½ (ℓ − ℓ_ref)²: biased, not negative."""
    return 0.5 * clamped_log_ratio(logprobs, ref_logprobs) ** 2


def kl_k3(logprobs: Float[Array, "*S C"], ref_logprobs: Float[Array, "*S C"]) -> Float[Array, "*S C"]:
    """k3 = e^(ℓ_ref − ℓ) − (ℓ_ref − ℓ) − 1: unbiased, not negative (the GRPO paper's, arXiv:2402.03300)."""
    log_ratio = clamped_log_ratio(ref_logprobs, logprobs)
    return jnp.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def adaptive_beta(
    beta: Float[Array, ""], kl: Float[Array, ""], *, target: float, horizon: float, samples: int
) -> Float[Array, ""]:
    """Next β of the proportional controller of Ziegler et al. 2019 (arXiv:1909.08593, §2.2).

    `kl` is the batch's measured KL, `samples` its completions; after `horizon` samples at an error of e, β has grown
    by about e.
    """
    # e = clip(KL / target − 1, ±0.2);  β ← β (1 + e · n / horizon)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return beta * (1.0 + error * samples / horizon)
