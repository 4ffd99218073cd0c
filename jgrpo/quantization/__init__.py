"""Quantized weights, how weights become them, and the one matmul that every linear layer goes through."""

from jgrpo.quantization.linear import embed, gated_matmul, matmul, matmul_parts, reads_permuted
from jgrpo.quantization.rounding import quantize, quantize_fast8, quantize_int8
from jgrpo.quantization.weights import (
    LAYERS,
    NF4,
    Fast8Weight,
    Int4Weight,
    Int8Weight,
    MixedWeight,
    NF4Weight,
    PackedWeight,
    Weight,
    dequantize,
    pack_nibbles,
    take_layer,
    unpack_nibbles,
)

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
    "embed",
    "gated_matmul",
    "matmul",
    "matmul_parts",
    "pack_nibbles",
    "quantize",
    "quantize_fast8",
    "quantize_int8",
    "reads_permuted",
    "take_layer",
    "unpack_nibbles",
]
