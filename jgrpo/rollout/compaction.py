"""Fewer rows once most completions have ended, so that the long tail of a batch doesn't run at the price of the whole.

A compiled program has one shape, so rows are dropped in a few steps: a half, a quarter and an eighth of the batch. The loop
over chunks tests on the device whether the live rows fit the next step, leaves if they do, and goes on in the program
of that shape, which is compiled when a batch first gets there or ahead of it (`ahead.py`). A batch whose rows end together never leaves.

The live rows of a question need no longer be G. They are regrouped: a question with n live rows becomes ⌈n / G'⌉ questions of
G' rows, which repeats its prompt in the cache and keeps every shape `[Q', G']` rectangular, so that attention needs no
table of rows. G' is at most G over twice the step, which holds the rows lost to rounding and the repeated prompts to at most 2Q.

Every row keeps its random numbers, so its tokens are those of a run without compaction.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Int32

from jgrpo.models import KVCache
from jgrpo.rollout.sampler import DecodeState, Recorded

STEPS = (1, 2, 3)
"""Halvings of the batch at which it may shrink: at most that many more programs to compile."""
MIN_ROWS = 32
"""Fewer rows cost what this many do: the weights are read all the same."""


class Bucket(NamedTuple):
    """A shape `[Q', G']` to go on in."""

    questions: int
    group: int

    @property
    def rows(self) -> int:
        """Rows that it has."""
        return self.questions * self.group


def buckets(questions: int, group: int) -> tuple[Bucket, ...]:
    """Shapes that a batch of `[Q, G]` may shrink to, the largest first."""
    rows, found = questions * group, []
    for step in STEPS:
        smaller = max(1, group >> (step + 1))
        bucket = Bucket((rows >> step) // smaller, smaller)
        if bucket.rows >= MIN_ROWS:
            found.append(bucket)
    return tuple(found)


@flax.struct.dataclass
class Stage:
    """The loop at one shape."""

    state: DecodeState
    """Cache, hidden states and what remains of the rows."""
    uniforms: Float32[Array, "T Q G *N"]
    """The rows' random numbers."""
    buffers: Recorded
    """Tokens `[T, Q, G]` drawn at this shape; empty elsewhere."""
    rows: Int32[Array, "Q G"]
    """Number of each row in the batch, counted over questions and completions; rows that only fill up have the batch's size."""


def fits(
    remaining: Int32[Array, "Q G"], rows: Int32[Array, "Q G"], bucket: Bucket, shape: tuple[int, int]
) -> Bool[Array, ""]:
    """Whether the live rows, regrouped by question, fit the bucket; `shape` is the batch's [Q, G]."""
    questions, group = shape
    live = jnp.zeros(questions + 1, jnp.int32).at[rows // group].add((remaining > 0).astype(jnp.int32))
    return jnp.sum(-(-live[:questions] // bucket.group)) <= bucket.questions


def regroup(live: np.ndarray, rows: np.ndarray, bucket: Bucket, group: int) -> np.ndarray | None:
    """Position (row-major) in the present shape of every row of the bucket, -1 where it is filled up; None if it is too small.

    Every question of the bucket holds rows of one question of the batch.
    """
    taken = np.full(bucket, -1)
    question = 0
    positions = np.flatnonzero(live)
    owners = rows.reshape(-1)[positions] // group
    for owner in np.unique(owners):
        own = positions[owners == owner]
        for start in range(0, len(own), bucket.group):
            if question == bucket.questions:
                return None
            part = own[start : start + bucket.group]
            taken[question, : len(part)] = part
            question += 1
    return taken


def smallest_fit(
    live: np.ndarray, rows: np.ndarray, choices: tuple[Bucket, ...], group: int
) -> tuple[int, np.ndarray] | None:
    """(index of the smallest bucket that holds the live rows, `regroup` for it), or None."""
    fitting = [
        (i, taken) for i, bucket in enumerate(choices) if (taken := regroup(live, rows, bucket, group)) is not None
    ]
    return fitting[-1] if fitting else None


def shrink(stage: Stage, taken: np.ndarray, batch_rows: int) -> Stage:
    """The stage with the rows `taken`; the old one's cache is freed on the way, keys before values are copied."""
    # What is made of the indices is made on the host: an operation outside the programs would be a program of its own.
    index, valid = np.maximum(taken, 0).astype(np.int32), taken >= 0
    # A question's first row is always taken, or the question is filled up.
    owner = index[:, 0] // np.int32(stage.rows.shape[1])
    cache = _taken_cache(stage.state.cache, owner, index, _consume)
    return _take_rest(stage, cache, index, owner, valid, batch_rows=batch_rows)


def lower_shrink(stage: Stage, bucket: Bucket, batch_rows: int) -> list[jax.stages.Lowered]:
    """The programs of `shrink` from shapes, the last of which returns the smaller stage."""
    taken: dict[Any, jax.stages.Lowered] = {}

    def take(stack: Array, index: Array) -> Any:
        key = (stack.shape, stack.dtype, index.shape)
        taken.setdefault(key, _take.lower(stack, index))
        out = taken[key].out_info
        return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=stack.sharding)

    shapes = [((bucket.questions,), jnp.int32), (bucket, jnp.int32), (bucket, jnp.bool_)]
    owner, index, valid = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    cache = _taken_cache(stage.state.cache, owner, index, take)
    return [*taken.values(), _take_rest.lower(stage, cache, index, owner, valid, batch_rows=batch_rows)]


def _taken_cache(cache: KVCache, owner: Any, index: Any, take: Callable[[Any, Any], Any]) -> KVCache:
    """The cache with every stack taken; the lengths stay for `_take_rest`."""
    prompts, suffixes = (lambda stack, which=which: take(stack, which) for which in (owner, index))
    return KVCache(
        prompt_k=prompts(cache.prompt_k),
        prompt_v=prompts(cache.prompt_v),
        prompt_lengths=cache.prompt_lengths,
        k=suffixes(cache.k),
        v=suffixes(cache.v),
        length=cache.length,
        prompt_scales=jax.tree.map(prompts, cache.prompt_scales),
        scales=jax.tree.map(suffixes, cache.scales),
    )


@jax.jit
def _take(stack: Array, index: Array) -> Array:
    if index.ndim == 1:
        return jnp.take(stack, index, axis=1)
    layers, questions, group, *rest = stack.shape
    flat = stack.reshape(layers, questions * group, *rest)
    return jnp.take(flat, index.reshape(-1), axis=1).reshape(layers, *index.shape, *rest)


def _consume(stack: Array, index: Array) -> Array:
    """Of a stack `[L, Q, …]` the questions `[Q']`, or of `[L, Q, G, …]` the rows `[Q', G']`; frees the stack."""
    taken = _take(stack, index)
    stack.delete()
    return taken


@functools.partial(jax.jit, static_argnames=("batch_rows",))
def _take_rest(stage: Stage, cache: KVCache, index: Array, owner: Array, valid: Array, batch_rows: int) -> Stage:
    def take(x: Array, axis: int = 0) -> Array:
        flat = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jnp.take(flat, index, axis=axis)

    state = stage.state
    cache = dataclasses.replace(cache, prompt_lengths=cache.prompt_lengths[owner])
    return Stage(
        state=DecodeState(cache, take(state.hidden), jnp.where(valid, take(state.remaining), 0)),
        uniforms=take(stage.uniforms, 1),
        buffers=Recorded.empty((stage.uniforms.shape[0], *index.shape), 0),
        rows=jnp.where(valid, take(stage.rows), batch_rows),
    )


@jax.jit
def merge_buffers(full: Recorded, part: Recorded, rows: Int32[Array, "Q G"]) -> Recorded:
    """The batch's buffers `[T, Q, G]` with the tokens that a later stage drew."""
    tokens, questions, group = full.live.shape

    def put(whole: Array, new: Array) -> Array:
        flat = whole.reshape(tokens, -1)
        index = rows.reshape(-1)
        kept = jnp.take(flat, index, axis=1, mode="clip")
        new = jnp.where(part.live.reshape(tokens, -1), new.reshape(tokens, -1), kept)
        return flat.at[:, index].set(new, mode="drop").reshape(tokens, questions, group)

    return Recorded(*(put(whole, new) for whole, new in zip(full, part, strict=True)))
