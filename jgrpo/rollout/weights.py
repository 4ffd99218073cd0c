"""What a rollout decodes with: the base as stored plus the adapter, or a full-precision copy with the adapter merged in.

Quantized weights are the smaller read, which is what counts with few rows; with many the arithmetic counts, and a
plain matrix product of 16-bit weights is faster than any kernel that dequantizes, and has no adapter beside it. The copy is
made anew for every rollout, because the adapter changed since the last one, and freed after it. Prompts are
prefilled with the stored weights in either case, and so is the training forward: what the rounding of merged weights
does to log-probabilities is in the logged gap between sampler and trainer.

Weights that are trained whole are decoded with as they are where they have the compute dtype, and from a copy in it, made
the same way, where they are wider.

`auto` compares sizes that the configuration fixes, never the memory that happens to be free, so that every step of a run
and every resumed run decides alike.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jgrpo.config import RolloutConfig
from jgrpo.lora import WEIGHTS, fuse, matrix_modules, module_shapes, own_modules
from jgrpo.models import ModelConfig, Transformer
from jgrpo.quantization import MixedWeight, PackedWeight, dequantize

Params = Mapping[str, Any]

MERGED_ROWS = 64
"""Rows from which auto prefers the merged copy: a third faster at 64 on an H200 (docs/benchmarks.md), more with more rows."""
MEMORY_SHARE = 0.6
"""Share of the device's memory that base, copy and cache may fill under auto; the update needs the rest."""


@dataclass(frozen=True)
class WeightsPlan:
    """Which weights a rollout decodes with, and why."""

    merged: bool
    reason: str

    def __str__(self) -> str:
        return f"rollout weights: {'merged copy' if self.merged else 'as stored'} ({self.reason})"


def plan_weights(model: Transformer, base: Params, config: RolloutConfig, prompts: tuple[int, int]) -> WeightsPlan:
    """Follow `config.rollout_weights`, or decide; `prompts` is (Q, P)."""
    if config.rollout_weights != "auto":
        return WeightsPlan(config.rollout_weights == "bf16", f"rollout_weights: {config.rollout_weights}")
    sizes = sum(leaf.nbytes for leaf in jax.tree.leaves(base)), merged_bytes(model)
    rows = at_once(config, prompts[0]) * config.num_generations
    cache = cache_bytes(model, config, prompts)
    return choose_weights(rows, *sizes, cache, _device_bytes())


def choose_weights(rows: int, base: int, copy: int, cache: int, device: int | None) -> WeightsPlan:
    """auto's rule, on numbers of bytes; `device` is None where the device does not state its memory."""
    if rows < MERGED_ROWS:
        return WeightsPlan(False, f"auto: {rows} rows, a copy pays from {MERGED_ROWS}")
    if device is None:
        return WeightsPlan(False, "auto: the device does not state its memory")
    numbers = f"{base / 1e9:.1f} GB base + {copy / 1e9:.1f} GB copy + {cache / 1e9:.1f} GB cache"
    fits = base + copy + cache <= MEMORY_SHARE * device
    return WeightsPlan(fits, f"auto: {numbers} {'<=' if fits else '>'} {MEMORY_SHARE:.0%} of {device / 1e9:.1f} GB")


class Decoded(NamedTuple):
    """What a rollout uses of a policy."""

    base: Params
    lora: Params
    merged: Params | None
    """Copies of the base's matrices (`merge`) that take their place in decoding; None: no copy."""


def decoded(
    model: Transformer, base: Params, policy: Params, config: RolloutConfig, prompts: tuple[int, int]
) -> Decoded:
    """What to prefill and decode with; `prompts` is (Q, P), `policy` an adapter or a whole model."""
    if WEIGHTS not in policy:
        merged = merge(model, base, policy) if plan_weights(model, base, config, prompts).merged else None
        return Decoded(base, policy, merged)
    weights = policy[WEIGHTS]
    if not is_wide(model, weights):
        return Decoded(weights, {}, merge(model, weights, {}) if config.rollout_weights == "bf16" else None)
    rest = {name: leaf for name, leaf in weights["layers"].items() if name not in matrix_modules(model.config)}
    small = cast({**weights, "layers": rest}, jnp.dtype(model.dtype).name)
    layers = {**weights["layers"], **small["layers"]}
    return Decoded({**small, "layers": layers}, {}, merge(model, weights, {}))


@functools.partial(jax.jit, static_argnames=("dtype",))
def cast(tree: Params, dtype: str) -> Params:
    """Every leaf in another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def describe_weights(
    model: Transformer, base: Params, policy: Params, config: RolloutConfig, prompts: tuple[int, int]
) -> str:
    """What the user is told of it before the run."""
    if WEIGHTS not in policy:
        return str(plan_weights(model, base, config, prompts))
    copied = is_wide(model, policy[WEIGHTS])
    how = f", copied to {jnp.dtype(model.dtype).name} for each rollout" if copied else ""
    return f"rollout weights: those that are trained{how}"


def is_wide(model: Transformer, weights: Params) -> bool:
    """Whether trained weights have another dtype than the one that is computed in."""
    return weights["embed"].dtype != jnp.dtype(model.dtype)


def merged_bytes(model: Transformer) -> int:
    """Size of the copy that `merge` makes."""
    widths = matrix_shapes(model.config).values()
    return model.config.num_layers * sum(rows * width for rows, width in widths) * jnp.dtype(model.dtype).itemsize


def fused_bytes(model: Transformer) -> int:
    """Size of the adapter as `decoding_adapter` lays it out."""
    config, rank = model.config, model.lora.lora_rank
    own = own_modules(model.lora.target_modules, config)
    ranks = {m: rank * sum(name in own for name in names) for m, names in matrix_modules(config).items()}
    numbers = sum(ranks[matrix] * sum(shape) for matrix, shape in matrix_shapes(config).items())
    return config.num_layers * numbers * jnp.dtype(model.dtype).itemsize


def at_once(config: RolloutConfig, questions: int) -> int:
    """How many of that many prompts are sampled at the same time."""
    return min(config.prompts_at_once or questions, questions)


def cache_bytes(model: Transformer, config: RolloutConfig, prompts: tuple[int, int]) -> int:
    """Size of the keys and values of (Q, P) prompts and their completions, of those that are sampled at the same time."""
    shape, questions, width = model.config, at_once(config, prompts[0]), prompts[1]
    wide = shape.head_dim * jnp.dtype(model.dtype).itemsize
    head = wide if config.kv_cache == "auto" else shape.head_dim + 4  # a byte each and a float32 scale
    token = 2 * shape.num_layers * shape.num_kv_heads * head
    return token * questions * (width + config.num_generations * config.max_completion_length)


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """`(out, in)` of the base's matrices."""
    single = module_shapes(config)
    return {
        matrix: (sum(single[name][0] for name in names), single[names[0]][1])
        for matrix, names in matrix_modules(config).items()
    }


def merge(model: Transformer, base: Params, lora: Params) -> dict[str, tuple[Float[Array, "N K"], ...]]:
    """W + scale · B A of every matrix in the compute dtype, one array for each layer.

    Made a matrix at a time: beside the result there is never more than one matrix in float32.
    """
    adapter = _fused(model, lora)

    def layers(name: str) -> tuple[Array, ...]:
        weight = base["layers"][name]
        return tuple(
            _merge_one(*_stack_and_index(weight, layer), adapter.get(name), layer, dtype=jnp.dtype(model.dtype).name)
            for layer in range(model.config.num_layers)
        )

    return {name: layers(name) for name in matrix_modules(model.config)}


@functools.partial(jax.jit, static_argnames=("model",))
def _fused(model: Transformer, lora: Params) -> dict[str, tuple[Array, Array]]:
    return fuse(lora, model.config, model.lora.scale, jnp.float32)


def _stack_and_index(weight: Any, layer: int) -> tuple[Any, int]:
    if isinstance(weight, MixedWeight):
        part, index = weight.where[layer]
        return weight.parts[part], index
    return weight, layer


@functools.partial(jax.jit, static_argnames=("dtype",))
def _merge_one(stack: Any, index: Array, adapter: tuple[Array, Array] | None, layer: Array, *, dtype: str) -> Array:
    weight = jax.tree.map(lambda leaf: leaf[index], stack)
    wide = dequantize(weight, jnp.float32) if isinstance(weight, PackedWeight) else weight.astype(jnp.float32)
    if adapter is not None:
        a, b = adapter
        wide = wide + jnp.matmul(b[layer], a[layer], precision=jax.lax.Precision.HIGHEST)
    return wide.astype(dtype)


def decoding_variables(model: Transformer, base: Params, lora: Params, merged: Params | None, unroll: bool) -> Params:
    """What the decode loop applies the model to; made once, outside the loop."""
    if merged is None:
        return {"params": base, "lora": decoding_adapter(model, lora, unroll)}
    return {"params": {**base, "layers": {**base["layers"], **merged}}, "lora": {}}


def decoding_adapter(model: Transformer, lora: Params, unroll: bool) -> dict[str, tuple[Any, Array]]:
    """The fused adapter; for unrolled layers every A is an array of its own, since a slice in front of a product is a copy."""
    adapter = fuse(lora, model.config, model.lora.scale, model.dtype)
    if not unroll:
        return adapter
    return {name: (tuple(a[layer] for layer in range(a.shape[0])), b) for name, (a, b) in adapter.items()}


def unrolls(config: RolloutConfig) -> bool:
    """Whether a decode step's layers are written out."""
    if config.decode_layers == "auto":
        return jax.default_backend() == "gpu"
    return config.decode_layers == "unrolled"


def _device_bytes() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
