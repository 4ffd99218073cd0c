"""One supervised step as a pure function: packed rows in, a new state and metrics out.

The loss is −Σ m ℓ / Σ m over the completion tokens of the whole optimizer batch, so neither the split into microbatches
nor the packing changes the gradient. Examples that share a row do not see each other: attention is block-diagonal
(`Transformer(…, segments=…)`) and positions start at 0 in each, so a packed row gives what its examples give alone.

The head runs over every position of a row, `chunk` at a time, and what predicts a prompt or padding is thrown away: which
positions are left is data, and programs are compiled for shapes. (With packing there is little padding.)
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jgrpo.lora import variables_of
from jgrpo.models import Transformer
from jgrpo.training.forward import head_logprobs
from jgrpo.training.state import TrainState
from jgrpo.training.step import accumulate, dropout_key_of, frozen, guarded_update, used_learning_rate

Params = Mapping[str, Any]


class SupervisedBatch(struct.PyTreeNode):
    """M microbatches of B packed rows of T positions.

    Attributes:
        tokens: right-padded.
        segments: 1, 2, … for the examples of a row; 0 behind them.
        mask: completion tokens, which are in the loss.
        lengths: positions in use.
    """

    tokens: Int[Array, "M B T"]
    segments: Int[Array, "M B T"]
    mask: Bool[Array, "M B T"]
    lengths: Int[Array, "M B"]


@partial(jax.jit, static_argnames=("model", "optimizer", "remat", "chunk"), donate_argnames=("state",))
def sft_step(
    state: TrainState,
    base: Params,
    batch: SupervisedBatch,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    remat: bool = True,
    chunk: int = 4096,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step.

    Args:
        state: donated: do not use it afterwards.
        base: frozen weights.
        batch: completions of every row of the step.
        model, optimizer, remat, chunk: static; as in `token_logprobs`.

    Returns:
        The state (`step` one higher; the cursor is the caller's), and loss, entropy, grad_norm, learning_rate and
        `updates/skipped`.
    """
    dropout = dropout_key_of(state) if model.lora.lora_dropout > 0 else None
    count = batch.mask[..., 1:].sum()
    loss = partial(
        _microbatch_loss, frozen(base), model=model, tokens=jnp.maximum(count, 1), remat=remat, chunk=chunk, key=dropout
    )
    total, grads, entropy = accumulate(loss, state.lora, batch)
    carry = (state.lora, state.opt_state, state.nonfinite)
    (lora, opt_state, nonfinite), record = guarded_update(carry, total, grads, count > 0, optimizer)
    metrics = {"loss": total, "entropy": entropy.sum(), "grad_norm": record["grad_norm"]}
    metrics["updates/skipped"] = record["skipped"].astype(jnp.int32)
    if (rate := used_learning_rate(opt_state)) is not None:
        metrics["learning_rate"] = rate
    return state.replace(step=state.step + 1, lora=lora, opt_state=opt_state, nonfinite=nonfinite), metrics


def packed_logprobs(
    model: Transformer,
    base: Params,
    lora: Params,
    part: SupervisedBatch,
    *,
    remat: bool = True,
    chunk: int = 4096,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B T-1"], Float[Array, "B T-1"]]:
    """log π and entropy at the tokens 1 … T − 1 of packed rows (fields `[B, …]`), 0 outside the completions."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    variables = variables_of(base, lora)
    hidden: Any = model.apply(
        variables,
        part.tokens,
        part.lengths,
        segments=part.segments,
        remat=remat,
        dropout=dropout_key is not None,
        rngs=rngs,
    )
    targets, mask = part.tokens[:, 1:], part.mask[:, 1:]
    return head_logprobs(model, variables, hidden[:, :-1], targets, mask, temperature=1.0, chunk=chunk)


def _microbatch_loss(
    base: Params,
    lora: Params,
    part: SupervisedBatch,
    index: Array,
    *,
    model: Transformer,
    tokens: Array,
    remat: bool,
    chunk: int,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    dropout_key = None if key is None else jax.random.fold_in(key, index)
    logprobs, entropy = packed_logprobs(model, base, lora, part, remat=remat, chunk=chunk, dropout_key=dropout_key)
    return -logprobs.sum() / tokens, entropy.sum() / tokens


@partial(jax.jit, static_argnames=("model", "chunk"))
def sft_loss(
    lora: Params, base: Params, part: SupervisedBatch, *, model: Transformer, chunk: int = 4096
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of −ℓ over the completion tokens of B rows (fields `[B, …]`), and their number: for evaluation."""
    logprobs, _ = packed_logprobs(model, base, lora, part, remat=False, chunk=chunk)
    return -logprobs.sum(), part.mask[:, 1:].sum()
