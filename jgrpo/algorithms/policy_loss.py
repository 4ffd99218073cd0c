"""The policy loss: an `Objective`'s functions applied in the field's order.

Order: per-token loss × off-policy mask × token mask × sampler correction, then + β · KL − c · entropy, then Σ weights · l.
Everything that depends on more than one row (weights, token mask, β) comes in from outside, computed from the whole
optimizer batch; what is computed here stays within a row. A sum over any split of the rows is thus the same sum.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms.losses import WEIGHT_FLOOR, clip_indicators
from jgrpo.algorithms.masks import off_policy_sequence_mask
from jgrpo.algorithms.objective import Objective
from jgrpo.algorithms.ratios import clamped_log_ratio

Tokens = Float[Array, "*S C"]
Terms = dict[str, Array]
Scalar = Float[Array, ""] | float


def policy_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    weights: Tokens,
    objective: Objective,
    *,
    ref_logprobs: Tokens | None = None,
    sampler_logprobs: Tokens | None = None,
    entropy: Tokens | None = None,
    token_mask: Bool[Array, "*S C"] | None = None,
    beta: Scalar | None = None,
    entropy_coef: Scalar | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """(loss, terms) of any rows of an optimizer batch; differentiable in `logprobs` (and `entropy`).

    Args:
        logprobs: ℓ under the policy being trained, [*S, C].
        old_logprobs: ℓ_old; `stop_gradient(logprobs)` in the first optimizer step of a batch.
        advantages: [*S], one per row, or [*S, C].
        mask: tokens in the loss. Outside it every input may hold anything, NaN included.
        weights: `objective.aggregation` of the whole optimizer batch, sliced to these rows; 0 outside the mask.
        objective: from `objective_from_config`, or composed by hand.
        ref_logprobs: ℓ_ref; required if β is not 0. Given with β = 0, the KL is only reported.
        sampler_logprobs: ℓ_s; required by a sampler correction and by the off-policy mask.
        entropy: of the policy at each token; required by an entropy bonus, else only reported.
        token_mask: multiplies the policy term, e.g. `top_entropy_mask` of the whole batch.
        beta, entropy_coef: override the objective's (adaptive controllers).

    Returns the loss and per-token arrays without gradient: ratio, clipped_low, clipped_high, and, where their inputs
    are given, kl, entropy, sampler_log_ratio. Reduce them with `policy_metrics` over the whole batch.

    Raises ValueError if the objective needs an input that is None, AssertionError for shapes that differ.
    """
    beta = objective.beta if beta is None else beta
    entropy_coef = objective.entropy_coef if entropy_coef is None else entropy_coef
    chex.assert_equal_shape([logprobs, old_logprobs, mask, weights])
    _check_inputs(objective, beta, entropy_coef, ref_logprobs, sampler_logprobs, entropy)
    logprobs, old_logprobs = jnp.where(mask, logprobs, 0), jnp.where(mask, old_logprobs, 0)
    log_ratio = clamped_log_ratio(logprobs, jax.lax.stop_gradient(old_logprobs))
    log_ratio = objective.ratio_level(log_ratio, mask)
    low, high = clip_indicators(log_ratio, advantages, objective.clip_range)
    terms: Terms = {"ratio": jnp.exp(log_ratio), "clipped_low": low, "clipped_high": high}

    if sampler_logprobs is None:
        per_token_loss = objective.loss(logprobs, log_ratio, advantages, mask)
    else:
        sampler_logprobs = jnp.where(mask, sampler_logprobs, 0)
        terms["sampler_log_ratio"] = old_logprobs - sampler_logprobs
        per_token_loss = _corrected_loss(logprobs, log_ratio, terms["sampler_log_ratio"], advantages, mask, objective)
        per_token_loss *= _off_policy_mask(logprobs, sampler_logprobs, advantages, mask, objective)
    if token_mask is not None:
        per_token_loss *= token_mask
    if ref_logprobs is not None:
        terms["kl"] = objective.kl_estimator(logprobs, jnp.where(mask, ref_logprobs, 0))
        per_token_loss += beta * (terms["ratio"] if objective.kl_times_ratio else 1.0) * terms["kl"]
    if entropy is not None:
        terms["entropy"] = jnp.where(mask, entropy, 0)
        per_token_loss -= entropy_coef * terms["entropy"]
    return jnp.sum(weights * per_token_loss), jax.lax.stop_gradient(terms)


def _corrected_loss(
    logprobs: Tokens,
    log_ratio: Tokens,
    log_rho: Tokens,
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    objective: Objective,
) -> Tokens:
    """The objective's loss times the sampler correction, or with it inside the ratio (VESPO)."""
    if objective.sampler_correction is None:
        return objective.loss(logprobs, log_ratio, advantages, mask)
    rho = objective.sampler_correction(log_rho, mask)
    if objective.correction_in_ratio:
        log_ratio += jnp.log(jnp.maximum(rho, WEIGHT_FLOOR))
        return objective.loss(logprobs, log_ratio, advantages, mask)
    return rho * objective.loss(logprobs, log_ratio, advantages, mask)


def _off_policy_mask(
    logprobs: Tokens,
    sampler_logprobs: Tokens,
    advantages: Float[Array, "..."],
    mask: Bool[Array, "*S C"],
    objective: Objective,
) -> Bool[Array, "*S C"]:
    threshold = objective.off_policy_threshold
    if threshold is None:
        return jnp.ones_like(mask)
    return off_policy_sequence_mask(logprobs, sampler_logprobs, advantages, mask, threshold=threshold)


def _check_inputs(
    objective: Objective,
    beta: Scalar,
    entropy_coef: Scalar,
    ref_logprobs: Tokens | None,
    sampler_logprobs: Tokens | None,
    entropy: Tokens | None,
) -> None:
    needs_sampler = objective.sampler_correction is not None or objective.off_policy_threshold is not None
    if ref_logprobs is None and _is_on(beta):
        raise ValueError(f"beta is {beta}: the KL term needs ref_logprobs")
    if sampler_logprobs is None and needs_sampler:
        raise ValueError("sampler_logprobs is None: the sampler correction and the off-policy mask need it")
    if entropy is None and _is_on(entropy_coef):
        raise ValueError(f"entropy_coef is {entropy_coef}: the entropy bonus needs entropy")


def _is_on(coefficient: Scalar) -> bool:
    """A traced coefficient counts as on."""
    return not isinstance(coefficient, int | float) or coefficient != 0
