"""The decode loop: prefill, chunks of tokens, and the loop over chunks.

Each prompt is prefilled once for its whole group. The KV cache is part of the loop's carry, so it is updated in
place. The outer loop runs over chunks of up to 32 tokens and leaves as soon as every row is done; the inner loop has a
known trip count, so that on a GPU the host waits once a chunk and not once a token. All rows advance in
lockstep, and a row that is done draws pad tokens outside its mask (`compaction.py` drops those rows in time).

A step draws a token from the hidden states and then decodes it, so the token after the prompt is no special case; the
price is one decode whose hidden states nobody reads.

Every row has its own key, and its random number for token t is the same whatever the length limit, the chunking and
the number of questions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int32, PRNGKeyArray

import pallas_kernels
from jgrpo.config import RolloutConfig
from jgrpo.models import PROPOSAL_HEAD, KVCache, Transformer
from jgrpo.rollout.sampling import draw_and_record
from jgrpo.rollout.types import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout
from jgrpo.rollout.weights import decoding_adapter, step_constants, unrolls
from pallas_kernels.completions import Completions, Ends, pack, unpack

MAX_CHUNK = 32
"""Decode steps between two tests whether every row is done."""

CACHE_TYPES = {"auto": None, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""`kv_cache` of the config -> what `KVCache.create` takes; None: the compute dtype."""

Params = Mapping[str, Any]


class Setup(NamedTuple):
    """The static side of the loop."""

    model: Transformer
    config: RolloutConfig
    stop_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def create(cls, model: Transformer, config: RolloutConfig, eos_ids: tuple[int, ...], pad_id: int) -> "Setup":
        """Stop ids are the model's EOS ids and the config's own."""
        return cls(model, config, tuple(sorted({*eos_ids, *config.stop_token_ids})), pad_id)


class Recorded(NamedTuple):
    """One drawn token for every row as it enters the `Rollout`; stacked over time in the buffers."""

    token: Int32[Array, "... Q G"]
    logprob: Float32[Array, "... Q G"]
    log_kept: Float32[Array, "... Q G"]
    live: Bool[Array, "... Q G"]
    """Whether the token belongs to the completion."""
    stops: Bool[Array, "... Q G"]
    """Whether it is the stop token that ends the completion."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], pad_id: int) -> "Recorded":
        """Buffers that hold no completion yet."""
        zeros, false = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
        return cls(jnp.full(shape, pad_id, jnp.int32), zeros, zeros, false, false)

    def pack(self) -> Int32[Array, "T 4 M"]:
        """As the loop writes them, a token at a time."""
        return pack(*(field.reshape(len(field), -1) for field in self))

    @classmethod
    def unpack(cls, packed: Int32[Array, "T 4 M"], shape: tuple[int, ...]) -> "Recorded":
        """`pack` undone; `shape` is (Q, G)."""
        return cls(*(field.reshape(-1, *shape) for field in unpack(packed)))


@flax.struct.dataclass
class DecodeState:
    """What the loop carries from token to token."""

    cache: KVCache
    """Keys and values of every token so far."""
    hidden: Float[Array, "Q G D"]
    """Final hidden state of each row's last token: what the next token is drawn from."""
    remaining: Int32[Array, "Q G"]
    """Tokens that each row may still draw; 0 once it has drawn a stop token."""

    @property
    def drawn(self) -> Int32[Array, ""]:
        """Tokens drawn so far, the same for every row."""
        return self.cache.length


def stream(
    model: Transformer,
    base: Params,
    lora: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
    config: RolloutConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    chunk: int = 8,
) -> Iterator[Recorded]:
    """The tokens of `generate` in pieces of at most `chunk`, for a reader who waits: fields are `[tokens, Q, G]`."""
    setup = Setup.create(model, config, eos_ids, pad_id)
    limit = config.max_completion_length
    size, count = chunking(limit, chunk)
    state = _jit_prefill(setup, base, lora, prompts, size * count)
    uniforms = row_uniforms(key, state.remaining.shape, size * count)
    # Not `decoding_variables`: that program's results would hold a copy of the base.
    layers = {**base["layers"], **_jit_constants(model, base, state.cache.positions)}
    adapter = _jit_adapter(model, lora, unrolls(config))
    variables = {"params": {**base, "layers": layers}, "lora": adapter}
    for start in range(0, size * count, size):
        state, packed = _jit_chunk(setup, variables, state, uniforms[start : start + size])
        yield Recorded.unpack(packed[: limit - start], state.remaining.shape)
        if not bool(jnp.any(state.remaining)):
            return


def chunking(max_completion_length: int, max_chunk: int = MAX_CHUNK) -> tuple[int, int]:
    """(size, count) of equal chunks for that many tokens.

    The last one may overshoot by fewer than `count` tokens, which is cheaper than compiling a second, shorter chunk.
    """
    count = -(-max_completion_length // max_chunk)
    return -(-max_completion_length // count), count


def row_keys(key: PRNGKeyArray, rows: tuple[int, ...]) -> PRNGKeyArray:
    """A key for each row, which depends on its number alone, not on how many there are."""
    return jax.random.split(key, rows)


def row_uniforms(
    key: PRNGKeyArray, rows: tuple[int, ...], tokens: int, draw: tuple[int, ...] = ()
) -> Float32[Array, "tokens Q G *N"]:
    """Numbers in [0, 1) for each token of each row, one or (`draw`, `numbers_a_draw`) an array of them.

    Every row has its own key (`key` may be the rows' keys already).
    """
    keys = key if key.shape == rows else row_keys(key, rows)
    per_row = jax.vmap(jax.vmap(lambda row: jax.random.uniform(row, (tokens, *draw))))(keys)
    return jnp.moveaxis(per_row, len(rows), 0)


def numbers_a_draw(copies: Params | None) -> tuple[int, ...]:
    """Shape of the random numbers of one draw, with the copies of weights that a rollout decodes with."""
    return (pallas_kernels.numbers_a_token(),) if PROPOSAL_HEAD in (copies or {}) else ()


def prefill(setup: Setup, base: Params, lora: Params, prompts: Prompts, slots: int) -> DecodeState:
    """Run every prompt once, for its whole group, and leave room for `slots` more tokens of each row."""
    group = setup.config.num_generations
    variables = {"params": base, "lora": lora}
    hidden, prompt_kv = _apply(setup, "prefill", variables, prompts.tokens, prompts.lengths)
    return DecodeState(
        cache=KVCache.create(prompt_kv, prompts.lengths, group, slots, CACHE_TYPES[setup.config.kv_cache]),
        hidden=jnp.repeat(hidden[:, None], group, axis=1),
        remaining=jnp.full((hidden.shape[0], group), setup.config.max_completion_length, jnp.int32),
    )


def run_chunks(
    setup: Setup,
    variables: Params,
    state: DecodeState,
    uniforms: Float32[Array, "T Q G *N"],
    buffers: Recorded,
    enough: Callable[[Int32[Array, "Q G"]], Bool[Array, ""]],
) -> tuple[DecodeState, Recorded]:
    """Chunks of tokens into `buffers` (time first), until every row is done or, seeing what remains, it is `enough`."""
    size, _ = chunking(setup.config.max_completion_length)

    def unfinished(carry: tuple[DecodeState, Array]) -> Bool[Array, ""]:
        remaining = carry[0].remaining
        return jnp.any(remaining > 0) & ~enough(remaining)

    def advance(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        start = carry[0].drawn
        state, packed = decode_chunk(setup, variables, carry[0], lax.dynamic_slice_in_dim(uniforms, start, size))
        return state, lax.dynamic_update_slice_in_dim(carry[1], packed, start, axis=0)

    state, packed = lax.while_loop(unfinished, advance, (state, buffers.pack()))
    return state, Recorded.unpack(packed, state.remaining.shape)


def decode_chunk(
    setup: Setup, variables: Params, state: DecodeState, uniforms: Float32[Array, "size Q G *N"]
) -> tuple[DecodeState, Int32[Array, "size 4 M"]]:
    """`size` more tokens of every row, and what to keep of them; `variables` are `decoding_variables`, made once outside the loop.

    The loop has one counter, its own: another one would be a kernel in every step.
    """
    decode = functools.partial(_apply, setup, "decode", variables, unroll=unrolls(setup.config))
    shape, size = state.remaining.shape, len(uniforms)

    def advance(step: Int32[Array, ""], carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, packed = carry
        completions = Completions(packed, state.remaining.reshape(-1))
        token, completions = _draw(setup, variables, state.hidden, uniforms, completions, step)
        hidden, cache = decode(token.reshape(shape), state.cache, step)
        return DecodeState(cache, hidden, completions.remaining.reshape(shape)), completions.packed

    packed = jnp.zeros((size, 4, shape[0] * shape[1]), jnp.int32)
    state, packed = lax.fori_loop(0, size, advance, (state, packed))
    cache = dataclasses.replace(state.cache, length=state.cache.length + size)
    return dataclasses.replace(state, cache=cache), packed


_jit_prefill = jax.jit(prefill, static_argnames=("setup", "slots"))
_jit_chunk = jax.jit(decode_chunk, static_argnames=("setup",), donate_argnames=("state",))
_jit_constants = jax.jit(step_constants, static_argnames=("model", "positions"))
_jit_adapter = jax.jit(decoding_adapter, static_argnames=("model", "unroll"))


def _apply(setup: Setup, method: str, variables: Params, *args: Any, **settings: Any) -> Any:
    return setup.model.apply(variables, *args, method=method, **settings)


def _draw(
    setup: Setup,
    variables: Params,
    hidden: Float[Array, "Q G D"],
    uniforms: Float32[Array, "T Q G *N"],
    completions: Completions,
    step: Int32[Array, ""],
) -> tuple[Int32[Array, " M"], Completions]:
    config, ends = setup.config, Ends(setup.stop_ids, setup.pad_id)
    rows, numbers = hidden.reshape(-1, hidden.shape[-1]), uniforms.reshape(len(uniforms), -1, *uniforms.shape[3:])
    if PROPOSAL_HEAD in variables["params"]:
        proposal, head = _apply(setup, "proposal_logits", variables, rows), _apply(setup, "head_weight", variables)
        given = (proposal, rows, head, numbers, completions)
        return pallas_kernels.draw_corrected_and_record(*given, temperature=config.temperature, step=step, ends=ends)
    return draw_and_record(
        _apply(setup, "logits", variables, rows),
        numbers,
        completions,
        step,
        ends,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )


def to_rollout(prompts: Prompts, buffers: Recorded, limit: int) -> Rollout:
    """The result, from buffers `[T, Q, G]` with at least `limit` tokens."""
    recorded = jax.tree.map(lambda x: jnp.moveaxis(x[:limit], 0, -1), buffers)
    stopped = jnp.any(recorded.stops, axis=-1)
    return Rollout(
        prompt_tokens=prompts.tokens,
        prompt_lengths=prompts.lengths,
        completion_tokens=recorded.token,
        completion_lengths=jnp.sum(recorded.live, axis=-1, dtype=jnp.int32),
        completion_mask=recorded.live,
        logprobs=recorded.logprob,
        log_kept=recorded.log_kept,
        finish=jnp.where(stopped, FINISH_STOP, FINISH_LENGTH).astype(jnp.int32),
    )
