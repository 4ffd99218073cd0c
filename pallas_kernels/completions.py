"""What a rollout keeps of the tokens that it draws, for rows that end apart: one write a token."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32


class Ends(NamedTuple):
    """How rows end."""

    stop_ids: tuple[int, ...]
    """Tokens after which a row is done."""
    pad_id: int
    """What a row that is done draws."""


class Completions(NamedTuple):
    """Of all rows."""

    packed: Int32[Array, "T 4 M"]
    """`pack` of every step; steps to come hold anything."""
    remaining: Int32[Array, " M"]
    """Tokens that each row may still draw; 0 once it has drawn a stop token."""


def pack(
    token: Int32[Array, "*T M"],
    logprob: Float32[Array, "*T M"],
    log_kept: Float32[Array, "*T M"],
    live: Bool[Array, "*T M"],
    stops: Bool[Array, "*T M"],
) -> Int32[Array, "*T 4 M"]:
    """The token, the bits of two floats, and two flags: whether the token belongs to the completion, and ends it."""
    floats = (lax.bitcast_convert_type(x, jnp.int32) for x in (logprob, log_kept))
    return jnp.stack([token, *floats, live + 2 * stops.astype(jnp.int32)], axis=-2)


def unpack(packed: Int32[Array, "*T 4 M"]) -> tuple[Array, Array, Array, Array, Array]:
    """The arguments of `pack`."""
    token, *floats, flags = (packed[..., field, :] for field in range(4))
    logprob, log_kept = (lax.bitcast_convert_type(x, jnp.float32) for x in floats)
    return token, logprob, log_kept, flags & 1 != 0, flags & 2 != 0


def record(
    completions: Completions,
    step: Int[Array, ""] | int,
    ends: Ends,
    token: Int32[Array, " M"],
    logprob: Float32[Array, " M"],
    log_kept: Float32[Array, " M"],
) -> tuple[Int32[Array, " M"], Completions]:
    """(the tokens, of rows that are done the pad token, the completions with them at `step`); what done rows drew is masked."""
    live = completions.remaining > 0
    stops = live & jnp.isin(token, jnp.asarray(ends.stop_ids, jnp.int32))
    token = jnp.where(live, token, ends.pad_id)
    logprob, log_kept = (jnp.where(live, number, 0.0) for number in (logprob, log_kept))
    entry = pack(token, logprob, log_kept, live, stops)
    packed = lax.dynamic_update_index_in_dim(completions.packed, entry, step, 0)
    return token, Completions(packed, jnp.where(stops, 0, jnp.maximum(completions.remaining - 1, 0)))


def check_shapes(name: str, completions: Completions, steps: int, rows: int) -> None:
    """Raise a ValueError in the name of an operation unless these are the completions of so many steps and rows."""
    want, got = ((steps, 4, rows), (rows,)), (completions.packed.shape, completions.remaining.shape)
    if got != want:
        raise ValueError(f"{name}: completions must be {want[0]} and {want[1]}, got {got[0]} and {got[1]}")
