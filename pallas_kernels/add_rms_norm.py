"""The residual of a decode step and its norm: one operation between a product and the next.

    residual' = residual + branch        branch = sum of the product's partial sums (+ bias), normed itself in some families
    rows      = residual' / rms(residual') * (offset + scale)

In plain XLA these are the sum of the partial sums, the addition, the norm, and the copy with permuted columns that the
next product reads: three or four launches that each take longer to start than to run.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.reference import take_layer
from pallas_kernels.rows import Rows, as_rows, joined


def add_rms_norm(
    residual: Float[Array, "M D"],
    parts: Float[Array, "S M D"],
    scale: Float[Array, "L D"],
    *,
    layer: Int[Array, ""] | int,
    eps: float,
    offset: float = 0.0,
    bias: Float[Array, "L D"] | None = None,
    branch_scale: Float[Array, "L D"] | None = None,
    permuted: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "M D"], Rows]:
    """(residual + branch, its normed rows), both in residual's dtype.

    Args:
      parts: partial sums of the branch's product, of any float dtype.
      scale, bias, branch_scale: stacks of which the layer's row is taken.
      offset: added to `scale` and `branch_scale`, as in Gemma; where it is not 0, scaling happens in float32.
      bias: of the product; None: none.
      branch_scale: of a norm of the branch before it is added; None: no such norm.
      permuted: also return the rows with permuted columns; D must then divide by 16.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run here.
    """
    _check_shapes(residual, parts, scale, bias, branch_scale, permuted)
    layer = layer if isinstance(layer, int) else jnp.asarray(layer, jnp.int32)
    problem = dispatch.add_rms_norm_problem(dispatch.current_device(), residual.dtype, residual.shape[1])
    chosen = dispatch.resolve(
        "add_rms_norm", implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem
    )
    if chosen == dispatch.TRITON:
        from pallas_kernels.add_rms_norm_triton import add_rms_norm as fused

        return fused(residual, parts, scale, layer, eps, offset, bias, branch_scale, permuted)
    return reference(residual, parts, scale, layer, eps, offset, bias, branch_scale, permuted)


def _check_shapes(residual, parts, scale, bias, branch_scale, permuted) -> None:
    m, width = residual.shape
    if parts.ndim != 3 or parts.shape[1:] != (m, width):
        raise ValueError(f"add_rms_norm: residual {residual.shape} wants parts [S, {m}, {width}], got {parts.shape}")
    for name, stack in (("scale", scale), ("bias", bias), ("branch_scale", branch_scale)):
        if stack is not None and (stack.ndim != 2 or stack.shape[1] != width):
            raise ValueError(f"add_rms_norm: {name} must be [L, {width}], got {stack.shape}")
    if permuted and width % 16:
        raise ValueError(f"add_rms_norm: permuted columns come in sixteens, the rows have {width}")


def reference(residual, parts, scale, layer, eps, offset, bias, branch_scale, permuted):
    """The jnp twin; the branch is rounded to residual's dtype before each of its operations."""
    branch = joined(parts, residual.dtype)
    if bias is not None:
        branch = branch + take_layer(bias, layer).astype(branch.dtype)
    if branch_scale is not None:
        branch = rms_norm(branch, take_layer(branch_scale, layer), eps, offset)
    residual = residual + branch
    return residual, as_rows(rms_norm(residual, take_layer(scale, layer), eps, offset), permuted)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """x / rms(x) * (offset + scale) (Zhang & Sennrich 2019, arXiv:1910.07467), normalised in float32.

    The scale is applied in `x.dtype`, as in Llama; with an offset in float32, as in Gemma.
    """
    # y = x / √(mean(x²) + ε)
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if offset:
        return (normed * (offset + scale.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype)
