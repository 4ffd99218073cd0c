"""Keys and values in 8 bits: int8, or float8 (e4m3) where the GPU has it, with one scale for each slot and head.

A head of a slot is x ≈ code · scale with scale = max|x| / the largest code, so that a write needs nothing but what it
writes. Attention multiplies the scores by the keys' scales and the probabilities by the values', never the codes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Largest code of each type."""
SMALLEST_SCALE = 1e-30
"""Keeps a head of zeros from being divided by zero."""


def is_coded(dtype) -> bool:
    """Whether a cache of this type has scales."""
    return jnp.dtype(dtype).name in LARGEST


def encode(x: Float[Array, "*B Hd"], dtype) -> tuple[Array, Float[Array, "*B"]]:
    """(codes of `dtype`, float32 scales)."""
    wide = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), SMALLEST_SCALE) / LARGEST[jnp.dtype(dtype).name]
    scaled = wide / scales[..., None]
    # floor(x + 1/2) is what the kernel has; it differs from rounding half to even at ties only.
    codes = jnp.floor(scaled + 0.5) if jnp.dtype(dtype) == jnp.int8 else scaled
    return codes.astype(dtype), scales


def decode(codes: Array, scales: Float[Array, "*B"] | None, dtype) -> Float[Array, "*B Hd"]:
    """The values in `dtype`; a cache without scales holds them as they are."""
    return codes if scales is None else (codes.astype(jnp.float32) * scales[..., None]).astype(dtype)
