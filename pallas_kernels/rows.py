"""What the operations of a decode step hand to each other: rows of activations, and products as partial sums.

A product that splits its inner dimension K leaves S partial sums. Adding them up in an operation of their own would cost a
launch, longer than the addition; so products can return them, `[S, M, N]`, and what comes next adds them while it reads.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Rows(NamedTuple):
    """Rows as the next product reads them."""

    plain: Float[Array, "M K"]
    permuted: Float[Array, "M K"] | None = None
    """The same with their columns in the order of `permute_columns`, where that product asks for it (`reads_permuted`)."""

    def in_permuted_order(self) -> Float[Array, "M K"]:
        """Those, made here if nobody has."""
        return permute_columns(self.plain) if self.permuted is None else self.permuted


def permute_columns(x: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """x with every 16 columns reordered, (4t + 2h + j) -> (8h + 2t + j): what the wgmma form of `int4_matmul` reads."""
    m, k = x.shape
    return x.reshape(m, k // 16, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(m, k)


def unpermute_columns(x: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """`permute_columns` undone."""
    m, k = x.shape
    return x.reshape(m, k // 16, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(m, k)


def as_rows(x: Float[Array, "M K"], permuted: bool) -> Rows:
    """Both orders of the columns, or the plain one."""
    return Rows(x, permute_columns(x) if permuted else None)


def joined(parts: Float[Array, "S *B N"], dtype) -> Float[Array, "*B N"]:
    """The product that the partial sums add up to, added in float32 where they have 16 bits, and rounded to `dtype`."""
    return (parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)).astype(dtype)
