"""`completions.record` in the kernel that finds the tokens, for NVIDIA GPUs: it has them at hand, and a kernel of its own would be a launch.

Such a kernel takes pointers (remaining, packed, stop ids) behind its other arguments, and (remaining, packed) behind its other outputs.
"""

# pyright: reportMissingImports=false, reportArgumentType=false
# Triton is optional, and its kernel language is not typed Python.

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array

from pallas_kernels.completions import Completions, Ends


@triton.jit
def record_token(
    token,
    logprob,
    row,
    step,
    remaining,
    stops_ptr,
    remaining_out_ptr,
    packed_ptr,
    M: tl.constexpr,
    STOPS: tl.constexpr,
    PAD: tl.constexpr,
):
    """(token, log-probability) of a row, PAD and 0 where it has ended, which are left in the record; STOPS of the tokens end the row.

    `remaining` was loaded in front of a reduction, whose barriers all warps pass before one overwrites it here.
    """
    live = remaining > 0
    stops = remaining < 0
    for stop in tl.static_range(STOPS):
        stops |= live & (token == tl.load(stops_ptr + stop))
    token = tl.where(live, token, PAD)
    logprob = tl.where(live, logprob, 0.0)
    entry = packed_ptr + step * 4 * M + row
    tl.store(entry, token)
    tl.store(entry + M, logprob.to(tl.int32, bitcast=True))
    tl.store(entry + 2 * M, 0)
    tl.store(entry + 3 * M, live.to(tl.int32) + 2 * stops.to(tl.int32))
    tl.store(remaining_out_ptr + row, tl.where(stops, 0, tl.maximum(remaining - 1, 0)))
    return token, logprob


class Recording(NamedTuple):
    """What a kernel that finds tokens is launched with to record them, or not to."""

    arguments: tuple[Array, Array, Array]
    outputs: list[jax.ShapeDtypeStruct]
    aliases: dict[int, int]
    constants: dict[str, Any]


def recording(completions: Completions, ends: Ends, arguments: int, outputs: int = 2) -> Recording:
    """For a kernel with so many `arguments` and `outputs` in front; the completions are changed in place."""
    stops = jnp.asarray(ends.stop_ids or (0,), jnp.int32)
    own = completions.remaining, completions.packed
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in own]
    aliases = {arguments: outputs, arguments + 1: outputs + 1}
    return Recording((*own, stops), shapes, aliases, dict(RECORD=True, STOPS=len(ends.stop_ids), PAD=ends.pad_id))


def no_recording(unread: Array) -> Recording:
    """`unread` stands where the kernel reads nothing."""
    unwritten = jax.ShapeDtypeStruct((16,), jnp.int32)
    return Recording((unread,) * 3, [unwritten] * 2, {}, dict(RECORD=False, STOPS=0, PAD=0))
