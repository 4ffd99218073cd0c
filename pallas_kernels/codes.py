"""How bytes stand for the elements of a frozen matrix. Groups of g elements along the input axis K share one scale.

- "int4": (nibble - zero) * scale, zero = 8 unless zeros are given;
- "nf4": NF4[nibble] * scale, the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E);
- "int8": byte * scale;
- "fast8": step * scale, with steps of one from -128 for the bytes below 128 and of two from 0 for the others: the bfloat16 number whose
  bits are 0x4300 + byte, less 256. One byte permutation and one fused multiply-add make two weights of it, where int8 takes five instructions.

Four-bit codes are split-half inside a group: byte j of group n holds element n*g + j in its low nibble and element
n*g + g/2 + j in its high nibble.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

NF4 = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
PER_BYTE = {"int4": 2, "nf4": 2, "int8": 1, "fast8": 1}
"""Elements in a byte of each code."""
LAYER_CODE = "fast8"
"""Of the weights that `decode_layers` reads."""


def fast8_levels(packed: Any, xp: Any) -> Any:
    """Steps of the scale that bytes of "fast8" stand for, float32; `xp` is numpy or jax.numpy."""
    byte = packed.astype(xp.float32)
    return xp.where(byte < 128, byte - 128, 2 * byte - 256)


def quantize_fast8(weight: Any, group: int, scale_dtype: Any) -> tuple[Any, Any]:
    """(bytes, scales) of float32 `[*L, N, K]` in groups of so many columns; numpy in, numpy out, and jax in, jax out.

    The scale has the sign that makes it smaller: steps reach from -128 to 254, and above 0 they are twice as far apart.
    """
    xp: Any = np if isinstance(weight, np.ndarray) else jnp
    groups = weight.reshape(*weight.shape[:-1], -1, group)
    below, above = (xp.maximum(side.max(axis=-1), 0) for side in (-groups, groups))
    upright, flipped = xp.maximum(below / 128, above / 254), xp.maximum(above / 128, below / 254)
    scales = xp.where(upright <= flipped, upright, -flipped).astype(scale_dtype)
    steps = groups / xp.where(scales == 0, 1, scales).astype(xp.float32)[..., None]
    negative, positive = xp.clip(xp.round(steps), -128, -1), xp.clip(xp.round(steps / 2), 0, 127)
    packed = (128 + xp.where(steps < -0.5, negative, positive)).astype(xp.uint8)
    return packed.reshape(weight.shape), scales


def group_size(packed: Any, scales: Any, code: str = "int4") -> int:
    """Input elements that share one scale."""
    return PER_BYTE[code] * packed.shape[-1] // scales.shape[-1]


def dequantize(packed: Any, scales: Any, dtype: Any, code: str = "int4", zeros: Any = None) -> Any:
    """The weights `[*L, N, K]` in `dtype`, rounded once from float32; numpy in, numpy out, and jax in, jax out."""
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    *lead, width = packed.shape
    groups = packed.reshape(*lead, scales.shape[-1], -1)
    if code == "int8":
        levels = groups.astype(xp.float32)
    elif code == "fast8":
        levels = fast8_levels(groups, xp)
    else:
        nibbles = xp.concatenate([groups & 0xF, groups >> 4], axis=-1)
        if code == "nf4":
            levels = xp.asarray(NF4)[nibbles]
        elif zeros is None:
            levels = (nibbles.astype(xp.int8) - 8).astype(xp.float32)
        else:
            levels = (nibbles.astype(xp.int8) - zeros[..., None].astype(xp.int8)).astype(xp.float32)
    values = levels * scales[..., None].astype(xp.float32)
    return values.reshape(*lead, PER_BYTE[code] * width).astype(dtype)
