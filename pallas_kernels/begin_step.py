"""What a decode step begins with: the new tokens' rows, normed for the first layer, and the rotations of their positions.

    residual = table[token] · factor        rows = residual / rms(residual) * (offset + scale₀)
    slot     = filled + step                position = length + slot

In plain XLA these are four launches that each take longer to start than to run. Rotations come from a table of all positions,
made once: in a loop, cos and sin of the same positions would be computed for every step.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.add_rms_norm import rms_norm
from pallas_kernels.reference import take_layer
from pallas_kernels.rows import Rows, as_rows

Rotations = tuple[Float32[Array, "Q R"], Float32[Array, "Q R"]]
"""cos and sin of the angles of the questions' positions."""


class Positions(NamedTuple):
    """Where the new tokens stand."""

    lengths: Int[Array, " Q"]
    """Of the prompts."""
    filled: Int[Array, ""] | int
    """Slots of the completions that were filled when the loop over steps began."""
    step: Int[Array, ""] | int
    """Of that loop. The sum, in an operation of its own, would cost a launch."""
    rotations: Float32[Array, "2 N R"] | None
    """cos and sin of the angles of all positions that there may be; None: no rotations."""


class BegunStep(NamedTuple):
    """What the layers of a step are given."""

    residual: Float[Array, "M D"]
    rows: Rows
    """The residual, normed for the first layer."""
    slot: Int32[Array, ""]
    """Of the completions' caches, for the new tokens."""
    rotations: Rotations | None


def begin_step(
    tokens: Int32[Array, " M"],
    table: Float[Array, "V D"],
    scale: Float[Array, "L D"],
    positions: Positions,
    *,
    eps: float,
    offset: float = 0.0,
    factor: float = 1.0,
    permuted: bool = False,
    implementation: str | None = None,
) -> BegunStep:
    """Rows of the table, normed, with their slot and rotations; in the table's dtype.

    Args:
      tokens: of all rows, those of a question next to each other; in [0, V).
      scale: stack of norms, of which the first layer's is taken.
      offset: of the norm, as in `add_rms_norm`.
      factor: of the embedding, rounded to its dtype.
      permuted: also return the normed rows with permuted columns; D must then divide by 16.
      implementation: "reference", "triton", or None for the rule in `dispatch.py`.

    Raises:
      ValueError: shapes do not fit, or the named implementation cannot run here.
    """
    _check_shapes(tokens, table, scale, positions, permuted)
    problem = dispatch.add_rms_norm_problem(dispatch.current_device(), table.dtype, table.shape[1])
    chosen = dispatch.resolve("begin_step", implementation, dispatch.REFERENCE if problem else dispatch.TRITON, problem)
    if chosen == dispatch.TRITON:
        from pallas_kernels.begin_step_triton import begin_step as fused

        return fused(tokens, table, scale, positions, eps, offset, factor, permuted)
    return reference(tokens, table, scale, positions, eps, offset, factor, permuted)


def _check_shapes(tokens, table, scale, positions: Positions, permuted: bool) -> None:
    if table.ndim != 2 or scale.ndim != 2 or scale.shape[1] != table.shape[1]:
        raise ValueError(f"begin_step: table {table.shape} wants scale [L, {table.shape[-1]}], got {scale.shape}")
    if tokens.ndim != 1 or len(tokens) % len(positions.lengths):
        raise ValueError(f"begin_step: tokens {tokens.shape} are not rows of {len(positions.lengths)} questions")
    if permuted and table.shape[1] % 16:
        raise ValueError(f"begin_step: permuted columns come in sixteens, the rows have {table.shape[1]}")


def reference(tokens, table, scale, positions: Positions, eps, offset, factor, permuted) -> BegunStep:
    """The jnp twin."""
    residual = table[tokens]
    if factor != 1.0:
        residual = residual * jnp.asarray(factor, residual.dtype)
    rows = as_rows(rms_norm(residual, take_layer(scale, 0), eps, offset), permuted)
    slot, rotations = jnp.asarray(positions.filled + positions.step, jnp.int32), None
    if positions.rotations is not None:
        cos, sin = positions.rotations[:, positions.lengths + slot]
        rotations = (cos, sin)
    return BegunStep(residual, rows, slot, rotations)
