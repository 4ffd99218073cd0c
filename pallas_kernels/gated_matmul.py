"""The MLP's first product and its gate in one: activation(x @ Wg^T) * (x @ Wu^T) for 16-bit weights and few rows.

Apart, the product writes `[M, 2F]` and the gate reads it again in a launch of its own, which takes as long as a fifth of the
product. Which is faster is measured for each shape (`tuning.gated_measurement`); where it was not, `dispatch.py` decides.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, tuning
from pallas_kernels.dense_matmul import dense_partial_sums
from pallas_kernels.gated_activation import ACTIVATIONS, gated_activation


def gated_matmul(
    x: Float[Array, "M K"],
    weight: Float[Array, "*L 2F K"],
    *,
    activation: str,
    layer: Int[Array, ""] | int,
    bias: Float[Array, "L 2F"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """activation(gate) * up in x's dtype, the halves of x @ W^T + bias; not differentiable.

    The kernel rounds once, at the end. The jnp twin rounds the product to x's dtype before the bias and before the gate.

    Args:
      weight: rows of gate, then rows of up; one layer, or a stack of them.
      activation: one of `ACTIVATIONS`.
      layer: index into what is stacked, a Python int or a traced scalar.
      bias: of the product, a stack of which the layer's row is taken; None: none.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`: the kernel, or product and gate by their
        own rules.

    Raises:
      ValueError: shapes do not fit, the activation is unknown, or the named implementation cannot run here.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_matmul: activation {activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    if x.ndim != 2 or weight.ndim not in (2, 3) or x.shape[1] != weight.shape[-1] or weight.shape[-2] % 2:
        raise ValueError(
            f"gated_matmul wants x [M, K] and weight [2F, K] or [L, 2F, K], got {x.shape} and {weight.shape}"
        )
    (m, k), n = x.shape, weight.shape[-2]
    if bias is not None and (bias.ndim != 2 or bias.shape[1] != n):
        raise ValueError(f"gated_matmul: bias must be [L, {n}], got {bias.shape}")
    layer = layer if isinstance(layer, int) else jnp.asarray(layer, jnp.int32)
    device = dispatch.current_device()
    chosen = dispatch.resolve(
        "gated_matmul",
        implementation,
        dispatch.gated_matmul_rule(device, x.dtype, weight.dtype, m, k, tuning.gated_measurement(m, n, k)),
        dispatch.dense_matmul_problem(device, x.dtype, weight.dtype, k),
    )
    if chosen == dispatch.TRITON:
        from pallas_kernels.gated_matmul_triton import gated_matmul as fused

        return fused(x, weight, activation, layer, bias)
    of_weight = layer if weight.ndim == 3 else None
    parts = dense_partial_sums(x, weight, layer=of_weight, implementation=implementation)
    how: dict[str, Any] = dict(
        activation=activation, dtype=x.dtype, layer=layer, bias=bias, implementation=implementation
    )
    return gated_activation(parts, **how).plain
