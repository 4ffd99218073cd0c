"""One PPO step (Schulman et al. 2017, arXiv:1707.06347), with a value function on the same frozen base.

The critic is an adapter of its own and a linear head over the hidden state that predicts each token: a few MB, no second
model. Its head starts at 0, so V = 0 before the first update. Policy and critic are one tree for one optimizer, with one
gradient norm, and the loss is the policy's + `value_coef` · the critic's (TRL's PPO).

Order: log-probabilities and values before the first update; token rewards −β (ℓ_old − ℓ_ref), plus the score at the last
token; GAE; advantages whitened over the whole batch; then `num_iterations` passes of clipped losses. Deviations from TRL: a
completion cut off at the limit ends there, as one with EOS does; completions without a reward leave the loss.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jgrpo.algorithms import Objective, completion_metrics, objective_from_config, policy_loss, policy_metrics
from jgrpo.algorithms.kl import kl_k1
from jgrpo.algorithms.masked import masked_mean
from jgrpo.algorithms.masks import top_entropy_mask
from jgrpo.algorithms.ppo import clipped_value_loss, gae, token_rewards, whiten
from jgrpo.config import AlgorithmConfig, LoraConfig, TrainConfig
from jgrpo.gradient_sums import entered
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer
from jgrpo.rollout import FINISH_STOP
from jgrpo.training.forward import Rows, completion_states, packing_of
from jgrpo.training.state import Batch, TrainState
from jgrpo.training.step import (
    Slices,
    batch_split,
    dropout_key_of,
    frozen,
    map_slices,
    policy_forward,
    run_updates,
    slice_batch,
    update_metrics,
)

Params = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]


class ValueSlices(Slices, kw_only=True):
    """`Slices` with what the critic is trained on; advantages are per token, `[S, M, B, C]`.

    Attributes:
        old_values: before the first update.
        returns: advantages (not whitened) + old values.
        kl: k1 of the policy before the first update to the reference; 0 without one.
    """

    old_values: Float[Array, "S M B C"]
    returns: Float[Array, "S M B C"]
    kl: Float[Array, "S M B C"]


def init_critic(key: PRNGKeyArray, lora_config: LoraConfig, config: ModelConfig) -> dict[str, Any]:
    """An adapter like the policy's and a value head of zeros, float32."""
    head = {"weight": jnp.zeros(config.hidden_size), "bias": jnp.zeros(())}
    return {"lora": init_lora(key, lora_config, config), "head": head}


def token_values(
    model: Transformer,
    base: Params,
    critic: Params,
    rows: Rows,
    *,
    remat: bool = True,
    offload: bool = False,
    group: int = 1,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B C"]:
    """V before each completion token (of the state that the token is chosen in), float32, 0 outside the mask.

    Arguments as in `token_logprobs`.
    """
    variables = {"params": base, "lora": critic["lora"]}
    how: dict[str, Any] = dict(remat=remat, offload=offload, group=group, dropout_key=dropout_key)
    features, head = completion_states(model, variables, rows, **how).astype(jnp.float32), entered(critic["head"])
    values = jnp.einsum("...d,d->...", features, head["weight"]) + head["bias"]
    if (packed := packing_of(rows, group)) is not None:
        return packed.unpack(values)
    return jnp.where(rows.completion_mask, values, 0.0)


def _value_forward(
    model: Transformer, base: Params, config: TrainConfig, critic: Params, rows: Rows, dropout_key: Array | None = None
) -> Float[Array, "B C"]:
    """`token_values` with the run's settings."""
    training = config.training
    group = rows.prompt_group if training.share_prompt else 1
    how: dict[str, Any] = dict(remat=training.remat, offload=training.offload, group=group, dropout_key=dropout_key)
    return token_values(model, base, critic, rows, **how)


@partial(jax.jit, static_argnames=("model", "optimizer", "config", "objective"), donate_argnames=("state",))
def ppo_step(
    state: TrainState,
    base: Params,
    batch: Batch,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    objective: Objective | None = None,
) -> tuple[TrainState, Metrics]:
    """Train policy and critic on one batch; arguments as in `grpo_step`, the batch's advantages are not read.

    `state` is made with a critic (`TrainState.create(…, critic=init_critic(…))`).

    Returns:
        The state after the batch and `grpo_step`'s metrics (loss with the value term), `kl` (k1, before the updates, where
        there is a reference), `value/loss`, `value/mean`, `value/clip_ratio` and `value/explained_variance` (of the values
        before the updates).

    Raises:
        ValueError: the batch does not divide.
    """
    objective = objective or objective_from_config(config.algorithm)
    forward = partial(policy_forward, model, frozen(base), config)
    values = partial(_value_forward, model, frozen(base), config)
    slices = estimate(state, batch, objective, config, forward, values)
    loss = partial(_actor_critic_loss, forward=forward, values=values, objective=objective, config=config.algorithm)
    if "entropy_coef" in state.coefficients:
        loss = partial(loss, entropy_coef=state.coefficients["entropy_coef"])
    updates = config.algorithm.num_iterations * config.algorithm.num_minibatches
    dropout = dropout_key_of(state) if model.lora.lora_dropout > 0 else None
    params = {"policy": state.lora, "critic": state.critic}
    trained, records = run_updates(state, params, slices, loss, optimizer, updates, dropout)
    metrics = {
        **update_metrics(trained, records),
        **policy_metrics(records["terms"], records["mask"]),
        **_value_metrics(records, slices, objective),
        **completion_metrics(batch.rollout.completion_lengths, batch.rollout.finish == FINISH_STOP),
    }
    params, opt_state, nonfinite = trained
    lora, critic = params["policy"], params["critic"]
    after = state.replace(step=state.step + 1, lora=lora, critic=critic, opt_state=opt_state, nonfinite=nonfinite)
    return after, metrics


def estimate(
    state: TrainState, batch: Batch, objective: Objective, config: TrainConfig, forward: Any, values: Any
) -> ValueSlices:
    """The batch in slices, with token advantages and returns; KL, whitening and top entropies are of the whole batch."""
    algorithm = config.algorithm
    known = ~jnp.isnan(batch.rewards)
    rollout = dataclasses.replace(batch.rollout, loss_mask=batch.rollout.policy_mask & known[..., None])
    # Slices carry what a row has one of: here its score.
    scored = batch.replace(rollout=rollout, advantages=jnp.where(known, batch.rewards, 0.0))
    slices = slice_batch(scored, objective, *batch_split(config))
    old, entropy = jnp.zeros(slices.mask.shape), jnp.zeros(slices.mask.shape)
    # With one update and neither a KL nor a choice of tokens, nothing reads them: no forward.
    if algorithm.num_iterations * algorithm.num_minibatches > 1 or objective.reward_beta or objective.top_entropy < 1:
        old, entropy = map_slices(slices.rows, partial(forward, state.lora))
    old_values = map_slices(slices.rows, partial(values, state.critic))
    kl = jnp.zeros_like(old)
    if objective.reward_beta:
        kl = kl_k1(old, map_slices(slices.rows, partial(forward, state.reference))[0])
    beta = state.coefficients.get("beta", objective.reward_beta)
    rewards = token_rewards(slices.advantages, kl, slices.mask, beta)
    advantages, returns = gae(rewards, old_values, slices.mask, gamma=algorithm.gae_gamma, lam=algorithm.gae_lambda)
    chosen = None
    if objective.top_entropy < 1:
        chosen = top_entropy_mask(entropy, slices.mask, fraction=objective.top_entropy)
    fields = {**vars(slices), "advantages": whiten(advantages, slices.mask), "old_logprobs": old, "token_mask": chosen}
    return ValueSlices(**fields, old_values=old_values, returns=returns, kl=kl)


def _actor_critic_loss(
    params: Params,
    part: Any,
    index: Array,
    *,
    forward: Any,
    values: Any,
    objective: Objective,
    config: AlgorithmConfig,
    is_first: Array,
    key: Array | None,
    **coefficients: Array,
) -> tuple[Float[Array, ""], Any]:
    keys = (None, None) if key is None else tuple(jax.random.split(jax.random.fold_in(key, index)))
    logprobs, entropy = forward(params["policy"], part.rows, keys[0])
    old = jnp.where(is_first, jax.lax.stop_gradient(logprobs), part.old_logprobs)
    given = dict(sampler_logprobs=part.sampler_logprobs, entropy=entropy, token_mask=part.token_mask, **coefficients)
    policy, terms = policy_loss(logprobs, old, part.advantages, part.mask, part.weights, objective, **given)
    predicted = values(params["critic"], part.rows, dropout_key=keys[1])
    per_token = clipped_value_loss(predicted, part.old_values, part.returns, clip=config.value_clip)
    critic = jnp.sum(part.weights * jnp.where(part.mask, per_token, 0.0))
    moved = jnp.abs(predicted - part.old_values) > config.value_clip
    terms |= {"value_loss": per_token, "value_clipped": moved.astype(jnp.float32)}
    return policy + config.value_coef * critic, jax.lax.stop_gradient(terms)


def _value_metrics(records: Any, slices: ValueSlices, objective: Objective) -> Metrics:
    terms, mask = records["terms"], records["mask"]
    returns, error = slices.returns, slices.returns - slices.old_values
    spread = masked_mean((returns - masked_mean(returns, slices.mask)) ** 2, slices.mask)
    error_spread = masked_mean((error - masked_mean(error, slices.mask)) ** 2, slices.mask)
    metrics = {
        "value/loss": masked_mean(terms["value_loss"], mask),
        "value/mean": masked_mean(slices.old_values, slices.mask),
        "value/clip_ratio": masked_mean(terms["value_clipped"], mask),
        # 1 − Var(R − V) / Var(R); 0 where all returns are equal
        "value/explained_variance": jnp.where(spread > 0, 1 - error_spread / jnp.where(spread > 0, spread, 1.0), 0.0),
    }
    return metrics | ({"kl": masked_mean(slices.kl, slices.mask)} if objective.reward_beta else {})
