"""Array operations of a GRPO step that plain XLA does not do well; arrays in, arrays out.

Every operation has a jnp twin (`reference.py`): the oracle of the tests, and what runs on CPU, TPU and old GPUs. On
NVIDIA GPUs of compute capability 8.0 and up a fused kernel runs where it is faster. `dispatch.py` holds the rule;
`implementation="reference" | "triton"` overrides it, and an implementation that cannot run there raises.

Operations on layers take the stack of all layers and a layer index: a slice in front of a custom call would be copied.
"""

from pallas_kernels.add_rms_norm import add_rms_norm, rms_norm
from pallas_kernels.begin_step import BegunStep, Positions, Rotations, begin_step
from pallas_kernels.codes import NF4, dequantize
from pallas_kernels.completions import Completions, Ends, record
from pallas_kernels.decode_attention import decode_attention, decode_attention_rows
from pallas_kernels.decode_layers import (
    Caches,
    LayerMatrices,
    LayerMatrix,
    decode_layer,
    decode_layers,
    first_qkv,
    has_layer_kernel,
    interleave_gate,
    layer_counter,
)
from pallas_kernels.dense_matmul import dense_partial_sums
from pallas_kernels.draw_corrected import draw_corrected, draw_corrected_and_record, numbers_a_token
from pallas_kernels.draw_token import draw_and_record, draw_token
from pallas_kernels.gated_activation import ACTIVATIONS, gated_activation
from pallas_kernels.gated_matmul import gated_matmul
from pallas_kernels.int4_matmul import has_int8_kernel, int4_matmul, int4_partial_sums, reads_permuted
from pallas_kernels.merge_layer import Source, merge_layer, put_layer
from pallas_kernels.rope_attention import NewTokens, rope_attention
from pallas_kernels.rope_cache import rope_and_cache
from pallas_kernels.rows import Rows, joined, unpermute_columns
from pallas_kernels.token_logprobs import token_logprobs

__all__ = [
    "ACTIVATIONS",
    "NF4",
    "BegunStep",
    "Caches",
    "Completions",
    "Ends",
    "LayerMatrices",
    "LayerMatrix",
    "NewTokens",
    "Positions",
    "Rotations",
    "Rows",
    "Source",
    "add_rms_norm",
    "begin_step",
    "decode_attention",
    "decode_attention_rows",
    "decode_layer",
    "decode_layers",
    "dense_partial_sums",
    "dequantize",
    "draw_and_record",
    "draw_corrected",
    "draw_corrected_and_record",
    "draw_token",
    "first_qkv",
    "gated_activation",
    "gated_matmul",
    "has_int8_kernel",
    "has_layer_kernel",
    "int4_matmul",
    "int4_partial_sums",
    "interleave_gate",
    "joined",
    "layer_counter",
    "merge_layer",
    "numbers_a_token",
    "put_layer",
    "reads_permuted",
    "record",
    "rms_norm",
    "rope_and_cache",
    "rope_attention",
    "token_logprobs",
    "unpermute_columns",
]
