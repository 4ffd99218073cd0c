"""The parameter tree of the base model: which leaves there are, their shapes, and random ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jgrpo.models.config import ModelConfig


def base_shapes(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The tree of unquantized leaves as `jax.ShapeDtypeStruct`s; matrices are `[out, in]`, layers stacked on axis 0."""
    layers, width, mlp = config.num_layers, config.hidden_size, config.intermediate_size
    qkv, attended = sum(config.qkv_splits), config.num_heads * config.head_dim
    stacked: dict[str, tuple[int, ...]] = {
        "input_norm": (width,),
        "post_norm": (width,),
        "qkv": (qkv, width),
        "out": (width, attended),
        "gate_up": (2 * mlp, width),
        "down": (width, mlp),
    }
    if config.sandwich_norms:
        stacked |= {"attention_out_norm": (width,), "mlp_out_norm": (width,)}
    if config.qk_norm:
        stacked |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.qkv_bias:
        stacked["qkv_bias"] = (qkv,)
    if config.out_bias:
        stacked["out_bias"] = (width,)
    if config.mlp_bias:
        stacked |= {"gate_up_bias": (2 * mlp,), "down_bias": (width,)}
    shapes: dict[str, Any] = {
        "embed": (config.vocab_size, width),
        "layers": {name: (layers, *shape) for name, shape in stacked.items()},
        "final_norm": (width,),
    }
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, width)
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


def init_base(key: Array, config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random weights: norms 1 (with their offset), biases 0, matrices normal with standard deviation 0.02 (output projections ÷ √(2L))."""
    shapes = base_shapes(config, dtype)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))

    def leaf(key: Array, path: Any, shape: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.full(shape.shape, 1.0 - config.norm_offset, shape.dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        deviation = 0.02 / math.sqrt(2 * config.num_layers) if name in ("out", "down") else 0.02
        return (deviation * jax.random.normal(key, shape.shape, jnp.float32)).astype(shape.dtype)

    return jax.tree.unflatten(treedef, [leaf(k, *item) for k, item in zip(keys, leaves, strict=True)])
