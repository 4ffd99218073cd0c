"""Move host arrays into the device's memory in pieces, so that no transfer takes a second copy of a large array.

XLA's GPU client copies what is transferred into pinned host memory first, from a pool that doubles as it grows and gives
nothing back (xla/pjrt, `should_stage_host_to_device_transfers`): a stack of 0.84 GB that is moved at once costs another
gigabyte of the host for as long as the process lives. Pieces of `PIECE_BYTES`, each moved when the one before it has
arrived, pass through the same few blocks of the pool. On a CPU there is no pool: the device takes a host array over.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PIECE_BYTES = 2**24
"""16 MB: a transfer of half a millisecond or more, long against its launch."""


def put(host: np.ndarray) -> jax.Array:
    """The array on the default device, which is done with `host` when this returns (or has taken it over, on a CPU)."""
    if host.nbytes <= PIECE_BYTES or jax.default_backend() == "cpu":
        return jax.block_until_ready(jax.device_put(host))
    return insert(jnp.zeros(host.shape, host.dtype), host)


def insert(target: jax.Array, host: np.ndarray, layer: int | None = None) -> jax.Array:
    """`target`, which is donated, with `host` in its place or, with `layer`, in the place of that index of axis 0.

    `host` has been read when this returns and may be written again.
    """
    step = max(1, PIECE_BYTES * host.shape[0] // max(1, host.nbytes))
    for start in range(0, host.shape[0], step):
        rows = jax.device_put(host[start : start + step])
        # Waits: a piece that is still under way would hold its block of the pool, and the next one would make it grow.
        target = jax.block_until_ready(_update(target, rows, (start,) if layer is None else (layer, start)))
    return target


@functools.partial(jax.jit, donate_argnums=0)
def _update(target: jax.Array, rows: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    rows = rows.reshape((1,) * (target.ndim - rows.ndim) + rows.shape)
    return jax.lax.dynamic_update_slice(target, rows, start + (0,) * (target.ndim - len(start)))
