"""x @ W^T for 16-bit weights and the few rows of a decode step, as partial sums.

Such a product is bound by the bytes of W, which every multiprocessor must help to read; a small W has too few tiles of
rows for that, so K is split too. XLA's own products, where they split K, cannot leave the sum of the parts to their
consumer. Which of the two is faster is measured for each shape (`tuning.dense_measurement`); where it was
not, `dispatch.py` decides by the number of tiles.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, tuning
from pallas_kernels.reference import einsum_to, take_layer


def dense_partial_sums(
    x: Float[Array, "M K"],
    weight: Float[Array, "*L N K"],
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "S M N"]:
    """Partial sums of x @ W[layer]^T for a consumer that adds them; not differentiable.

    float32 where the kernel splits K, else one part in x's dtype.

    Args:
      weight: one layer, or a stack of them.
      layer: index into the stack, a Python int or a traced scalar; None when there is no stack.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run here.
    """
    if weight.ndim != (2 if layer is None else 3) or x.ndim != 2 or x.shape[1] != weight.shape[-1]:
        raise ValueError(
            f"dense_partial_sums: layer={layer!r} wants x [M, K] and weight {'[N, K]' if layer is None else '[L, N, K]'}, "
            f"got {x.shape} and {weight.shape}"
        )
    layer = layer if layer is None or isinstance(layer, int) else jnp.asarray(layer, jnp.int32)
    device, (m, k), n = dispatch.current_device(), x.shape, weight.shape[-2]
    chosen = dispatch.resolve(
        "dense_partial_sums",
        implementation,
        dispatch.dense_matmul_rule(device, x.dtype, weight.dtype, m, n, k, tuning.dense_measurement(m, n, k)),
        dispatch.dense_matmul_problem(device, x.dtype, weight.dtype, k),
    )
    if chosen == dispatch.TRITON:
        from pallas_kernels.dense_matmul_triton import partial_sums

        return partial_sums(x, weight, layer)
    return einsum_to(x.dtype, "mk,nk->mn", x, take_layer(weight, layer).astype(x.dtype))[None]
