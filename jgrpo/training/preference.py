"""One step of online preference optimisation: the best of a group is preferred to the worst (Guo et al. 2024, arXiv:2402.04792).

Only the two completions of each pair go through the model, so an update costs 2 / G of a policy-gradient one. Both of a pair
are in the same microbatch. Pairs whose rewards tie have weight 0. The loss needs the reference, which is the same base with
`state.reference` as its adapter.

The loss of a minibatch is the mean over its valid pairs, whose number comes from the whole minibatch: the split into
microbatches cannot change the gradient.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms import Objective, completion_metrics, loss_mask, objective_from_config, preference_from_config
from jgrpo.algorithms.masked import masked_mean, masked_sum
from jgrpo.algorithms.metrics import sampling_metrics
from jgrpo.algorithms.preference import Pairs, pair_margins, select_pairs
from jgrpo.config import TrainConfig
from jgrpo.models import Transformer
from jgrpo.rollout import FINISH_STOP
from jgrpo.training.forward import Rows, rows_of
from jgrpo.training.state import Batch, TrainState
from jgrpo.training.step import (
    batch_split,
    dropout_key_of,
    frozen,
    map_slices,
    policy_forward,
    run_updates,
    update_metrics,
)

Params = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
CHOSEN_THEN_REJECTED = 2


class PairSlices(struct.PyTreeNode):
    """S minibatches of M microbatches of B / 2 pairs, each a chosen row and then its rejected one: `[S, M, B, …]`.

    Attributes:
        rows: what the forward reads.
        mask: tokens in the loss.
        sampler_logprobs: as the sampler computed them.
        weights: of each pair in the loss; 0 for ties.
        ref_logprobs: reference policy.
    """

    rows: Rows
    mask: Bool[Array, "S M B C"]
    sampler_logprobs: Float[Array, "S M B C"]
    weights: Float[Array, "S M B/2"]
    ref_logprobs: Float[Array, "S M B C"] | None = None


@partial(jax.jit, static_argnames=("model", "optimizer", "config", "objective"), donate_argnames=("state",))
def online_dpo_step(
    state: TrainState,
    base: Params,
    batch: Batch,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    objective: Objective | None = None,
) -> tuple[TrainState, Metrics]:
    """Train on the pairs of one batch; arguments and state as in `grpo_step`, the batch's advantages are not read.

    Of the objective only the masks are used (`drop_truncated`). `microbatch_size` bounds the rows of a microbatch: it
    holds the largest number of pairs that fits and divides the minibatch.

    Returns:
        The state after the batch and scalar metrics: loss, grad_norm, learning_rate, `updates/skipped`, entropy and kl (over
        the tokens of all pairs, ties included), TRL's `rewards/{chosen,rejected,margins,accuracies}` (β · (Σℓ − Σℓ_ref),
        over valid pairs), `pairs/valid` (fraction), and `completions/*` of the whole batch.

    Raises:
        ValueError: the questions do not divide into minibatches.
    """
    objective = objective or objective_from_config(config.algorithm)
    forward = partial(policy_forward, model, frozen(base), config)
    slices = slice_pairs(batch, objective, *batch_split(config))
    slices = slices.replace(ref_logprobs=map_slices(slices.rows, partial(forward, state.reference))[0])
    loss = partial(_pairs_loss, forward=forward, pair_loss=preference_from_config(config.algorithm))
    updates = config.algorithm.num_iterations * config.algorithm.num_minibatches
    dropout = dropout_key_of(state) if model.lora.lora_dropout > 0 else None
    trained, records = run_updates(state, state.lora, slices, loss, optimizer, updates, dropout)
    rollout = batch.rollout
    metrics = {
        **update_metrics(trained, records),
        **_preference_metrics(records, slices, config.algorithm.preference_beta),
        **completion_metrics(rollout.completion_lengths, rollout.finish == FINISH_STOP),
    }
    lora, opt_state, nonfinite = trained
    return state.replace(step=state.step + 1, lora=lora, opt_state=opt_state, nonfinite=nonfinite), metrics


def slice_pairs(batch: Batch, objective: Objective, minibatches: int, size: int, length_buckets: int = 1) -> PairSlices:
    """The chosen and the rejected completion of each question, cut into minibatches and microbatches.

    Raises:
        ValueError: the questions do not divide into minibatches.
    """
    rollout, questions = batch.rollout, batch.rewards.shape[0]
    if questions % minibatches:
        raise ValueError(f"{questions} prompts do not divide into {minibatches} minibatches")
    mask = loss_mask(objective, rollout.policy_mask, rollout.finish == FINISH_STOP, batch.rewards)
    pairs = select_pairs(jnp.where(mask.any(axis=-1), batch.rewards, jnp.nan))
    of_pairs = partial(take_pairs, pairs=pairs)
    completions = ("completion_tokens", "completion_lengths", "completion_mask")
    chosen = dataclasses.replace(rollout, **{name: of_pairs(getattr(rollout, name)) for name in completions})
    rows = rows_of(chosen, length_buckets)
    per_minibatch = questions // minibatches
    held = largest_divisor(per_minibatch, size // CHOSEN_THEN_REJECTED)
    valid = pairs.valid.reshape(minibatches, -1)
    weights = valid / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)

    def cut(array: Array, each: int) -> Array:
        return array.reshape(minibatches, per_minibatch // held, each, *array.shape[1:])

    flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), (of_pairs(mask), of_pairs(rollout.policy_logprobs)))
    rows, mask, sampler = jax.tree.map(lambda a: cut(a, CHOSEN_THEN_REJECTED * held), (rows, *flat))
    return PairSlices(rows, mask, sampler, cut(weights.reshape(-1), held))


def take_pairs(array: Array, pairs: Pairs) -> Array:
    """`[Q, G, …]` -> `[Q, 2, …]`: of the chosen and of the rejected completion."""
    index = jnp.stack([pairs.chosen, pairs.rejected], axis=1)
    return jnp.take_along_axis(array, index.reshape(*index.shape, *[1] * (array.ndim - 2)), axis=1)


def largest_divisor(total: int, bound: int) -> int:
    """The largest divisor of `total` up to `bound`, at least 1."""
    return max((n for n in range(1, min(total, bound) + 1) if total % n == 0), default=1)


def _pairs_loss(
    lora: Params, part: Any, index: Array, *, forward: Any, pair_loss: Any, is_first: Array, key: Array | None
) -> tuple[Float[Array, ""], Any]:
    dropout_key = None if key is None else jax.random.fold_in(key, index)
    logprobs, entropy = forward(lora, part.rows, dropout_key)
    both = [a.reshape(-1, CHOSEN_THEN_REJECTED, a.shape[-1]) for a in (logprobs, part.ref_logprobs, part.mask)]
    count = both[0].shape[0]
    pairs = Pairs(jnp.zeros(count, int), jnp.ones(count, int), part.weights > 0)
    margins = pair_margins(both[0], both[1], both[2], pairs)
    terms = {
        "gains": masked_sum(both[0] - both[1], both[2], axis=-1),
        "entropy": entropy,
        "log_ratio": logprobs - part.ref_logprobs,
        "sampler_log_ratio": logprobs - part.sampler_logprobs,
    }
    loss = jnp.sum(part.weights * pair_loss(margins))
    return loss, jax.lax.stop_gradient(terms)


def _preference_metrics(records: Any, slices: PairSlices, beta: float) -> Metrics:
    terms, mask = records["terms"], records["mask"]
    gains = beta * terms["gains"]  # [updates, M, pairs, 2]
    updates = jnp.arange(mask.shape[0]) % slices.mask.shape[0]
    valid = (slices.weights > 0)[updates]
    chosen, rejected = gains[..., 0], gains[..., 1]
    return {
        "rewards/chosen": masked_mean(chosen, valid),
        "rewards/rejected": masked_mean(rejected, valid),
        "rewards/margins": masked_mean(chosen - rejected, valid),
        "rewards/accuracies": masked_mean((chosen > rejected).astype(jnp.float32), valid),
        "pairs/valid": jnp.mean(slices.weights > 0, dtype=jnp.float32),
        "entropy": masked_mean(terms["entropy"], mask),
        "kl": masked_mean(terms["log_ratio"], mask),
        # Of the first update only: in later ones the policy is no longer the sampler's.
        **sampling_metrics(terms["sampler_log_ratio"][0], mask[0]),
    }
