"""The gate of a decode step's MLP: activation(gate) * up, read from the partial sums of the fused product.

In plain XLA the sum of the partial sums, the gate, and the copy with permuted columns that the next product reads are two or
three launches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.reference import take_layer
from pallas_kernels.rows import Rows, as_rows, joined

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
IS_GELU = {"silu": False, "gelu_tanh": True}
"""What the kernels know an activation by."""


def gated_activation(
    parts: Float[Array, "S M 2F"],
    *,
    activation: str,
    dtype,
    layer: Int[Array, ""] | int,
    bias: Float[Array, "L 2F"] | None = None,
    permuted: bool = False,
    implementation: str | None = None,
) -> Rows:
    """activation(gate) * up in `dtype`, where gate is the first and up the second half of the columns.

    Args:
      parts: partial sums of the product, of any float dtype.
      activation: one of `ACTIVATIONS`.
      bias: of the product, a stack of which the layer's row is taken; None: none.
      permuted: also return the rows with permuted columns; F must then divide by 16.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, the activation is unknown, or the named implementation cannot run here.
    """
    width = parts.shape[-1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_activation: activation {activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    if parts.ndim != 3 or width % 2 or (permuted and width % 32):
        halves = "columns in two halves" + (" of sixteens" if permuted else "")
        raise ValueError(f"gated_activation: parts must be [S, M, 2F], {halves}, got {parts.shape}")
    if bias is not None and (bias.ndim != 2 or bias.shape[1] != width):
        raise ValueError(f"gated_activation: bias must be [L, {width}], got {bias.shape}")
    layer = layer if isinstance(layer, int) else jnp.asarray(layer, jnp.int32)
    problem = dispatch.gated_activation_problem(dispatch.current_device(), dtype)
    chosen = dispatch.resolve(
        "gated_activation", implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem
    )
    if chosen == dispatch.TRITON:
        from pallas_kernels.gated_activation_triton import gated_activation as fused

        return fused(parts, activation, jnp.dtype(dtype), layer, bias, permuted)
    return reference(parts, activation, dtype, layer, bias, permuted)


def reference(parts, activation, dtype, layer, bias, permuted) -> Rows:
    """The jnp twin; the product is rounded to `dtype` before the bias and before the gate."""
    both = joined(parts, dtype)
    if bias is not None:
        both = both + take_layer(bias, layer).astype(dtype)
    gate, up = jnp.split(both, 2, axis=-1)
    return as_rows(ACTIVATIONS[activation](gate) * up, permuted)
