"""What a rollout decodes with: the base as stored plus the adapter, or a copy with the adapter merged in.

Quantized weights are the smaller read, which is what counts with few rows; with many the arithmetic counts, and a
plain matrix product of 16-bit weights is faster than any kernel that dequantizes, and has no adapter beside it. A copy in 8 bits
lies between: half the bytes of 16, no adapter, and a rounding that shows in the gap below. Beside it stands, in 8 bits too, a copy of
the head (`has_proposal_head`), by whose logits tokens are proposed; the stored head corrects the draw, so that its rounding does not
show (`pallas_kernels/draw_corrected.py`). The copy is
made anew for every rollout, because the adapter changed since the last one, and freed after it. Prompts are
prefilled with the stored weights in either case, and so is the training forward: what the rounding of merged weights
does to log-probabilities is in the logged gap between sampler and trainer.

Weights that are trained whole are decoded with as they are where they have the compute dtype, and from a copy in it, made
the same way, where they are wider.

`auto` compares sizes that the configuration fixes, never the memory that happens to be free, so that every step of a run
and every resumed run decides alike.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import pallas_kernels
from jgrpo.config import RolloutConfig
from jgrpo.lora import WEIGHTS, fuse, matrix_modules, module_shapes, own_modules
from jgrpo.models import PROPOSAL_HEAD, ModelConfig, Transformer
from jgrpo.models.decoding import FOLLOWING_NORM, ROTATIONS, following_norms, rotations
from jgrpo.quantization import LAYERS, Fast8Weight, Int4Weight, MixedWeight, PackedWeight, dequantize, quantize_fast8
from jgrpo.rollout.sampling import keeps_everything
from pallas_kernels import LayerMatrices, LayerMatrix, Source, dispatch, put_layer, unpermute_columns

Params = Mapping[str, Any]

MERGED_ROWS = 64
"""Rows from which auto prefers a merged copy: on an H200 a tenth to a quarter faster at 64 (docs/benchmarks.md), more with more rows."""
FUSED_ROWS = 16
"""Rows from which auto prefers a copy in 8 bits that has a kernel of all layers: on an H200 a 1.5B is then a fifth faster than with int4 at
16 rows and a quarter at 32, and 6 % faster than with a copy in 16 bits at 64."""
MANY_ROWS, LARGE_COPY = 128, 4e9
"""Below so many rows, and from so many bytes of 16-bit weights on, auto takes a copy in 8 bits also where it has a kernel for each matrix.
On an H200 with 64 rows it is 13 % faster than one of 16 for a 3B (5.6 GB) and 27 % for an 8B; for a 1.5B (2.6 GB) that of 16 bits is ahead."""
COPY_GROUP, SCALE = 64, jnp.dtype(jnp.bfloat16)
"""Of a copy in 8 bits: inputs that share a scale, and its type; the kernel for few rows reads no other."""
HEAD_BLOCK, COLUMNS = 128, 16
"""Of a head in 8 bits: the kernel takes whole blocks of so many rows of weights, and columns are reordered in so many."""
MEMORY_SHARE = 0.6
"""Share of the device's memory that base, copy and cache may fill under auto; the update needs the rest."""


@dataclass(frozen=True)
class WeightsPlan:
    """Which weights a rollout decodes with, and why."""

    copy: str | None
    """The form of the merged copy, "bf16" (the compute dtype), "int8" or "int8_layers" (`int8_form`); None: the base as stored."""
    reason: str
    head: bool = False
    """Whether the copy has a head that proposes tokens; one in 8 bits only."""

    def __str__(self) -> str:
        eight_bits = "merged copy in 8 bits"
        names = {None: "as stored", "bf16": "merged copy", "int8": eight_bits, "int8_layers": eight_bits}
        return f"rollout weights: {names[self.copy]} ({self.reason})"


def plan_weights(model: Transformer, base: Params, config: RolloutConfig, prompts: tuple[int, int]) -> WeightsPlan:
    """Follow `config.rollout_weights`, or decide; `prompts` is (Q, P)."""
    rows = at_once(config, prompts[0]) * config.num_generations
    proposes = has_proposal_head(model, config, rows, isinstance(stored_head(base), PackedWeight))
    if config.rollout_weights != "auto":
        copy = {"int4": None, "int8": int8_form(model, rows)}.get(config.rollout_weights, config.rollout_weights)
        head = config.rollout_weights == "int8" and proposes
        slow = copy == "int8" and not has_int8_kernel(model, rows)
        why = "; no kernel multiplies by it here, so every step dequantizes it" if slow else ""
        return WeightsPlan(copy, f"rollout_weights: {config.rollout_weights}{why}", head)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    copies = {"bf16": merged_bytes(model), "int8": merged_bytes(model, "int8", proposes)}
    cache = cache_bytes(model, config, prompts)
    form = int8_form(model, rows)
    runs = form == "int8_layers" or has_int8_kernel(model, rows)
    plan = choose_weights(rows, size, copies, cache, _device_bytes(), form if runs else None)
    return replace(plan, head=proposes and plan.copy not in (None, "bf16"))


def choose_weights(
    rows: int, base: int, copies: Mapping[str, int], cache: int, device: int | None, int8: str | None = None
) -> WeightsPlan:
    """auto's rule, on numbers of bytes.

    `device` is None where the device does not state its memory; `int8` is the form of a copy in 8 bits, None where no kernel multiplies by it.
    """
    fused = int8 == "int8_layers"
    least = FUSED_ROWS if fused else MERGED_ROWS
    if rows < least:
        return WeightsPlan(None, f"auto: {rows} rows, a copy pays from {least}")
    if device is None:
        return WeightsPlan(None, "auto: the device does not state its memory")
    few = fused or (int8 is not None and rows < MANY_ROWS and copies["bf16"] >= LARGE_COPY)
    copy = copies["int8" if few else "bf16"]
    numbers = f"{base / 1e9:.1f} GB base + {copy / 1e9:.1f} GB copy + {cache / 1e9:.1f} GB cache"
    fits = base + copy + cache <= MEMORY_SHARE * device
    reason = f"auto: {numbers} {'<=' if fits else '>'} {MEMORY_SHARE:.0%} of {device / 1e9:.1f} GB"
    return WeightsPlan((int8 if few else "bf16") if fits else None, reason)


def int8_form(model: Transformer, rows: int) -> str:
    """How a copy in 8 bits is laid out: for a kernel of all layers where this device has one for that many rows ("int8_layers"), or a matrix."""
    config = model.config
    plain = not (config.out_bias or config.mlp_bias or config.sandwich_norms or config.norm_offset)
    matrices = [matrix_shapes(config)[name] for name in LayerMatrices._fields]
    grouped = all(copy_group(width) == COPY_GROUP for _, width in matrices)
    fused = plain and grouped and pallas_kernels.has_layer_kernel(rows, matrices, model.dtype, SCALE)
    return "int8_layers" if fused else "int8"


def has_int8_kernel(model: Transformer, rows: int) -> bool:
    """Whether this device multiplies that many rows by each of the model's matrices in 8 bits without dequantizing it first."""
    return all(
        pallas_kernels.has_int8_kernel(rows, n, k, copy_group(k), model.dtype, SCALE)
        for n, k in matrix_shapes(model.config).values()
    )


def has_proposal_head(model: Transformer, config: RolloutConfig, rows: int, packed: bool) -> bool:
    """Whether a copy in 8 bits for that many rows has a copy of the head too; `packed`: the head is stored quantized.

    Where tokens are drawn from all of softmax(logits / temperature), which is what the correction knows, and from a head of whole
    blocks. Not where a GPU has no kernel for it: a step would dequantize it, and the stored head is the faster read. On other devices
    every step dequantizes all of a copy in 8 bits, and draws as a GPU does.
    """
    shape = model.config
    whole = keeps_everything(shape.vocab_size, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    if not whole or config.temperature == 0.0 or shape.logit_softcap is not None:
        return False
    if packed or shape.vocab_size % HEAD_BLOCK or shape.hidden_size % COLUMNS or rows > dispatch.INT8_ROWS:
        return False
    size = shape.vocab_size, shape.hidden_size, copy_group(shape.hidden_size)
    has_kernel = pallas_kernels.has_int8_kernel(rows, *size, model.dtype, SCALE)
    return has_kernel or dispatch.current_device().backend != "gpu"


def stored_head(base: Params) -> Any:
    """The output matrix, which is the embedding where the two are tied."""
    return base["head"] if "head" in base else base.get("embed")


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
        plan = plan_weights(model, base, config, prompts)
        return Decoded(base, policy, merge(model, base, policy, plan.copy, plan.head) if plan.copy else None)
    weights, copy = policy[WEIGHTS], config.rollout_weights
    rows = at_once(config, prompts[0]) * config.num_generations
    form = int8_form(model, rows) if copy == "int8" else "bf16"
    head = copy == "int8" and has_proposal_head(model, config, rows, packed=False)
    if not is_wide(model, weights):
        return Decoded(weights, {}, merge(model, weights, {}, form, head) if copy in ("bf16", "int8") else None)
    rest = {name: leaf for name, leaf in weights["layers"].items() if name not in matrix_modules(model.config)}
    small = cast({**weights, "layers": rest}, jnp.dtype(model.dtype).name)
    layers = {**weights["layers"], **small["layers"]}
    return Decoded({**small, "layers": layers}, {}, merge(model, weights, {}, form, head))


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
    form = "8 bits" if config.rollout_weights == "int8" else jnp.dtype(model.dtype).name
    copied = config.rollout_weights == "int8" or is_wide(model, policy[WEIGHTS])
    how = f", copied to {form} for each rollout" if copied else ""
    return f"rollout weights: those that are trained{how}"


def is_wide(model: Transformer, weights: Params) -> bool:
    """Whether trained weights have another dtype than the one that is computed in."""
    return weights["embed"].dtype != jnp.dtype(model.dtype)


def merged_bytes(model: Transformer, copy: str = "bf16", head: bool = False) -> int:
    """Size of the copy that `merge` makes."""
    config = model.config

    def size(rows: int, width: int, copy: str) -> int:
        wide = width * jnp.dtype(model.dtype).itemsize
        return rows * (wide if copy == "bf16" else width + width // copy_group(width) * SCALE.itemsize)

    layers = config.num_layers * sum(size(*shape, copy) for shape in matrix_shapes(config).values())
    return layers + (size(config.vocab_size, config.hidden_size, "int8") if head else 0)


def copy_group(width: int) -> int:
    """Inputs that share a scale in a copy of 8 bits: at most 64, a divisor of the width."""
    return math.gcd(width, COPY_GROUP)


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


def merge(model: Transformer, base: Params, lora: Params, copy: str = "bf16", head: bool = False) -> dict[str, Any]:
    """W + scale · B A of every matrix, as one array `[N, K]` in the compute dtype for each layer, or ("int8") in 8 bits a weight.

    "int8_layers": the same as "int8" laid out for a kernel of all layers, as the one entry `LAYERS`. `head`: with a copy of the output matrix in 8
    bits, `PROPOSAL_HEAD`. Made a matrix at a time: beside the result there is never more than one of a layer in float32.
    """
    layers = _merge_layers(model, base, lora, copy)
    return {**layers, PROPOSAL_HEAD: _proposal_head(stored_head(base))} if head else layers


def _merge_layers(model: Transformer, base: Params, lora: Params, copy: str) -> dict[str, Any]:
    adapter, numbers = _fused(model, lora), range(model.config.num_layers)
    dtype = jnp.dtype(model.dtype).name

    def one(name: str, layer: int) -> Any:
        stack, index = _stack_and_index(base["layers"][name], layer)
        return _merge_one(stack, index, adapter.get(name), layer, copy=copy, dtype=dtype)

    def stacked(name: str) -> LayerMatrix:
        matrix, how = None, dict(layers=len(numbers), dtype=dtype, gate=name == "gate_up")
        for layer in numbers:
            stack, index = _stack_and_index(base["layers"][name], layer)
            matrix = _merge_into(matrix, stack, index, adapter.get(name), layer, **how)
        assert matrix is not None
        return matrix

    if copy == "int8_layers":
        return {LAYERS: LayerMatrices(*map(stacked, LayerMatrices._fields))}
    copies = {name: tuple(one(name, layer) for layer in numbers) for name in matrix_modules(model.config)}
    if copy != "int8":
        return copies
    where = tuple((layer, 0) for layer in numbers)  # every part is a stack of one layer
    return {name: MixedWeight(parts, where) for name, parts in copies.items()}


@functools.partial(jax.jit, static_argnames=("model",))
def _fused(model: Transformer, lora: Params) -> dict[str, tuple[Array, Array]]:
    return fuse(lora, model.config, model.lora.scale, jnp.float32)


def _stack_and_index(weight: Any, layer: int) -> tuple[Any, int]:
    if isinstance(weight, MixedWeight):
        part, index = weight.where[layer]
        return weight.parts[part], index
    return weight, layer


@functools.partial(jax.jit, static_argnames=("copy", "dtype"))
def _merge_one(
    stack: Any, index: Array, adapter: tuple[Array, Array] | None, layer: Array, *, copy: str, dtype: str
) -> Any:
    weight = jax.tree.map(lambda leaf: leaf[index], stack)
    wide = dequantize(weight, jnp.float32) if isinstance(weight, PackedWeight) else weight.astype(jnp.float32)
    if adapter is not None:
        a, b = (factor[layer] for factor in adapter)
        if copy == "bf16":
            wide = wide + jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
        else:  # whose own rounding is far coarser than a product's in the compute dtype
            wide = wide + jnp.matmul(b.astype(dtype), a.astype(dtype)).astype(jnp.float32)
    if copy == "bf16":
        return wide.astype(dtype)
    return _in_8_bits(wide[None])


@jax.jit
def _proposal_head(head: Array) -> Fast8Weight:
    """With its columns as `Transformer.proposal_logits` wants them, which stay in their groups."""
    return _in_8_bits(unpermute_columns(head))


def _in_8_bits(weight: Array) -> Fast8Weight:
    return quantize_fast8(weight, copy_group(weight.shape[-1]), SCALE)


@functools.partial(jax.jit, static_argnames=("layers", "dtype", "gate"), donate_argnames=("into",))
def _merge_into(
    into: LayerMatrix | None,
    stack: Any,
    index: Array,
    adapter: tuple[Array, Array] | None,
    layer: Array,
    *,
    layers: int,
    dtype: str,
    gate: bool,
) -> LayerMatrix:
    """The matrices of all layers with this one's, in place; without any, those of so many layers."""
    if isinstance(stack, Int4Weight) and stack.zeros is None:
        source = Source(stack.packed, stack.scales, adapter)
        how: dict[str, Any] = dict(
            group=copy_group(2 * stack.packed.shape[-1]), gate=gate, dtype=dtype, scales_dtype=SCALE
        )
        return pallas_kernels.merge_layer(into, source, index, layer, layers=layers, **how)
    coded = _merge_one(stack, index, adapter, layer, copy="int8", dtype=dtype)
    return put_layer(into, coded.packed[0], coded.scales[0], layer, layers, gate)


def decoding_variables(
    model: Transformer, base: Params, lora: Params, merged: Params | None, unroll: bool, positions: int
) -> Params:
    """What the decode loop applies the model to, in rows of up to `positions`; made once, outside the loop, where XLA cannot compute it again for every layer to save memory."""
    copies = dict(merged or {})
    head = {PROPOSAL_HEAD: copies.pop(PROPOSAL_HEAD)} if PROPOSAL_HEAD in copies else {}
    layers = {**base["layers"], **copies, **step_constants(model, base, positions)}
    lora = decoding_adapter(model, lora, unroll) if merged is None else {}
    return {"params": {**base, **head, "layers": layers}, "lora": lora}


def step_constants(model: Transformer, base: Params, positions: int) -> dict[str, Any]:
    """What every step of decoding would make anew of the base and of up to `positions`; among its layers by these names."""
    return {FOLLOWING_NORM: following_norms(base), ROTATIONS: rotations(model.config, positions)}


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
