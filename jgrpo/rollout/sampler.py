"""The decode loop: one compiled program takes prompts to a `Rollout`.

Each prompt is prefilled once for its whole group. The KV cache is part of the loop's carry, so it is updated in
place. The outer loop runs over chunks of up to 32 tokens and leaves as soon as every row is done; the inner loop has a
known trip count, so that on a GPU the host waits once a chunk and not once a token. All rows advance in
lockstep, and a row that is done draws pad tokens outside its mask.

A row's random numbers come from fold_in(key, question), fold_in(·, completion), fold_in(·, token): they do not depend on
the batch around the row, on the chunking or on the length limit.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32, PRNGKeyArray

from jgrpo.config import RolloutConfig
from jgrpo.lora import fuse
from jgrpo.models import KVCache, Transformer
from jgrpo.rollout.sampling import Draw, draw
from jgrpo.rollout.types import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout

MAX_CHUNK = 32
"""Decode steps between two tests whether every row is done."""

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


@flax.struct.dataclass
class DecodeState:
    """What the loop carries from token to token."""

    cache: KVCache
    """Keys and values of everything but the token drawn last."""
    token: Int32[Array, "Q G"]
    """The token drawn last."""
    done: Bool[Array, "Q G"]
    """Rows that have drawn a stop token."""
    drawn: Int32[Array, ""]
    """Tokens drawn so far, the same for every row."""
    row_keys: PRNGKeyArray
    """One key for each row, [Q, G]."""


@functools.partial(jax.jit, static_argnames=("model", "config", "eos_ids", "pad_id"))
def generate(
    model: Transformer,
    base: Params,
    lora: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
    config: RolloutConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """Draw `config.num_generations` completions of every prompt, each of at most `config.max_completion_length` tokens.

    Compiled once for each shape of `prompts`. The same key gives the same tokens; `lora = {}` samples from the base model.
    """
    setup = Setup.create(model, config, eos_ids, pad_id)
    limit = config.max_completion_length
    size, count = chunking(limit, MAX_CHUNK)
    state, first = prefill(setup, base, lora, prompts, key, size * count)
    adapter = fuse(lora, model.config, model.lora.scale, model.dtype)
    buffers = jax.tree.map(lambda x: jnp.zeros((size * count + 1, *x.shape), x.dtype).at[0].set(x), first)
    buffers = buffers._replace(token=buffers.token.at[1:].set(pad_id))

    def unfinished(carry: tuple[DecodeState, Recorded]) -> Bool[Array, ""]:
        return (carry[0].drawn < limit) & ~jnp.all(carry[0].done)

    def advance(carry: tuple[DecodeState, Recorded]) -> tuple[DecodeState, Recorded]:
        state, recorded = decode_chunk(setup, base, adapter, carry[0], size)
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=carry[0].drawn, axis=0)
        return state, jax.tree.map(write, carry[1], recorded)

    state, buffers = lax.while_loop(unfinished, advance, (state, buffers))
    return _rollout(prompts, jax.tree.map(lambda x: jnp.moveaxis(x[:limit], 0, -1), buffers), state.done)


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
    state, first = _jit_prefill(setup, base, lora, prompts, key, size * count)
    yield jax.tree.map(lambda x: x[None], first)
    for _ in range(count):
        if bool(jnp.all(state.done)):
            return
        state, recorded = _jit_chunk(setup, base, lora, state, size)
        yield recorded


def chunking(max_completion_length: int, max_chunk: int) -> tuple[int, int]:
    """(size, count) of equal chunks that hold the C - 1 decode steps after the prefill's token.

    The last chunk may overshoot by fewer than `count` steps, which is cheaper than compiling a second, shorter one.
    """
    steps = max_completion_length - 1
    count = -(-steps // max_chunk)
    return (-(-steps // count), count) if count else (1, 0)


def prefill(
    setup: Setup, base: Params, lora: Params, prompts: Prompts, key: PRNGKeyArray, slots: int
) -> tuple[DecodeState, Recorded]:
    """Run the prompts once, leave room for `slots` more tokens, and draw the first token of every completion."""
    model, group = setup.model, setup.config.num_generations
    questions = prompts.tokens.shape[0]
    variables = {"params": base, "lora": lora}
    hidden, prompt_kv = model.apply(variables, prompts.tokens, prompts.lengths, method="prefill")
    logits = model.apply(variables, hidden, method="logits")
    state = DecodeState(
        cache=KVCache.create(prompt_kv, prompts.lengths, group, max(slots, 1)),
        token=jnp.zeros((questions, group), jnp.int32),
        done=jnp.zeros((questions, group), bool),
        drawn=jnp.zeros((), jnp.int32),
        row_keys=_row_keys(key, questions, group),
    )
    group_logits = jnp.broadcast_to(logits[:, None], (questions, group, logits.shape[-1]))
    return _record(setup, state, _draw(setup, group_logits, _uniforms(state, 1)[0]))


def decode_chunk(
    setup: Setup, base: Params, adapter: Params, state: DecodeState, size: int
) -> tuple[DecodeState, Recorded]:
    """`size` more tokens of every row; fields of the second result are `[size, Q, G]`."""
    variables = {"params": base, "lora": adapter}

    def step(state: DecodeState, uniform: Float32[Array, "Q G"]) -> tuple[DecodeState, Recorded]:
        hidden, cache = setup.model.apply(variables, state.token, state.cache, method="decode")
        logits = setup.model.apply(variables, hidden, method="logits")
        return _record(setup, state.replace(cache=cache), _draw(setup, logits, uniform))

    return lax.scan(step, state, _uniforms(state, size))


@functools.partial(jax.jit, static_argnames=("setup", "slots"))
def _jit_prefill(setup: Setup, base: Params, lora: Params, prompts: Prompts, key: PRNGKeyArray, slots: int) -> Any:
    return prefill(setup, base, lora, prompts, key, slots)


@functools.partial(jax.jit, static_argnames=("setup", "size"), donate_argnames=("state",))
def _jit_chunk(setup: Setup, base: Params, lora: Params, state: DecodeState, size: int) -> Any:
    adapter = fuse(lora, setup.model.config, setup.model.lora.scale, setup.model.dtype)
    return decode_chunk(setup, base, adapter, state, size)


def _draw(setup: Setup, logits: Float32[Array, "Q G V"], uniform: Float32[Array, "Q G"]) -> Draw:
    config = setup.config
    return draw(
        logits,
        uniform,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )


def _record(setup: Setup, state: DecodeState, drawn: Draw) -> tuple[DecodeState, Recorded]:
    """Mask what rows past their end drew, and note the rows that end here."""
    live = ~state.done & (state.drawn < setup.config.max_completion_length)
    token = jnp.where(live, drawn.token, setup.pad_id)
    stops = live & jnp.isin(drawn.token, jnp.asarray(setup.stop_ids, jnp.int32))
    recorded = Recorded(token, jnp.where(live, drawn.logprob, 0.0), jnp.where(live, drawn.log_kept, 0.0), live)
    return state.replace(token=token, done=state.done | stops, drawn=state.drawn + 1), recorded


def _row_keys(key: PRNGKeyArray, questions: int, group: int) -> PRNGKeyArray:
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(fold, in_axes=(0, None))(fold(key, jnp.arange(questions)), jnp.arange(group))


def _uniforms(state: DecodeState, size: int) -> Float32[Array, "size Q G"]:
    """The random numbers of the next `size` tokens, drawn before the loop over them."""

    def one(key: PRNGKeyArray, token: Int32[Array, ""]) -> Float32[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(key, token))

    rows = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(0, None))
    return jax.vmap(rows, in_axes=(None, 0))(state.row_keys, state.drawn + jnp.arange(size))


def _rollout(prompts: Prompts, recorded: Recorded, done: Bool[Array, "Q G"]) -> Rollout:
    return Rollout(
        prompt_tokens=prompts.tokens,
        prompt_lengths=prompts.lengths,
        completion_tokens=recorded.token,
        completion_lengths=jnp.sum(recorded.live, axis=-1, dtype=jnp.int32),
        completion_mask=recorded.live,
        logprobs=recorded.logprob,
        log_kept=recorded.log_kept,
        finish=jnp.where(done, FINISH_STOP, FINISH_LENGTH).astype(jnp.int32),
    )
