"""Shapes of real models, and random weights of those shapes made on the device, for the benchmarks.

Speed and memory do not depend on the values, so no checkpoint is needed. Quantized matrices are made packed, a layer at a
time: nothing larger than the result exists on the way.
"""

import zlib

import jax
import jax.numpy as jnp

from jgrpo.models import ModelConfig, base_shapes
from jgrpo.models.config import RopeConfig
from jgrpo.quantization import Int4Weight

_LLAMA3 = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_QWEN = dict(rope=RopeConfig(theta=1_000_000.0), qkv_bias=True)


def _qwen(*shape: int, **settings) -> ModelConfig:
    return ModelConfig("qwen2", *shape, **_QWEN, **settings)


def _llama(*shape: int, **settings) -> ModelConfig:
    return ModelConfig("llama", *shape, max_position_embeddings=131_072, rope=_LLAMA3, **settings)


# vocabulary, width, MLP width, layers, query heads, key/value heads, head width
PRESETS: dict[str, ModelConfig] = {
    "tiny": _qwen(512, 64, 128, 2, 4, 2, 16, tie_embeddings=True),
    "qwen2.5-0.5b": _qwen(151_936, 896, 4864, 24, 14, 2, 64, tie_embeddings=True),
    "qwen2.5-1.5b": _qwen(151_936, 1536, 8960, 28, 12, 2, 128, tie_embeddings=True),
    "qwen2.5-3b": _qwen(151_936, 2048, 11_008, 36, 16, 2, 128, tie_embeddings=True),
    "qwen2.5-7b": _qwen(152_064, 3584, 18_944, 28, 28, 4, 128),
    "qwen2.5-14b": _qwen(152_064, 5120, 13_824, 48, 40, 8, 128),
    "qwen2.5-32b": _qwen(152_064, 5120, 27_648, 64, 40, 8, 128),
    "llama-3.2-1b": _llama(128_256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True),
    "llama-3.2-3b": _llama(128_256, 3072, 8192, 28, 24, 8, 128, tie_embeddings=True),
    "llama-3.1-8b": _llama(128_256, 4096, 14_336, 32, 32, 8, 128),
    "llama-3.3-70b": _llama(128_256, 8192, 28_672, 80, 64, 8, 128),
    "phi-4-14b": _llama(100_352, 5120, 17_920, 40, 40, 10, 128),
}


def random_base(config: ModelConfig, *, group_size: int = 64, int4: bool = True, int4_embeddings: bool = False):
    """A base pytree on the device: int4 (or bfloat16) matrices, everything else bfloat16."""
    key = jax.random.key(0, impl="rbg")

    def leaf(path, shape: jax.ShapeDtypeStruct):
        name = path[-1].key
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        is_embedding = name in ("embed", "head")
        if len(shape.shape) - (not is_embedding) < 2:
            return jnp.ones(shape.shape, shape.dtype) if name.endswith("norm") else jnp.zeros(shape.shape, shape.dtype)
        packed = int4_embeddings if is_embedding else int4
        return _random_int4(leaf_key, shape.shape, group_size) if packed else _random_float(leaf_key, shape.shape)

    return jax.tree_util.tree_map_with_path(leaf, base_shapes(config, jnp.bfloat16))


def _random_float(key, shape):
    make = jax.jit(lambda key: 0.02 * jax.random.normal(key, shape[-2:], jnp.bfloat16))
    return (
        make(key) if len(shape) == 2 else jax.jit(lambda keys: jax.lax.map(make, keys))(jax.random.split(key, shape[0]))
    )


def _random_int4(key, shape, group_size: int) -> Int4Weight:
    *_, rows, columns = shape
    # Nibbles are uniform in -8 … 7, of deviation 4.6: the scale makes the weights' deviation 0.02.
    scales = jnp.full((*shape[:-1], columns // group_size), 0.02 / 4.6, jnp.bfloat16)
    make = jax.jit(lambda key: jax.random.bits(key, (rows, columns // 2), jnp.uint8))
    if len(shape) == 2:
        return Int4Weight(make(key), scales)
    return Int4Weight(jax.jit(lambda keys: jax.lax.map(make, keys))(jax.random.split(key, shape[0])), scales)


def linear_parameters(config: ModelConfig) -> int:
    """Parameters of the layers' matrices."""
    q, k, v = config.qkv_splits
    attention = config.hidden_size * (q + k + v) + config.hidden_size * q
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
