"""Gradients that a backward adds to a sum: over microbatches one tree of them exists, not the sum and the microbatch's own.

d(loss)/d(stack) of a scan over layers is a new stack, which a sum of microbatches would be added to afterwards. Here the sum is
where the backward starts: the stack goes through the scan as a carry, untouched; every layer's slice is attached to it
(`_attach`), and at the end it is tied to the result (`_tie`), whose backward gives the sum as the carry's cotangent. Then the
layers' backwards add their part to it, each in its row, and XLA does that in place.

Every forward that reads a parameter starts from its sum, so a second one would count the sum twice: it raises while the loss
is traced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


class _Once:
    """Whether a parameter has been read: Python state of one tracing of the loss, which copies of the parameter share."""

    def __init__(self) -> None:
        self.is_read = False


class Summed(struct.PyTreeNode):
    """A parameter and the sum so far of its gradients; differentiating with respect to `value` gives the sum with the new one.

    To be made where the loss is traced, and read once.
    """

    value: Float[Array, "..."]
    total: Float[Array, "..."]
    once: _Once = struct.field(pytree_node=False, default_factory=_Once)

    def read(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(value, total). Raises ValueError the second time."""
        if self.once.is_read:
            raise ValueError(
                f"a second forward of the loss reads a parameter of shape {self.value.shape} whose gradients are summed: the sum "
                "of the microbatches before would count twice; apply the model once in a loss, to all of its rows"
            )
        self.once.is_read = True
        return self.value, self.total


def entered(params: Any) -> Any:
    """`params` with plain arrays for what is `Summed`: of arrays that no scan slices. Their gradient is added when it is whole.

    Raises ValueError where one has been read before.
    """
    return jax.tree.map(lambda leaf: _enter(*leaf.read()) if is_summed(leaf) else leaf, params, is_leaf=is_summed)


def is_summed(leaf: Any) -> bool:
    """Whether it is a parameter with its sum."""
    return isinstance(leaf, Summed)


def scan_layers(body: Callable[[Any, Int[Array, ""], Any], Any], x: Any, stacks: Any, count: int) -> Any:
    """x after `x = body(x, layer, slices)` for every layer of `stacks` `[count, …]`, some of which may be `Summed`.

    Raises ValueError where one of them has been read before.
    """
    leaves, structure = jax.tree.flatten(stacks, is_leaf=is_summed)
    sums = {i: leaf.read() for i, leaf in enumerate(leaves) if is_summed(leaf)}
    plain = [jax.lax.stop_gradient(leaf.value) if is_summed(leaf) else leaf for leaf in leaves]

    def step(carry: tuple[Any, dict[int, Array]], inputs: tuple[Array, list[Array]]) -> tuple[Any, None]:
        (x, carried), (layer, slices) = carry, inputs
        for i, stack in carried.items():
            slices[i], carried[i] = _attach(slices[i], stack, layer)
        return (body(x, layer, structure.unflatten(slices)), carried), None

    carry = x, {i: value for i, (value, _) in sums.items()}
    (x, carried), _ = jax.lax.scan(step, carry, (jnp.arange(count), plain))
    for i, stack in carried.items():
        x = _tie(x, stack, sums[i][1])
    return x


@jax.custom_vjp
def _enter(value: Array, total: Array) -> Array:
    return value


_enter.defvjp(lambda value, total: (value, total), lambda total, gradient: (total + gradient, None))


@jax.custom_vjp
def _attach(piece: Array, stack: Array, layer: Array) -> tuple[Array, Array]:
    """`piece` `[…]`, whose gradient is added to row `layer` of that of `stack` `[count, …]`."""
    return piece, stack


def _attach_backward(layer: Array, gradients: tuple[Array, Array]) -> tuple[None, Array, None]:
    piece, total = gradients
    row = jax.lax.dynamic_index_in_dim(total, layer, keepdims=False)
    return None, jax.lax.dynamic_update_index_in_dim(total, row + piece, layer, 0), None


_attach.defvjp(lambda piece, stack, layer: ((piece, stack), layer), _attach_backward)


@jax.custom_vjp
def _tie(x: Array, stack: Array, total: Array) -> Array:
    """`x`; the gradient of `stack` starts as `total`."""
    return x


_tie.defvjp(lambda x, stack, total: (x, total), lambda total, gradient: (gradient, total, None))
