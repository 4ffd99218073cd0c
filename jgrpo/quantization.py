"""Int4 weights and the one matmul that every linear layer goes through.

Symmetric, group-wise along the input axis: value = (nibble - 8) · scale, with the (signed) scale chosen so that
the element of largest magnitude in a group lands exactly on -8, the rule of GGML's Q4_0.
Storage is uint8 with two nibbles. Packing is split-half inside a group of g elements: byte j holds element j in
its low and element g/2 + j in its high nibble, so unpacking needs no interleaving.
"""

from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

import pallas_kernels
from jgrpo.errors import UserError


@flax.struct.dataclass
class Int4Weight:
    """A linear layer `[..., N, K]` in four bits an element."""

    packed: UInt8[Array, "*L N K/2"]
    """Two nibbles a byte."""
    scales: Float[Array, "*L N K/g"]
    """One scale for each group of g input elements."""

    @property
    def group_size(self) -> int:
        """Input elements g that share a scale."""
        return 2 * self.packed.shape[-1] // self.scales.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for."""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])


Weight: TypeAlias = "Array | Int4Weight | tuple[Array, ...]"
"""`[N, K]`, or stacked `[L, N, K]`, or one array for each layer (which only an unrolled loop can index)."""


def quantize(weight: Float[Any, "*L N K"], group_size: int, scale_dtype: Any = jnp.float32) -> Int4Weight:
    """Round to the nearest of the 16 levels; numpy in, numpy out, and jax in, jax out.

    Raises `UserError` where `group_size` is odd or does not divide K.
    """
    xp: Any = np if isinstance(weight, np.ndarray) else jnp
    width = weight.shape[-1]
    if group_size % 2 or width % group_size:
        raise UserError(
            f"group_size {group_size} does not divide the input width {width}; choose another of 32, 64 and 128, or keep "
            "this module unquantized with skip_modules"
        )
    groups = weight.astype(xp.float32).reshape(*weight.shape[:-1], width // group_size, group_size)
    scales = _scales(groups, xp).astype(scale_dtype)
    safe = xp.where(scales == 0, 1, scales).astype(xp.float32)
    nibbles = xp.clip(xp.round(groups / safe[..., None]) + 8, 0, 15).astype(xp.uint8)
    low, high = nibbles[..., : group_size // 2], nibbles[..., group_size // 2 :]
    return Int4Weight((low | (high << 4)).reshape(*weight.shape[:-1], width // 2), scales)


def _scales(groups: Any, xp: Any) -> Any:
    # The grid reaches from -8 to 7: putting the extreme element on -8 is what uses all 16 levels.
    index = xp.argmax(xp.abs(groups), axis=-1)
    extreme = xp.take_along_axis(groups, index[..., None], axis=-1)[..., 0]
    return extreme / -8.0


def dequantize(weight: Int4Weight, dtype: Any = jnp.float32) -> Float[Any, "*L N K"]:
    """(nibble - 8) · scale in `dtype`; numpy in, numpy out, and jax in, jax out."""
    xp = np if isinstance(weight.packed, np.ndarray) else jnp
    *lead, _ = weight.packed.shape
    half = weight.group_size // 2
    packed = weight.packed.reshape(*lead, -1, half)
    nibbles = xp.concatenate([packed & 0xF, packed >> 4], axis=-1).astype(xp.float32) - 8
    return (nibbles * weight.scales.astype(xp.float32)[..., None]).reshape(*weight.shape).astype(dtype)


def matmul(
    x: Float[Array, "*B K"],
    weight: Weight,
    layer: int | Int[Array, ""] | None = None,
    adapter: tuple[Float[Array, "*L R K"], Float[Array, "*L N R"]] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "*B N"]:
    """x Wᵀ + (x Aᵀ) Bᵀ: the matmul entry point of every linear layer.

    `layer` picks from a stacked weight; an adapter `(a, b)` is either stacked likewise or that layer's own, and its
    scale is already in `a`. The result has `x.dtype` unless `out_dtype` is given; sums are in float32.
    """
    a, b = adapter if adapter is not None else (None, None)
    xa = None if a is None else jnp.einsum("...k,rk->...r", x, _at(a, layer).astype(x.dtype))
    if isinstance(weight, Int4Weight):
        return _int4(x, weight, layer, xa, b, out_dtype)
    out = _dot(x, _at(weight, layer), out_dtype)
    return out if xa is None or b is None else out + _dot(xa, _at(b, layer), out_dtype)


def _int4(x: Array, weight: Int4Weight, layer: Any, xa: Array | None, b: Array | None, out_dtype: Any) -> Array:
    out = pallas_kernels.int4_matmul(
        x.reshape(-1, x.shape[-1]),
        weight.packed,
        weight.scales,
        layer=layer,
        xa=None if xa is None else xa.reshape(-1, xa.shape[-1]),
        lora_b=None if b is None else b.astype(x.dtype),
        out_dtype=out_dtype or x.dtype,
    )
    return out.reshape(*x.shape[:-1], -1)


def _dot(x: Array, weight: Array, out_dtype: Any) -> Array:
    out = jnp.einsum("...k,nk->...n", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(out_dtype or x.dtype)


def _at(stack: Any, layer: Any) -> Array:
    """The layer's own matrix: `stack[layer]`, or `stack` itself where it has no layer axis."""
    if isinstance(stack, tuple):
        return stack[layer]
    return stack if stack.ndim == 2 else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def embed(table: Weight, tokens: Int[Array, "*B"], dtype: Any) -> Float[Array, "*B D"]:
    """Rows of the embedding `[V, D]`; of a quantized one, only the rows asked for are dequantized."""
    if isinstance(table, Int4Weight):
        return dequantize(Int4Weight(table.packed[tokens], table.scales[tokens]), dtype)
    assert isinstance(table, Array)
    return table[tokens].astype(dtype)
