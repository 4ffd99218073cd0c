"""The forms in which a frozen matrix is stored; pytrees, so that they travel through jit, scan and device transfers.

Every packed form is group-wise along the input axis: one scale for g input elements. Four-bit forms keep two elements a
byte, split-half inside a group: byte j holds element j in its low and element g/2 + j in its high nibble, so unpacking
needs no interleaving. Values:

- `Int4Weight`: (nibble - 8) · scale, or (nibble - zero) · scale where a format is asymmetric (GPTQ, AWQ);
- `NF4Weight`: NF4[nibble] · scale, the 16 quantiles of a normal distribution (QLoRA, Dettmers et al. 2023,
  arXiv:2305.14314, appendix E);
- `Int8Weight`: value · scale;
- `Fast8Weight`: step · scale, steps of one below 0 and of two above it (`pallas_kernels/codes.py`).

`MixedWeight` is a stack whose layers differ in their form, for checkpoints and memory budgets that keep some layers wide.
"""

from typing import Any, ClassVar, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int8, UInt8

import pallas_kernels
from pallas_kernels import NF4

__all__ = [
    "LAYERS",
    "NF4",
    "Fast8Weight",
    "Int4Weight",
    "Int8Weight",
    "MixedWeight",
    "NF4Weight",
    "PackedWeight",
    "Weight",
    "dequantize",
    "pack_nibbles",
    "take_layer",
    "unpack_nibbles",
]


class _Packed:
    """What the packed forms share."""

    code: ClassVar[str]
    """How the kernels read the bytes."""
    per_byte: ClassVar[int]
    """Elements in a byte of `packed`."""
    packed: Any
    scales: Any
    zeros: Any

    @property
    def group_size(self) -> int:
        """Input elements g that share a scale."""
        return self.per_byte * self.packed.shape[-1] // self.scales.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for."""
        return (*self.packed.shape[:-1], self.per_byte * self.packed.shape[-1])


@flax.struct.dataclass
class Int4Weight(_Packed):
    """A linear layer `[..., N, K]` in four bits an element, evenly spaced levels."""

    code: ClassVar[str] = "int4"
    per_byte: ClassVar[int] = 2
    packed: UInt8[Array, "*L N K/2"]
    """Two nibbles a byte."""
    scales: Float[Array, "*L N K/g"]
    """One scale for each group of g input elements."""
    zeros: UInt8[Array, "*L N K/g"] | None = None
    """The level that stands for 0 in each group; None: 8 everywhere."""


@flax.struct.dataclass
class NF4Weight(_Packed):
    """A linear layer `[..., N, K]` in four bits an element, levels of NormalFloat."""

    code: ClassVar[str] = "nf4"
    per_byte: ClassVar[int] = 2
    zeros: ClassVar[None] = None
    packed: UInt8[Array, "*L N K/2"]
    """Two nibbles a byte."""
    scales: Float[Array, "*L N K/g"]
    """Largest magnitude of each group."""


@flax.struct.dataclass
class Int8Weight(_Packed):
    """A linear layer `[..., N, K]` in eight bits an element."""

    code: ClassVar[str] = "int8"
    per_byte: ClassVar[int] = 1
    zeros: ClassVar[None] = None
    packed: Int8[Array, "*L N K"]
    """One element a byte."""
    scales: Float[Array, "*L N K/g"]
    """One scale for each group of g input elements."""


@flax.struct.dataclass
class Fast8Weight(_Packed):
    """A linear layer `[..., N, K]` in eight bits an element that a kernel dequantizes faster; of normal weights its rounding is 1.3 times that of int8."""

    code: ClassVar[str] = "fast8"
    per_byte: ClassVar[int] = 1
    zeros: ClassVar[None] = None
    packed: UInt8[Array, "*L N K"]
    """One element a byte."""
    scales: Float[Array, "*L N K/g"]
    """One scale for each group of g input elements, of either sign."""


PackedWeight = (Int4Weight, NF4Weight, Int8Weight, Fast8Weight)
"""For `isinstance`."""


LAYERS = "decode_layers"
"""The key of `LayerMatrices` among a base's layers: in 8 bits, laid out for a kernel of all layers (`pallas_kernels.decode_layers`)."""


@flax.struct.dataclass
class MixedWeight:
    """A stack `[L, N, K]` whose layers are stored in different forms."""

    parts: tuple[Any, ...]
    """Stacks, one for each form."""
    where: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)
    """(part, index in it) of every layer."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for."""
        return (len(self.where), *self.parts[0].shape[1:])


Weight: TypeAlias = "Array | Int4Weight | NF4Weight | Int8Weight | Fast8Weight | MixedWeight | tuple[Array, ...]"
"""`[N, K]`, or stacked `[L, N, K]`, or one array for each layer (which only an unrolled loop can index)."""


def dequantize(weight: Any, dtype: Any = np.float32) -> Float[Any, "*L N K"]:
    """The values in `dtype`, rounded once from float32; numpy in, numpy out, and jax in, jax out."""
    return pallas_kernels.dequantize(weight.packed, weight.scales, dtype, code=weight.code, zeros=weight.zeros)


def take_layer(weight: Any, layer: int) -> Any:
    """One layer of a stacked leaf, in its own form."""
    if isinstance(weight, MixedWeight):
        part, index = weight.where[layer]
        return take_layer(weight.parts[part], index)
    return jax.tree.map(lambda leaf: leaf[layer], weight)


def pack_nibbles(nibbles: UInt8[Any, "*L K"], group_size: int) -> UInt8[Any, "*L K/2"]:
    """Two elements a byte, split-half inside each group."""
    groups = nibbles.reshape(*nibbles.shape[:-1], -1, group_size)
    low, high = groups[..., : group_size // 2], groups[..., group_size // 2 :]
    return (low | (high << 4)).reshape(*nibbles.shape[:-1], -1)


def unpack_nibbles(packed: UInt8[Any, "*L K/2"], group_size: int) -> UInt8[Any, "*L K"]:
    """The inverse of `pack_nibbles`."""
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    groups = packed.reshape(*packed.shape[:-1], -1, group_size // 2)
    nibbles = xp.concatenate([groups & 0xF, groups >> 4], axis=-1)
    return nibbles.reshape(*packed.shape[:-1], -1)
