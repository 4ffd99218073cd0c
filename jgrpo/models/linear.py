"""The linear layers of one transformer layer: base matrix, bias and adapter behind one name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jgrpo.quantization import matmul

PRODUCT = "product"
"""Result of a linear layer, by its name for checkpoint policies."""

Observe = Callable[[str, Array], None]
"""(name of a matrix, its input): told of every linear layer while a layer is traced."""


class LayerProducts:
    """The linear layers of one layer: base matrix, bias and adapter behind one name."""

    def __init__(
        self,
        weights: Any,
        layer: int | Array,
        adapter: dict[str, tuple[Array, Array]],
        rate: float,
        key: Array | None,
        observe: Observe | None = None,
    ) -> None:
        self.weights, self.layer, self.adapter, self.rate, self.key = weights, layer, adapter, rate, key
        self.observe = observe

    def __call__(self, name: str, x: Array) -> Array:
        """x times the matrix of that name, `[…, K]` -> `[…, N]`."""
        if self.observe is not None:
            self.observe(name, x)
        weight, adapter = self.weights[name], self.adapter.get(name)
        if adapter is not None and self.key is not None:
            y = matmul(x, weight, self.layer)
            a, b = adapter
            y = y + jnp.einsum("...r,nr->...n", jnp.einsum("...k,rk->...r", self._drop(name, x), a), b)
        else:
            y = matmul(x, weight, self.layer, adapter)
        bias = self.weights.get(f"{name}_bias")
        return checkpoint_name(y if bias is None else y + of_layer(bias, self.layer).astype(y.dtype), PRODUCT)

    def _drop(self, name: str, x: Array) -> Array:
        # Inverted dropout on the adapter's input, one mask for each base matrix.
        assert self.key is not None
        key = jax.random.fold_in(self.key, sorted(self.adapter).index(name))
        keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def of_layer(vector: Array, layer: int | Array | None) -> Array:
    """`[D]` of a layer: a row of the stack, or what has no layer axis itself."""
    return vector if vector.ndim == 1 else vector[layer]
