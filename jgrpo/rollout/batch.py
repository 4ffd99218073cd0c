"""`generate`: prompts to a `Rollout`, in one compiled program or, where rows may be dropped on the way, in one for each shape."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32, PRNGKeyArray

from jgrpo.config import RolloutConfig
from jgrpo.models import Transformer
from jgrpo.rollout import compaction
from jgrpo.rollout.compaction import Bucket, Stage
from jgrpo.rollout.sampler import (
    Params,
    Recorded,
    Setup,
    chunking,
    numbers_a_draw,
    prefill,
    row_keys,
    row_uniforms,
    run_chunks,
    to_rollout,
)
from jgrpo.rollout.types import Prompts, Rollout
from jgrpo.rollout.weights import at_once, decoded, decoding_variables, unrolls

DECODING: dict[str, bool | int | str] = {"xla_gpu_experimental_force_split_k": 1, "xla_gpu_enable_triton_gemm": False}
"""XLA's compiler options for programs that decode: products whole, and by cuBLAS.

XLA splits K of a decode step's products and adds the parts in an operation of its own. At 256 rows of Qwen2.5-1.5B on an H200
that took 12 us where cuBLAS takes 6; without it a rollout is 9 % faster, and compiles in half the time because fewer
implementations are tried. Products of fewer rows have kernels that leave their parts to what reads them.
"""


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
    row_limits: Int32[Array, "Q G"] | None = None,
) -> Rollout:
    """Draw `config.num_generations` completions of every prompt, each of at most `config.max_completion_length` tokens.

    Compiled once for each shape of `prompts`, and once for each shape that long tails shrink to when one first does. The
    same key gives the same tokens; `lora = {}` samples from the base model, `{"weights": …}` from those. `row_limits` gives
    rows lower limits of their own. With `config.prompts_at_once` so many prompts are sampled after each other, all in the
    same programs, and every row draws what it draws with all at once. Returns when the rollout is done. Not to be called
    inside `jit`: it looks at which rows have ended.
    """
    questions, width = prompts.tokens.shape
    weights = decoded(model, base, lora, config, (questions, width))
    draw = functools.partial(_generate, model, *weights, config=config, eos_ids=eos_ids, pad_id=pad_id)
    size = at_once(config, questions)
    parts: Iterable[Any] = [(prompts, key, row_limits)]
    if size < questions:
        keys = row_keys(key, (questions, config.num_generations))
        parts = _parts(size, prompts, keys, row_limits, config.max_completion_length)
    # By way of the host, once nothing else of the sampling is alive. The small arrays of a rollout are allocated while its KV
    # cache is there: left in their place, they can cut what is free in two when the cache goes. Under a cap of 3.4 GB, with
    # them there, an update that fitted in all found no single piece of the size (docs/benchmarks.md).
    hosts: list[Rollout] = []
    places: Any = None
    for part in parts:
        drawn = draw(*part)
        places = jax.tree.map(lambda array: array.sharding, drawn)
        hosts.append(jax.device_get(drawn))
        del drawn
    return jax.device_put(jax.tree.map(lambda *arrays: np.concatenate(arrays)[:questions], *hosts), places)


def _parts(
    size: int, prompts: Prompts, keys: PRNGKeyArray, row_limits: Array | None, limit: int
) -> Iterator[tuple[Prompts, PRNGKeyArray, Array | None]]:
    """`size` prompts after the others, with their rows' keys and limits; what fills up the last ones may draw nothing."""
    questions = len(prompts.lengths)
    if questions % size and row_limits is None:
        row_limits = jnp.full(keys.shape, limit, jnp.int32)
    for start in range(0, questions, size):
        index = np.minimum(np.arange(start, start + size), questions - 1)
        limits = row_limits
        if limits is not None:
            limits = jnp.where(np.arange(start, start + size)[:, None] < questions, limits[index], 0)
        yield jax.tree.map(lambda array, index=index: jnp.asarray(array)[index], prompts), keys[index], limits


def _generate(
    model: Transformer,
    base: Params,
    lora: Params,
    merged: Any,
    prompts: Prompts,
    key: PRNGKeyArray,
    row_limits: Array | None,
    *,
    config: RolloutConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """`generate` of all these prompts at once; `key` may be the rows' own keys."""
    shape = (prompts.tokens.shape[0], config.num_generations)
    smaller = compaction.buckets(*shape) if config.compaction else ()
    if not smaller:
        how = dict(eos_ids=eos_ids, pad_id=pad_id, row_limits=row_limits, merged=merged)
        return rollout_program(model, base, lora, prompts, key, config, **how)
    setup = Setup.create(model, config, eos_ids, pad_id)
    stage = _first_stage(setup, base, lora, merged, prompts, key, row_limits, smaller[0])
    buffers = stage.buffers
    while (live := np.asarray(stage.state.remaining) > 0).any():
        found = compaction.smallest_fit(live, np.asarray(stage.rows), smaller, shape[1])
        assert found is not None, "a stage ends when every row is done or the next bucket holds the live ones"
        number, taken = found
        smaller = smaller[number + 1 :]
        stage = compaction.shrink(stage, taken, shape[0] * shape[1])
        stage = _next_stage(setup, base, lora, merged, stage, smaller[0] if smaller else None, shape)
        buffers = compaction.merge_buffers(buffers, stage.buffers, stage.rows)
    return _finish(prompts, buffers, config.max_completion_length)


@functools.partial(jax.jit, static_argnames=("model", "config", "eos_ids", "pad_id"), compiler_options=DECODING)
def rollout_program(
    model: Transformer,
    base: Params,
    lora: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
    config: RolloutConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    row_limits: Int32[Array, "Q G"] | None = None,
    merged: Mapping[str, Any] | None = None,
) -> Rollout:
    """`generate` as one program, all prompts at once, at one shape from the first token to the last.

    `merged` is `weights.merge`'s copy; `key` may be the rows' own keys (`sampler.row_keys`). May be lowered and compiled ahead,
    but JAX refuses it inside another `jit`, because it has compiler options (`DECODING`).
    """
    setup = Setup.create(model, config, eos_ids, pad_id)
    stage = _begin(setup, base, lora, merged, prompts, key, row_limits)
    positions = stage.state.cache.positions
    variables = decoding_variables(model, base, lora, merged, unrolls(config), positions)
    _, buffers = run_chunks(setup, variables, stage.state, stage.uniforms, stage.buffers, lambda _: jnp.asarray(False))
    return to_rollout(prompts, buffers, config.max_completion_length)


def _begin(
    setup: Setup, base: Params, lora: Params, merged: Any, prompts: Prompts, key: PRNGKeyArray, row_limits: Any
) -> Stage:
    size, count = chunking(setup.config.max_completion_length)
    state = prefill(setup, base, lora, prompts, size * count)
    if row_limits is not None:
        state = dataclasses.replace(state, remaining=jnp.minimum(state.remaining, row_limits))
    shape = state.remaining.shape
    uniforms = row_uniforms(key, shape, size * count, numbers_a_draw(merged))
    rows = jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)
    return Stage(state, uniforms, Recorded.empty((size * count, *shape), setup.pad_id), rows)


@functools.partial(jax.jit, static_argnames=("setup", "until"), compiler_options=DECODING)
def _first_stage(
    setup: Setup,
    base: Params,
    lora: Params,
    merged: Any,
    prompts: Prompts,
    key: PRNGKeyArray,
    row_limits: Any,
    until: Bucket,
) -> Stage:
    stage = _begin(setup, base, lora, merged, prompts, key, row_limits)
    questions, group = stage.rows.shape
    return _run(setup, base, lora, merged, stage, until, (questions, group))


@functools.partial(
    jax.jit, static_argnames=("setup", "until", "shape"), donate_argnames=("stage",), compiler_options=DECODING
)
def _next_stage(
    setup: Setup, base: Params, lora: Params, merged: Any, stage: Stage, until: Bucket | None, shape: tuple[int, int]
) -> Stage:
    return _run(setup, base, lora, merged, stage, until, shape)


def _run(
    setup: Setup, base: Params, lora: Params, merged: Any, stage: Stage, until: Bucket | None, shape: tuple[int, int]
) -> Stage:
    """Chunks until every row is done or the live ones fit `until`."""

    def enough(remaining: Array) -> Array:
        return jnp.asarray(False) if until is None else compaction.fits(remaining, stage.rows, until, shape)

    positions = stage.state.cache.positions
    variables = decoding_variables(setup.model, base, lora, merged, unrolls(setup.config), positions)
    state, buffers = run_chunks(setup, variables, stage.state, stage.uniforms, stage.buffers, enough)
    return dataclasses.replace(stage, state=state, buffers=buffers)


_finish = jax.jit(to_rollout, static_argnames=("limit",))
