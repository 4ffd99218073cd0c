"""Rotary position embeddings in the half-split ("rotate_half") layout of Hugging Face checkpoints."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jgrpo.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """`[head_dim / 2]` float32 angles per position; Llama 3.1's scaling where the config asks for it."""
    # theta^(-2i / head_dim), as float32 powers: that is how the checkpoints' own code rounds them.
    freqs = 1.0 / np.float32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    return _llama3(freqs, rope) if rope.kind == "llama3" else freqs.astype(np.float32)


def _llama3(freqs: np.ndarray, rope: RopeConfig) -> np.ndarray:
    # Wavelengths above `original / low` are stretched by `factor`, those below `original / high` are kept,
    # and between the two the frequency is interpolated linearly in original / wavelength.
    wavelengths = 2 * math.pi / freqs
    turns = rope.original_max_position / wavelengths
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return ((1.0 - keep) * freqs / rope.factor + keep * freqs).astype(np.float32)


def apply_rope(
    x: Float[Array, "*B heads Hd"], positions: Int[Array, "*B"], inv_freq: np.ndarray
) -> Float[Array, "*B heads Hd"]:
    """Rotate `x[..., head, :]` by its position; angles in float32, result in `x.dtype`."""
    angles = positions[..., None, None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
