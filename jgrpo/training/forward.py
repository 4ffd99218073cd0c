"""Log-probabilities of sampled completions under a policy, with gradients, never `[B, T, V]`.

Rows are packed contiguously (prompt, then completion, then padding), which is what the `Transformer` takes. Where several
rows have one prompt, they may be one sequence instead (`group`; `jgrpo.models.shared_prompt`): P + G·C positions of linear
layers and saved activations rather than G·(P + C), and the same function, loss and gradient. The one exception is LoRA
dropout: its mask is drawn for each position computed, so the completions of a prompt share the prompt's mask, where
separate rows draw G of them; each completion by itself sees the same distribution either way.

The hidden states at the positions that predict completion tokens are gathered before the head is applied, so prompt
and padding cost no vocabulary work, and the head runs over `chunk` positions at a time; a packed head over slices of the
vocabulary too, so that it is never dequantized whole (`packed_head_chunks`).

The policy is softmax(logits / temperature) over the whole vocabulary, as in TRL and verl, also where top-k, top-p or
min-p truncate the sampler: `Rollout.policy_logprobs` is the sampler's number for the same policy (`log_kept` is the
difference), so the two agree to rounding under any sampling settings.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import pallas_kernels
from jgrpo.lora import variables_of
from jgrpo.models import ModelConfig, Transformer
from jgrpo.models.packed_rows import PackedRows
from jgrpo.models.shared_prompt import SharedPrompt
from jgrpo.quantization import Int4Weight, PackedWeight, dequantize
from jgrpo.rollout import Rollout

T = TypeVar("T")


class Rows(struct.PyTreeNode):
    """Completions of a batch, one row each, with the prompt that each continues; prompts are right-padded."""

    prompt_tokens: Int[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    completion_tokens: Int[Array, "B C"]
    completion_mask: Bool[Array, "B C"]
    num_generations: int = struct.field(pytree_node=False, default=1)
    """Rows next to each other that continue one prompt; a slice that starts at a multiple of it may end inside a group."""
    buckets: int = struct.field(pytree_node=False, default=1)
    """Sizes that `at_length` chooses among; 1: the padding is computed."""
    capacity: int | None = struct.field(pytree_node=False, default=None)
    """Positions that the completions are packed into; None: each has its C."""

    @property
    def prompt_group(self) -> int:
        """Rows for which a forward can compute the prompt once: gcd(rows, G).

        Groups of that size cross neither a question nor a microbatch: a microbatch of whole groups computes each prompt
        once, one that is a part of a group once for the part.
        """
        return math.gcd(self.prompt_lengths.shape[0], self.num_generations)

    @property
    def completion_lengths(self) -> Int[Array, " B"]:
        """Tokens of each completion."""
        return self.completion_mask.sum(axis=1, dtype=jnp.int32)

    @property
    def capacities(self) -> tuple[int, ...]:
        """Sizes `capacity` that the rows may be packed into, ascending; the last holds any rows of the shape."""
        rows, length = self.completion_tokens.shape
        buckets = min(self.buckets, max(rows * length // BUCKET_POSITIONS, 1))
        return tuple(-(-rows * length * number // buckets) for number in range(1, buckets + 1))


BUCKET_POSITIONS = 256
"""Sizes that are not this many positions apart are not worth a program of their own."""


def at_length(function: Callable[[Rows], T], rows: Rows) -> T:
    """`function(rows)` with the rows packed into the smallest of their `capacities`: one branch of the compiled program each.

    The function has to differentiate itself: a gradient of this one would keep what every branch keeps.
    """
    capacities = rows.capacities
    if len(capacities) == 1:
        return function(rows)
    branches = [lambda rows, size=size: function(rows.replace(capacity=size)) for size in capacities]
    number = jnp.searchsorted(jnp.asarray(capacities), rows.completion_mask.sum())
    return jax.lax.switch(number, branches, rows)


def rows_of(rollout: Rollout, buckets: int = 1) -> Rows:
    """The Q · G rows of a rollout, completions of one question next to each other."""
    num_generations, length = rollout.completion_tokens.shape[1:]
    return Rows(
        prompt_tokens=jnp.repeat(rollout.prompt_tokens, num_generations, axis=0),
        prompt_lengths=jnp.repeat(rollout.prompt_lengths, num_generations, axis=0),
        completion_tokens=rollout.completion_tokens.reshape(-1, length),
        completion_mask=rollout.completion_mask.reshape(-1, length),
        num_generations=num_generations,
        buckets=buckets,
    )


def packed_tokens(rows: Rows) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Prompt and completion without a gap, right-padded to T = P + C, and the length of each row."""
    completion_length = rows.completion_tokens.shape[1]
    position = jnp.arange(rows.prompt_tokens.shape[1] + completion_length)[None]
    offset = position - rows.prompt_lengths[:, None]
    completion = jnp.take_along_axis(rows.completion_tokens, jnp.clip(offset, 0, completion_length - 1), axis=1)
    prompt = jnp.pad(rows.prompt_tokens, ((0, 0), (0, completion_length)))
    lengths = rows.prompt_lengths + rows.completion_lengths
    tokens = jnp.where(offset < 0, prompt, completion)
    return jnp.where(position < lengths[:, None], tokens, 0), lengths


def completion_hidden(hidden: Float[Array, "B T D"], rows: Rows) -> Float[Array, "B C D"]:
    """Hidden state that predicts each completion token: token c stands at prompt_length + c."""
    predicting = rows.prompt_lengths[:, None] - 1 + jnp.arange(rows.completion_tokens.shape[1])
    row = jnp.arange(predicting.shape[0])[:, None]
    # Said to be unique and in bounds, so that the gradient is a scatter without atomics: faster, and reproducible.
    return hidden.at[row, predicting].get(unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")


def grouped_tokens(rows: Rows, shared: SharedPrompt) -> tuple[Int[Array, "Q S"], Int[Array, " B"]]:
    """Each prompt with its completions behind it, S = P + G·C, and the length of each row."""
    completions = rows.completion_tokens.reshape(-1, shared.group * rows.completion_tokens.shape[1])
    lengths = rows.prompt_lengths + rows.completion_lengths
    return jnp.concatenate([rows.prompt_tokens[:: shared.group], completions], axis=1), lengths


def grouped_hidden(hidden: Float[Array, "Q S D"], shared: SharedPrompt) -> Float[Array, "B C D"]:
    """`completion_hidden` of sequences: the prompt's last token predicts the first of every completion."""
    questions, positions, width = hidden.shape
    length = shared.completion_length(positions)
    completions = hidden[:, shared.width :].reshape(questions, shared.group, length, width)
    last = jnp.take_along_axis(hidden, shared.prompt_lengths[:, None, None] - 1, axis=1, mode="promise_in_bounds")
    first = jnp.broadcast_to(last[:, None], (questions, shared.group, 1, width))
    return jnp.concatenate([first, completions[:, :, :-1]], axis=2).reshape(-1, length, width)


def token_logprobs(
    model: Transformer,
    base: Mapping[str, Any],
    lora: Mapping[str, Any],
    rows: Rows,
    *,
    temperature: float = 1.0,
    remat: bool = True,
    offload: bool = False,
    chunk: int = 4096,
    group: int = 1,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """log π(token) and the entropy of π at every completion token, float32, 0 outside the mask.

    Args:
        model: static.
        base: frozen weights.
        lora: adapter; `{}` is the reference policy, at no memory cost. Or a whole model, `{"weights": …}`.
        rows: see `rows_of`.
        temperature: divides the logits, as in the sampler.
        remat: recompute each layer in the backward.
        offload: keep what remat needs of each layer, its input, in pinned host memory.
        chunk: positions whose logits exist at the same time, of a packed head their bytes.
        group: so many rows after each other have the same prompt, which is computed once for them (`Rows.prompt_group`).
        dropout_key: draws the adapter's dropout; None: no dropout.
    """
    variables = variables_of(base, lora)
    packed = packing_of(rows, group)
    hidden = completion_states(
        model, variables, rows, remat=remat, offload=offload, group=group, dropout_key=dropout_key
    )
    how: dict[str, Any] = dict(temperature=temperature, chunk=chunk)
    if packed is None:
        return head_logprobs(model, variables, hidden, rows.completion_tokens, rows.completion_mask, **how)
    outputs = head_logprobs(model, variables, hidden, packed.pack(rows.completion_tokens), packed.used, **how)
    logprobs, entropy = map(packed.unpack, outputs)
    return logprobs, entropy


def packing_of(rows: Rows, group: int) -> PackedRows | None:
    """The layout of packed rows; None if they are not packed."""
    if rows.capacity is None:
        return None
    width, limit = rows.prompt_tokens.shape[1], rows.completion_tokens.shape[1]
    lengths = rows.prompt_lengths, rows.completion_lengths
    return PackedRows.create(*lengths, width=width, limit=limit, group=group, capacity=rows.capacity)


def completion_states(
    model: Transformer,
    variables: Mapping[str, Any],
    rows: Rows,
    *,
    remat: bool = True,
    offload: bool = False,
    group: int = 1,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "*B D"]:
    """The hidden state that each completion token is predicted from; arguments as in `token_logprobs`.

    `[B, C, D]`, or `[capacity, D]` of packed rows (`packing_of`).
    """
    how: dict[str, Any] = dict(remat=remat, offload=offload, dropout=dropout_key is not None)
    how["rngs"] = None if dropout_key is None else {"dropout": dropout_key}
    hidden: Any
    if (packed := packing_of(rows, group)) is not None:
        tokens = jnp.concatenate([rows.prompt_tokens[::group].reshape(-1), packed.pack(rows.completion_tokens)])
        lengths = rows.prompt_lengths + rows.completion_lengths
        hidden = model.apply(variables, tokens[None], lengths, shared=packed, **how)
        return packed.predicting(hidden)
    if group == 1:
        hidden = model.apply(variables, *packed_tokens(rows), **how)
        return completion_hidden(hidden, rows)
    shared = SharedPrompt(rows.prompt_lengths[::group], rows.prompt_tokens.shape[1], group)
    hidden = model.apply(variables, *grouped_tokens(rows, shared), shared=shared, **how)
    return grouped_hidden(hidden, shared)


CHUNK_MULTIPLE = 64
"""Chunks are multiples of this many positions, where the workspace has room for one: whole tiles of a matrix product."""


def logprob_chunk(model: Transformer, workspace: float) -> int:
    """Positions whose logits `[n, V]` (float32) and their gradient (compute dtype) take at most `workspace` MB; at least 1."""
    position = model.config.vocab_size * (4 + jnp.dtype(model.dtype).itemsize)
    fitting = max(int(workspace * 1e6 / position), 1)
    return fitting // CHUNK_MULTIPLE * CHUNK_MULTIPLE or fitting


HEAD_SHARE = 0.25
"""Part of the workspace that the dequantized slice of a packed head may take; logits and gradient get the rest."""
VOCABULARY_MULTIPLE = 128
"""Slices of a packed head are multiples of this many entries, for the same reason as chunks."""


def packed_head_chunks(config: ModelConfig, item: int, chunk: int) -> tuple[int, int]:
    """(positions, entries of the vocabulary) at once for a packed head, in the bytes that `chunk` positions of logits take.

    Of `item` bytes a number of the compute dtype: the dequantized slice, logits in float32 and their gradient, and, for each
    position, the gradient of the hidden state in float32, as a sum and as one slice's part.
    """
    vocabulary, width = config.vocab_size, config.hidden_size
    workspace = chunk * vocabulary * (4 + item)
    fitting = int(HEAD_SHARE * workspace) // (width * item)
    entries = min(max(fitting // VOCABULARY_MULTIPLE, 1) * VOCABULARY_MULTIPLE, vocabulary)
    positions = (workspace - entries * width * item) // (entries * (4 + item) + 8 * width)
    return max(positions // CHUNK_MULTIPLE * CHUNK_MULTIPLE or positions, 1), entries


def head_logprobs(
    model: Transformer,
    variables: Mapping[str, Any],
    hidden: Float[Array, "*B D"],
    targets: Int[Array, "*B"],
    mask: Bool[Array, "*B"],
    *,
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """log π(target) and the entropy of π from the hidden states that predict the targets; 0 outside the mask."""
    head: Any = model.apply(variables, method="head_weight")
    arrays, entries = head, None
    if isinstance(head, PackedWeight) and not (isinstance(head, Int4Weight) and head.zeros is None):
        arrays = dequantize(head, hidden.dtype)  # rare, in checkpoints that come quantized: whole, and right
    elif isinstance(head, Int4Weight):
        arrays = (head.packed, head.scales)
        chunk, entries = packed_head_chunks(model.config, hidden.dtype.itemsize, chunk)
    flat = hidden.reshape(-1, hidden.shape[-1])
    outputs = pallas_kernels.token_logprobs(
        flat,
        arrays,
        targets.reshape(-1),
        temperature=temperature,
        softcap=model.config.logit_softcap,
        chunk=chunk,
        vocabulary_chunk=entries,
    )
    logprobs, entropy = (jnp.where(mask, output.reshape(mask.shape), 0.0) for output in outputs)
    return logprobs, entropy
