"""One GRPO training step as a pure function: a rollout batch in, a new state and metrics out.

GRPO (Shao et al. 2024, arXiv:2402.03300). A batch is trained on for `num_iterations` passes of `num_minibatches`
optimizer steps (the PPO loop); an optimizer step accumulates the gradient of the adapter over microbatches.

- The old policy is the policy before the first optimizer step. In that step ℓ_old = sg(ℓ), so the ratio is 1 exactly;
  later ones use log-probabilities stored beforehand. With one optimizer step a batch no such forward is made.
- The reference is the same `base` with `state.reference` as its adapter, `{}` unless another one was asked for: no copy of
  the base, one forward before the updates, only if beta > 0.
- The loss is Σ weights · per-token loss, with weights from the whole optimizer batch: microbatches slice them, so the
  split cannot change the gradient.
- An update with a non-finite loss or gradient, or with no token in its loss, is skipped inside the program:
  parameters and optimizer state stay as they were. (Deviation from common practice for the empty case: Adam
  would move the parameters by its momentum.)
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms import (
    Objective,
    completion_metrics,
    loss_mask,
    objective_from_config,
    policy_loss,
    policy_metrics,
)
from jgrpo.algorithms.masks import top_entropy_mask
from jgrpo.config import TrainConfig
from jgrpo.gradient_sums import Summed
from jgrpo.models import Transformer
from jgrpo.rollout import FINISH_STOP
from jgrpo.training.adam8bit import Moment
from jgrpo.training.forward import Rows, at_length, logprob_chunk, rows_of, token_logprobs
from jgrpo.training.state import Batch, TrainState

Params = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
T = TypeVar("T")

DEFAULT_BUCKETS = 4
"""`length_buckets` on an accelerator: on the average 1/8 of the padded size is padding that is computed. Eight halve that, and took an H200
over a minute to compile."""


class Slices(struct.PyTreeNode):
    """A batch cut into S minibatches of M microbatches of B rows: every array below is `[S, M, B, …]`.

    Attributes:
        rows: what the forward reads.
        advantages: one for each row.
        mask: tokens in the loss.
        weights: of each token in the loss, from the whole minibatch.
        sampler_logprobs: the same policy's as the sampler computed them (`Rollout.policy_logprobs`).
        old_logprobs: policy before the first update; None if there is one update only.
        ref_logprobs: reference policy; None if beta is 0.
        token_mask: tokens in the policy term, chosen among the whole batch; None: all.
    """

    rows: Rows
    advantages: Float[Array, "S M B"]
    mask: Bool[Array, "S M B C"]
    weights: Float[Array, "S M B C"]
    sampler_logprobs: Float[Array, "S M B C"]
    old_logprobs: Float[Array, "S M B C"] | None = None
    ref_logprobs: Float[Array, "S M B C"] | None = None
    token_mask: Bool[Array, "S M B C"] | None = None


@partial(jax.jit, static_argnames=("model", "optimizer", "config", "objective"), donate_argnames=("state",))
def grpo_step(
    state: TrainState,
    base: Params,
    batch: Batch,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    objective: Objective | None = None,
) -> tuple[TrainState, Metrics]:
    """Train on one batch.

    Args:
        state: donated: do not use it afterwards.
        base: frozen weights; differentiating through them raises TypeError.
        batch: Q divisible by `num_minibatches`, the rows of a minibatch by `microbatch_size`.
        model, optimizer, config: static. Of the config, `algorithm`, `temperature`, `lora_dropout`,
            `microbatch_size`, `share_prompt`, `length_buckets`, `remat`, `offload` and `logprob_workspace` are read.
        objective: what to minimise; None: `objective_from_config(config.algorithm)`. Static.

    Returns:
        The state after the batch (`step` one higher; the cursor is the caller's) and scalar metrics: loss and
        grad_norm (means over the updates; the norm before clipping), learning_rate, `updates/skipped`, and those of
        `policy_metrics` and `completion_metrics` over all tokens of all updates.

    Raises:
        ValueError: the batch does not divide.
    """
    objective = objective or objective_from_config(config.algorithm)
    forward = partial(policy_forward, model, frozen(base), config)
    slices = slice_batch(batch, objective, *batch_split(config))
    updates = config.algorithm.num_iterations * config.algorithm.num_minibatches
    if updates > 1 or objective.top_entropy < 1:
        old, entropy = map_slices(slices.rows, partial(forward, state.lora))
        slices = slices.replace(old_logprobs=old if updates > 1 else None)
        if objective.top_entropy < 1:
            slices = slices.replace(token_mask=top_entropy_mask(entropy, slices.mask, fraction=objective.top_entropy))
    if objective.needs_reference:
        slices = slices.replace(ref_logprobs=map_slices(slices.rows, partial(forward, state.reference))[0])
    loss = partial(_microbatch_loss, forward=forward, objective=objective, **_adapted(state, objective))
    dropout = dropout_key_of(state) if model.lora.lora_dropout > 0 else None
    trained, records = run_updates(state, state.lora, slices, loss, optimizer, updates, dropout)
    metrics = {
        **update_metrics(trained, records),
        **policy_metrics(records["terms"], records["mask"]),
        **completion_metrics(batch.rollout.completion_lengths, batch.rollout.finish == FINISH_STOP),
    }
    lora, opt_state, nonfinite = trained
    return state.replace(step=state.step + 1, lora=lora, opt_state=opt_state, nonfinite=nonfinite), metrics


def _adapted(state: TrainState, objective: Objective) -> dict[str, Array]:
    """Coefficients of the loss that controllers keep in the state, as arguments of `policy_loss`."""
    names = ("beta", "entropy_coef") if objective.needs_reference else ("entropy_coef",)
    return {name: state.coefficients[name] for name in names if name in state.coefficients}


@jax.custom_jvp
def frozen(base: T) -> T:
    """`base` unchanged; differentiating with respect to any leaf raises TypeError instead of costing its gradient."""
    return base


@frozen.defjvp
def _frozen_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    raise TypeError("the base model is frozen: differentiate with respect to the adapter (lora), not base")


def batch_split(config: TrainConfig) -> tuple[int, int, int]:
    """Minibatches, rows of a microbatch, and sizes that a microbatch may be packed into, as `slice_batch` takes them."""
    return config.algorithm.num_minibatches, config.training.microbatch_size, length_buckets(config)


def length_buckets(config: TrainConfig) -> int:
    """`length_buckets` of the settings, or what it is on this backend."""
    chosen = config.training.length_buckets
    if chosen is not None:
        return chosen
    return 1 if jax.default_backend() == "cpu" else DEFAULT_BUCKETS


def slice_batch(batch: Batch, objective: Objective, minibatches: int, size: int, length_buckets: int = 1) -> Slices:
    """Rows, masks and weights of a batch, cut into minibatches by question and into microbatches of `size` rows.

    Raises:
        ValueError: the batch does not divide.
    """
    rollout = batch.rollout
    questions, generations, length = rollout.completion_tokens.shape
    rows = questions * generations // minibatches
    if questions % minibatches or rows % size:
        raise ValueError(
            f"{questions} prompts x {generations} completions do not divide into {minibatches} minibatches of microbatches "
            f"of {size} rows"
        )
    mask = loss_mask(objective, rollout.policy_mask, rollout.finish == FINISH_STOP, batch.rewards)
    tokens = mask.sum()
    weights = jax.vmap(lambda part: objective.aggregation(part, length, tokens))(
        mask.reshape(minibatches, -1, generations, length)
    )
    per_token = (array.reshape(-1, length) for array in (mask, weights, rollout.policy_logprobs))
    whole = Slices(rows_of(rollout, length_buckets), batch.advantages.reshape(-1), *per_token)
    return jax.tree.map(lambda array: array.reshape(minibatches, rows // size, size, *array.shape[1:]), whole)


def map_slices(rows: Rows, function: Any) -> Any:
    """`function` on one microbatch after the other; its arrays `[B, …]` become `[S, M, B, …]`."""
    lead = rows.prompt_lengths.shape[:2]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rows)
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), jax.lax.map(partial(at_length, function), flat))


def policy_forward(
    model: Transformer, base: Params, config: TrainConfig, lora: Params, rows: Rows, dropout_key: Array | None = None
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """`token_logprobs` with the run's settings."""
    training = config.training
    return token_logprobs(
        model,
        base,
        lora,
        rows,
        temperature=config.rollout.temperature,
        remat=training.remat,
        offload=training.offload,
        group=rows.prompt_group if training.share_prompt else 1,
        chunk=logprob_chunk(model, training.logprob_workspace),
        dropout_key=dropout_key,
    )


def run_updates(
    state: TrainState, params: Params, slices: Any, loss: Any, optimizer: Any, updates: int, dropout: Array | None
) -> tuple[Any, Any]:
    """`updates` optimizer steps on one minibatch of `slices` after the other, over and over.

    `loss(params, microbatch, index, *, is_first, key) -> (scalar, terms)`. Returns (params, opt_state, nonfinite) and, for
    every update, its loss, grad_norm, skipped, terms `[updates, M, B, …]` and mask.
    """
    update = partial(_update, slices=slices, loss=loss, optimizer=optimizer, dropout=dropout)
    return jax.lax.scan(update, (params, state.opt_state, state.nonfinite), jnp.arange(updates))


def update_metrics(trained: Any, records: Any) -> Metrics:
    """loss and grad_norm (means over the updates), `updates/skipped` and the learning rate."""
    metrics = {
        "loss": records["loss"].mean(),
        "grad_norm": records["grad_norm"].mean(),
        "updates/skipped": records["skipped"].sum(),
    }
    if (rate := used_learning_rate(trained[1])) is not None:
        metrics["learning_rate"] = rate
    return metrics


def _update(carry: Any, index: Array, *, slices: Any, loss: Any, optimizer: Any, dropout: Array | None):
    """One optimizer step on minibatch `index % S`: accumulate, clip, update, or skip."""
    minibatch = jax.tree.map(lambda a: a[index % slices.mask.shape[0]], slices)
    key = None if dropout is None else jax.random.fold_in(dropout, index)
    loss = partial(loss, is_first=index == 0, key=key)
    total, grads, terms = accumulate(loss, carry[0], minibatch, packed_at_length)
    carry, record = guarded_update(carry, total, grads, jnp.any(minibatch.weights > 0), optimizer)
    return carry, {"loss": total, **record, "terms": terms, "mask": minibatch.mask}


def guarded_update(
    carry: Any, loss: Float[Array, ""], grads: Params, has_tokens: Bool[Array, ""], optimizer: Any
) -> tuple[Any, Metrics]:
    """Update, or leave everything as it is if loss or gradient is not finite or no token is in the loss.

    `carry` is (lora, opt_state, non-finite updates in a row). Also returns grad_norm (before clipping) and skipped.
    """
    lora, opt_state, nonfinite = carry
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    apply = finite & has_tokens
    changes, new_opt_state = optax.with_extra_args_support(optimizer).update(grads, opt_state, lora, apply=apply)
    new = (optax.apply_updates(lora, changes), new_opt_state)

    def chosen(after: Any, before: Any) -> Any:
        # 8-bit moments heed `apply` themselves, in place: to choose here, both versions would have to exist.
        return after if isinstance(after, Moment) else jnp.where(apply, after, before)

    is_leaf = lambda leaf: isinstance(leaf, Moment)  # noqa: E731
    lora, opt_state = jax.tree.map(chosen, new, (lora, opt_state), is_leaf=is_leaf)
    return (lora, opt_state, jnp.where(finite, 0, nonfinite + 1)), {"grad_norm": norm, "skipped": ~apply}


def packed_at_length(function: Any, part: Any) -> Any:
    """`at_length` for a function of a microbatch that has `rows` among others."""
    return at_length(lambda rows: function(part.replace(rows=rows)), part.rows)


def accumulate(
    loss: Any, lora: Params, minibatch: Any, branch: Any = lambda function, part: function(part)
) -> tuple[Float[Array, ""], Params, Any]:
    """Sum of a loss over microbatches, its gradient in the adapter, and the loss's terms `[M, B, C]`.

    `loss(lora, microbatch, index) -> (scalar, terms)`; the microbatches' losses add up to the minibatch's, a pytree whose
    arrays are `[M, B, …]`, with a `mask` among them. `branch(function, part)` calls the function with the microbatch.
    The loss gets `Summed` parameters, so that its backward adds to the sum of the microbatches before.

    Raises:
        ValueError: the loss applies the model more than once to the same parameters.
    """

    def step(sums: Any, inputs: Any) -> tuple[Any, Any]:
        (total, grads), (part, index) = sums, inputs

        def summed(lora: Params, part: Any) -> Any:
            return loss(jax.tree.map(Summed, lora, grads), part, index)

        (value, terms), grads = branch(partial(jax.value_and_grad(summed, has_aux=True), lora), part)
        return (total + value, grads), terms

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, lora))
    microbatches = jnp.arange(minibatch.mask.shape[0])
    (total, grads), terms = jax.lax.scan(step, zeros, (minibatch, microbatches))
    return total, grads, terms


def _microbatch_loss(
    lora: Params,
    part: Slices,
    index: Array,
    *,
    forward: Any,
    objective: Objective,
    is_first: Array,
    key: Array | None,
    **coefficients: Array,
) -> tuple[Float[Array, ""], Any]:
    dropout_key = None if key is None else jax.random.fold_in(key, index)
    logprobs, entropy = forward(lora, part.rows, dropout_key)
    old = jax.lax.stop_gradient(logprobs)
    if part.old_logprobs is not None:
        old = jnp.where(is_first, old, part.old_logprobs)
    return policy_loss(
        logprobs,
        old,
        part.advantages,
        part.mask,
        part.weights,
        objective,
        ref_logprobs=part.ref_logprobs,
        sampler_logprobs=part.sampler_logprobs,
        entropy=entropy,
        token_mask=part.token_mask,
        **coefficients,
    )


def used_learning_rate(opt_state: optax.OptState) -> Float[Array, ""] | None:
    """The rate of the last update, if the optimizer keeps it in its state (`make_optimizer`'s does)."""
    is_rate = lambda path, value: isinstance(value, jax.Array)  # noqa: E731 - the schedule's own state has the name too
    return optax.tree_utils.tree_get(opt_state, "learning_rate", filtering=is_rate)


def dropout_key_of(state: TrainState) -> Array:
    """The key of this step's dropout: the sampler uses fold_in(key, step) itself, and this branches off it."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0x64726F70)
