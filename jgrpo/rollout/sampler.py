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
from jgrpo.rollout.sampling import Draw, draw, draw_by_proposal
from jgrpo.rollout.types import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout
from jgrpo.rollout.weights import decoding_adapter, unrolls

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

    def pack(self) -> Int32[Array, "4 Q G"]:
        """All fields in one array: one write a token instead of five."""
        floats = (lax.bitcast_convert_type(x, jnp.int32) for x in (self.logprob, self.log_kept))
        return jnp.stack([self.token, *floats, self.live + 2 * self.stops.astype(jnp.int32)])

    @classmethod
    def unpack(cls, packed: Int32[Array, "T 4 Q G"]) -> "Recorded":
        """`pack` undone, of a stack."""
        token, *floats, flags = (packed[:, field] for field in range(4))
        logprob, log_kept = (lax.bitcast_convert_type(x, jnp.float32) for x in floats)
        return cls(token, logprob, log_kept, flags & 1 != 0, flags & 2 != 0)


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
    variables = {"params": base, "lora": _jit_adapter(model, lora, unrolls(config))}
    for start in range(0, size * count, size):
        state, recorded = _jit_chunk(setup, variables, state, uniforms[start : start + size])
        yield jax.tree.map(lambda x, rest=limit - start: x[:rest], recorded)
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

    def unfinished(carry: tuple[DecodeState, Recorded]) -> Bool[Array, ""]:
        remaining = carry[0].remaining
        return jnp.any(remaining > 0) & ~enough(remaining)

    def advance(carry: tuple[DecodeState, Recorded]) -> tuple[DecodeState, Recorded]:
        start = carry[0].drawn
        chunk = lax.dynamic_slice_in_dim(uniforms, start, size)
        state, recorded = decode_chunk(setup, variables, carry[0], chunk)
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return state, jax.tree.map(write, carry[1], recorded)

    return lax.while_loop(unfinished, advance, (state, buffers))


def decode_chunk(
    setup: Setup, variables: Params, state: DecodeState, uniforms: Float32[Array, "size Q G *N"]
) -> tuple[DecodeState, Recorded]:
    """`size` more tokens of every row; `variables` are `decoding_variables`, made once outside the loop."""
    decode = functools.partial(_apply, setup, "decode", variables, unroll=unrolls(setup.config))

    def step(state: DecodeState, index: Int32[Array, ""]) -> tuple[DecodeState, Array]:
        recorded = _record(setup, state, _draw(setup, variables, state.hidden, uniforms, index))
        hidden, cache = decode(recorded.token, state.cache)
        remaining = jnp.where(recorded.stops, 0, jnp.maximum(state.remaining - 1, 0))
        return DecodeState(cache, hidden, remaining), recorded.pack()

    state, packed = lax.scan(step, state, jnp.arange(len(uniforms)))
    return state, Recorded.unpack(packed)


_jit_prefill = jax.jit(prefill, static_argnames=("setup", "slots"))
_jit_chunk = jax.jit(decode_chunk, static_argnames=("setup",), donate_argnames=("state",))
_jit_adapter = jax.jit(decoding_adapter, static_argnames=("model", "unroll"))


def _apply(setup: Setup, method: str, variables: Params, *args: Any, **settings: Any) -> Any:
    return setup.model.apply(variables, *args, method=method, **settings)


def _draw(
    setup: Setup,
    variables: Params,
    hidden: Float[Array, "Q G D"],
    uniforms: Float32[Array, "size Q G *N"],
    step: Int32[Array, ""],
) -> Draw:
    config = setup.config
    if PROPOSAL_HEAD in variables["params"]:
        proposal, head = _apply(setup, "proposal_logits", variables, hidden), _apply(setup, "head_weight", variables)
        return draw_by_proposal(proposal, hidden, head, uniforms, temperature=config.temperature, step=step)
    return draw(
        _apply(setup, "logits", variables, hidden),
        uniforms,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        step=step,
    )


def _record(setup: Setup, state: DecodeState, drawn: Draw) -> Recorded:
    """Mask what rows past their end drew."""
    live = state.remaining > 0
    return Recorded(
        token=jnp.where(live, drawn.token, setup.pad_id),
        logprob=jnp.where(live, drawn.logprob, 0.0),
        log_kept=jnp.where(live, drawn.log_kept, 0.0),
        live=live,
        stops=live & jnp.isin(drawn.token, jnp.asarray(setup.stop_ids, jnp.int32)),
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
