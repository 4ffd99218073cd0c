"""Rotary position embeddings in the half-split ("rotate_half") layout of Hugging Face checkpoints.

The kinds are transformers': default; linear (positions ÷ factor); dynamic (NTK-aware base, bloc97 and emozilla 2023);
llama3 (Llama 3.1's bands); yarn (Peng et al. 2023, arXiv:2309.00071); longrope (Ding et al. 2024, arXiv:2402.13753).
Deviation, for the two kinds that depend on the length of a row: transformers chooses the frequencies anew for every
forward, under which keys cached earlier keep the old ones. Here `context_length` chooses once for the whole run, as
vLLM does, so that a cached key, a key of the trainer's forward and a key of a longer row are the same.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jgrpo.models.config import ModelConfig, RopeConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds whose frequencies follow from the length of the longest row."""


def inverse_frequencies(rope: RopeConfig, head_dim: int, context_length: int | None = None) -> np.ndarray:
    """`[rotated / 2]` float32 angles per position, where rotated = partial · head_dim."""
    rotated = int(head_dim * rope.partial)
    theta = rope.theta
    if rope.kind == "dynamic":
        stretch = max(context_length or 0, rope.original_max_position) / rope.original_max_position
        theta *= (rope.factor * stretch - (rope.factor - 1)) ** (rotated / (rotated - 2))
    # theta^(2i / rotated), as float32 powers: that is how the checkpoints' own code rounds them.
    powers = np.float32(theta) ** (np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated))
    freqs = (1.0 / powers).astype(np.float32)
    if rope.kind == "linear":
        return freqs / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(freqs, rope)
    if rope.kind == "yarn":
        return _yarn(freqs, rope, rotated)
    if rope.kind == "longrope":
        beyond = (context_length or 0) > rope.original_max_position
        return (1.0 / (np.asarray(rope.long_factor if beyond else rope.short_factor, np.float32) * powers)).astype("f4")
    return freqs


def _llama3(freqs: np.ndarray, rope: RopeConfig) -> np.ndarray:
    # Wavelengths above `original / low` are stretched by `factor`, those below `original / high` are kept,
    # and between the two the frequency is interpolated linearly in original / wavelength.
    wavelengths = 2 * math.pi / freqs
    turns = rope.original_max_position / wavelengths
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return ((1.0 - keep) * freqs / rope.factor + keep * freqs).astype(np.float32)


def _yarn(freqs: np.ndarray, rope: RopeConfig, rotated: int) -> np.ndarray:
    # Dimensions that turn more than beta_fast times within the pretraining's positions are kept, those below beta_slow
    # turns are stretched by `factor`, with a linear ramp over the dimension between them.
    def dimension(turns: float) -> float:
        return rotated * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    span = 0.001 if low == high else high - low
    keep = 1.0 - np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / span, 0.0, 1.0)
    return (freqs / rope.factor * (1.0 - keep) + freqs * keep).astype(np.float32)


def check_positions(rope: RopeConfig, context_length: int | None, positions: int) -> None:
    """ValueError where rows of `positions` would need other frequencies than those that `context_length` chose."""
    limit = max(rope.original_max_position, context_length or 0)
    if rope.kind in LENGTH_DEPENDENT and positions > limit:
        raise ValueError(
            f"rows of {positions} positions with {rope.kind!r} rotary scaling: its frequencies were chosen for {limit}; "
            f"set ModelConfig.context_length to at least {positions}"
        )


def for_positions(config: ModelConfig, positions: int) -> ModelConfig:
    """The model's settings for rows of up to `positions`, where its frequencies depend on that."""
    return dataclasses.replace(config, context_length=positions) if config.rope.kind in LENGTH_DEPENDENT else config


def rope_tables(
    positions: Int[Array, "*B"], inv_freq: np.ndarray | Array, attention_factor: float | Array = 1.0
) -> tuple[Float[Array, "*B R"], Float[Array, "*B R"]]:
    """cos and sin of every position's angles, float32."""
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(
    x: Float[Array, "*B heads Hd"],
    positions: Int[Array, "*B"],
    inv_freq: np.ndarray | Array,
    attention_factor: float | Array = 1.0,
) -> Float[Array, "*B heads Hd"]:
    """Rotate `x[..., head, :2·len(inv_freq)]` by its position; angles in float32, result in `x.dtype`."""
    cos, sin = (table.astype(x.dtype) for table in rope_tables(positions[..., None], inv_freq, attention_factor))
    half = inv_freq.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
