"""Log-probabilities of sampled completions under a policy, with gradients, never `[B, T, V]`.

Rows are packed contiguously (prompt, then completion, then padding), which is what the `Transformer` takes. The
hidden states at the positions that predict completion tokens are gathered before the head is applied, so prompt
and padding cost no vocabulary work, and the head runs over `chunk` positions at a time.

The policy is softmax(logits / temperature) over the whole vocabulary, as in TRL and verl, also where top-k, top-p or
min-p truncate the sampler: `Rollout.policy_logprobs` is the sampler's number for the same policy (`log_kept` is the
difference), so the two agree to rounding under any sampling settings.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import pallas_kernels
from jgrpo.models import Transformer
from jgrpo.quantization import Int4Weight
from jgrpo.rollout import Rollout


class Rows(struct.PyTreeNode):
    """Completions of a batch, one row each, with the prompt that each continues; prompts are right-padded."""

    prompt_tokens: Int[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    completion_tokens: Int[Array, "B C"]
    completion_mask: Bool[Array, "B C"]


def rows_of(rollout: Rollout) -> Rows:
    """The Q · G rows of a rollout, completions of one question next to each other."""
    num_generations, length = rollout.completion_tokens.shape[1:]
    return Rows(
        prompt_tokens=jnp.repeat(rollout.prompt_tokens, num_generations, axis=0),
        prompt_lengths=jnp.repeat(rollout.prompt_lengths, num_generations, axis=0),
        completion_tokens=rollout.completion_tokens.reshape(-1, length),
        completion_mask=rollout.completion_mask.reshape(-1, length),
    )


def packed_tokens(rows: Rows) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Prompt and completion without a gap, right-padded to T = P + C, and the length of each row."""
    completion_length = rows.completion_tokens.shape[1]
    position = jnp.arange(rows.prompt_tokens.shape[1] + completion_length)[None]
    offset = position - rows.prompt_lengths[:, None]
    completion = jnp.take_along_axis(rows.completion_tokens, jnp.clip(offset, 0, completion_length - 1), axis=1)
    prompt = jnp.pad(rows.prompt_tokens, ((0, 0), (0, completion_length)))
    lengths = rows.prompt_lengths + rows.completion_mask.sum(axis=1, dtype=jnp.int32)
    tokens = jnp.where(offset < 0, prompt, completion)
    return jnp.where(position < lengths[:, None], tokens, 0), lengths


def completion_hidden(hidden: Float[Array, "B T D"], rows: Rows) -> Float[Array, "B C D"]:
    """Hidden state that predicts each completion token: token c stands at prompt_length + c."""
    predicting = rows.prompt_lengths[:, None] - 1 + jnp.arange(rows.completion_tokens.shape[1])
    row = jnp.arange(predicting.shape[0])[:, None]
    # Said to be unique and in bounds, so that the gradient is a scatter without atomics: faster, and reproducible.
    return hidden.at[row, predicting].get(unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")


def token_logprobs(
    model: Transformer,
    base: Mapping[str, Any],
    lora: Mapping[str, Any],
    rows: Rows,
    *,
    temperature: float = 1.0,
    remat: bool = True,
    chunk: int = 4096,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """log π(token) and the entropy of π at every completion token, float32, 0 outside the mask.

    Args:
        model: static.
        base: frozen weights.
        lora: adapter; `{}` is the reference policy, at no memory cost.
        rows: see `rows_of`.
        temperature: divides the logits, as in the sampler.
        remat: recompute each layer in the backward.
        chunk: positions whose logits exist at the same time.
        dropout_key: draws the adapter's dropout; None: no dropout.
    """
    tokens, lengths = packed_tokens(rows)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    variables = {"params": base, "lora": lora}
    hidden: Any = model.apply(variables, tokens, lengths, remat=remat, dropout=dropout_key is not None, rngs=rngs)
    return head_logprobs(
        model,
        variables,
        completion_hidden(hidden, rows),
        rows.completion_tokens,
        rows.completion_mask,
        temperature=temperature,
        chunk=chunk,
    )


CHUNK_MULTIPLE = 64
"""Chunks are multiples of this many positions, where the workspace has room for one: whole tiles of a matrix product."""


def logprob_chunk(model: Transformer, workspace: float) -> int:
    """Positions whose logits `[n, V]` (float32) and their gradient (compute dtype) take at most `workspace` MB; at least 1."""
    position = model.config.vocab_size * (4 + jnp.dtype(model.dtype).itemsize)
    fitting = max(int(workspace * 1e6 / position), 1)
    return fitting // CHUNK_MULTIPLE * CHUNK_MULTIPLE or fitting


def head_logprobs(
    model: Transformer,
    variables: Mapping[str, Any],
    hidden: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    mask: Bool[Array, "B C"],
    *,
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """log π(target) and the entropy of π from the hidden states that predict the targets; 0 outside the mask."""
    head: Any = model.apply(variables, method="head_weight")
    arrays = (head.packed, head.scales) if isinstance(head, Int4Weight) else head
    flat = hidden.reshape(-1, hidden.shape[-1])
    outputs = pallas_kernels.token_logprobs(
        flat,
        arrays,
        targets.reshape(-1),
        temperature=temperature,
        softcap=model.config.logit_softcap,
        chunk=chunk,
    )
    logprobs, entropy = (jnp.where(mask, output.reshape(mask.shape), 0.0) for output in outputs)
    return logprobs, entropy
