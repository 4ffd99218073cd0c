"""Array operations of a GRPO step that plain XLA does not do well; arrays in, arrays out.

Every operation has a jnp twin (`reference.py`): the oracle of the tests, and what runs on CPU, TPU and old GPUs. On
NVIDIA GPUs of compute capability 8.0 and up a fused kernel runs where it is faster. `dispatch.py` holds the rule;
`implementation="reference" | "triton"` overrides it, and an implementation that cannot run there raises.

Operations on layers take the stack of all layers and a layer index: a slice in front of a custom call would be copied.
"""

from pallas_kernels.codes import NF4, dequantize
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.rope_cache import rope_and_cache
from pallas_kernels.token_logprobs import token_logprobs

__all__ = ["NF4", "decode_attention", "dequantize", "int4_matmul", "rope_and_cache", "token_logprobs"]
