"""A decode layer, its attention and its products, in one launch: for Hopper GPUs by Pallas Mosaic GPU.

    attended  = attention of the new tokens (or rows as they are)
    residual += attended @ out^T           rows = norm(residual)
    gated     = activation(rows @ gate^T) * (rows @ up^T)
    residual += gated @ down^T             rows = norm(residual)            parts = rows @ qkv^T, of the next layer

With few rows, a product of its own spends half its time on its start, its first reads and its end (docs/benchmarks.md). Here one
program a multiprocessor stays for all of them, and its warp groups have roles. One copies weights (TMA) into a ring in shared
memory, as far ahead as it holds them, and never waits for anything but room: the next product's weights arrive while the others
still multiply, store, wait for the other programs, and norm. One brings rows of x, and meets the other programs before it does. The
others multiply: each takes 64 rows of weights, dequantizes them in registers and hands them to the tensor core as its left operand,
as in `int4_matmul_mosaic.py`. The attention comes first (`mosaic_layer_attention.py`), with the shared memory of the rings for its own.

Between two steps, all programs meet at a counter in device memory, which only ever counts up: a chain of layers
takes the counter along, starting from 0, and each knows from its number in the chain what the counter must reach. They run at the
same time because there is one for each multiprocessor, and whatever ran there before ends without waiting for them; a program that
waits for seconds all the same ends with an error.

Sums of gate and up are needed whole, so their K is not split between programs. Where whole turns leave a few tiles, a last turn of them
would have most programs wait for a few: K of these tiles is cut into pieces instead, which programs multiply and store first, each before its
tiles. Programs that had no piece are done before the others, and add the pieces up; a second count says that all are there.

Rows of gate and up alternate by eights (`interleave_gate`), so that a thread's accumulators hold both of a pair. Activations have
permuted columns between the products (`rows.permute_columns`), as the products read them.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.codes import LAYER_CODE
from pallas_kernels.int4_matmul_mosaic import Plan
from pallas_kernels.mosaic_attention_plan import Attention, AttentionRefs, Given, attention_memory
from pallas_kernels.mosaic_instructions import ROWS, swizzle_bytes, tiled
from pallas_kernels.mosaic_layer_attention import PIECES
from pallas_kernels.mosaic_layer_plan import Layer, Operands, Pieces, Product, Refs
from pallas_kernels.mosaic_layer_roles import copy_weights, copy_x, multiply
from pallas_kernels.mosaic_ring import Slots
from pallas_kernels.rope_attention import NewTokens
from pallas_kernels.tuning import LAYER_X_STAGES, Int4Config, layer_attention_tile

COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 208
"""Of a thread: of two warp groups that copy, and two that multiply."""


@partial(jax.jit, static_argnames=("attention", "configs", "programs", "rows", "eps", "activation", "interpret"))
def _launch(
    attended,
    residual,
    norms,
    number,
    counter,
    weights,
    *,
    attention: Attention | None,
    configs: tuple[Int4Config, ...],
    programs: int,
    rows: int,
    eps: float,
    activation: str,
    interpret: bool,
):
    """(residual, parts of qkv or normed rows, counter, new caches); residual has as many rows as a tile.

    `attended` is what an attention is given, or its rows where `attention` is None.
    """
    (m, width), dtype = residual.shape, residual.dtype
    products = []
    for (packed, scales), config in zip(weights, configs, strict=True):
        n, k = packed.shape[1:]
        group = k // scales.shape[1]
        plan = Plan(config, k // config.block_k, group, LAYER_CODE, 0, False, interpret)
        products.append(Product(plan, n // config.block_n, gated=len(products) == 1))
    layer = Layer(tuple(products), attention, programs, rows, eps, activation, interpret)
    left = [
        jax.ShapeDtypeStruct((c.split_k, m, packed.shape[1]), jnp.float32)
        for c, (packed, _) in zip(configs, weights, strict=True)
    ]
    left[1] = jax.ShapeDtypeStruct((m, weights[1][0].shape[1] // 2), dtype)
    normed, heads = (jax.ShapeDtypeStruct((m, k), dtype) for k in (width, weights[0][0].shape[2]))
    # What products leave, the residual, the rows after out and after down, the attention's, and sums of pieces.
    outputs = [*left, normed, normed, normed, *([heads] if attention else [])]
    if cut := layer.cut:
        outputs.append(jax.ShapeDtypeStruct((cut.parts, m, cut.tiles * configs[1].block_n), jnp.float32))
    if attention:
        attended = attended._replace(suffix=tuple(map(jax.new_ref, attended.suffix)))
    given, tree = jax.tree.flatten(attended)

    def kernel(*refs):
        given, inputs, left, stored, shared = _cut(
            refs, tree.num_leaves, 5 + 2 * len(products), len(products), len(outputs) - len(products)
        )
        attended, memory, barriers = tree.unflatten(given), *shared
        residual, post_norm, following_norm, number, counter, *flat = inputs
        residual_out, after_out, after_down, *others = stored
        pieces = Pieces(others.pop(), counter.at[pl.ds(1, 1)], barriers.all_stored) if cut else None
        of_products, of_attention = memory.either
        if attention:
            ring = Slots((of_attention.ring,), *barriers.keys)
            of_attention = AttentionRefs(attended, ring, of_attention, barriers.together, barriers.attended)
            (attended,) = others
        x_of = (attended, after_out, left[1], after_down)
        operands = [Operands(*of) for of in zip(x_of, flat[::2], flat[1::2], left, strict=False)]
        ours = Refs(
            tuple(operands),
            residual,
            (post_norm, following_norm),
            number,
            counter.at[pl.ds(0, 1)],
            residual_out,
            (after_out, after_down),
            Slots((of_products.packed, memory.scales), *barriers.weights),
            Slots((of_products.x,), *barriers.x),
            memory.left,
            pieces,
            barriers.stored,
            barriers.met,
            memory.squares,
            barriers.all_here,
            of_attention,
        )
        role = lax.axis_index("warpgroup")

        @pl.when(role == layer.warpgroups)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            copy_weights(layer, ours)

        @pl.when(role == layer.warpgroups + 1)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            copy_x(layer, ours)

        @pl.when(role < layer.warpgroups)
        def _():
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            multiply(layer, ours)

    packed, scales = weights[0]
    call = plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(1,) if interpret else (programs,),
        grid_names=("cluster",) if interpret else ("program",),
        cluster=(programs,) if interpret else (),
        cluster_names=("program",) if interpret else (),
        num_threads=layer.warpgroups + 2,
        thread_name="warpgroup",
        scratch_types=(_memory(layer, dtype, packed.dtype, scales.dtype), _barriers(layer)),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, approx_math=True
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    shared = counter if interpret else jax.new_ref(counter)
    flat = [array for pair in weights for array in pair]
    out = call(*given, residual, *norms, number, shared, *flat)
    residual, _, after_down = out[len(products) :][:3]
    result = out[3] if len(products) > 3 else after_down
    caches = tuple(map(jax.freeze, attended.suffix)) if attention else ()
    return residual, result, counter if interpret else jax.freeze(shared), caches


class _OfProducts(NamedTuple):
    """Shared memory that the products use."""

    packed: Any
    x: Any


class _Memory(NamedTuple):
    """Shared memory of a program."""

    either: Any
    """(that of the products, then in the same place that of the attention, `AttentionMemory` or None)."""
    scales: Any
    left: Any
    squares: Any


class _Barriers(NamedTuple):
    """Of the rings (full, empty), and those that `Refs`, `Pieces` and `AttentionRefs` have."""

    weights: tuple[Any, Any]
    x: tuple[Any, Any]
    keys: tuple[Any, Any] | None
    stored: Any
    met: Any
    all_here: Any
    all_stored: Any
    together: Any
    attended: Any


def _memory(layer: Layer, x_dtype, packed_dtype, scales_dtype) -> _Memory:
    plan, attention = layer.products[0].plan, layer.attention
    config, stages = plan.config, plan.config.stages
    of_products = _OfProducts(
        plgpu.SMEM((stages, config.block_n, plan.block_bytes), packed_dtype, transforms=tiled(plan.block_bytes, 1)),
        plgpu.SMEM((LAYER_X_STAGES, config.block_m, config.block_k), x_dtype, transforms=tiled(128, 2)),
    )
    either, left = (of_products, None), None
    if attention:
        either = (of_products, attention_memory(attention, layer.warpgroups, layer.key_stages, x_dtype))
        # The interpreter takes two names of a memory for a race even where barriers are between them.
        either = either if layer.interpret else plgpu.RefUnion(*either)
    if layer.interpret:
        shape = (layer.warpgroups, ROWS, plan.group)
        left = plgpu.SMEM(shape, x_dtype, transforms=tiled(swizzle_bytes(plan.group), 2))
    return _Memory(
        either,
        plgpu.SMEM((stages, plan.groups, config.block_n), scales_dtype),
        left,
        plgpu.SMEM((4 * layer.warpgroups,), jnp.float32),
    )


def _barriers(layer: Layer) -> _Barriers:
    def barrier(arrivals: int, **several: int):
        return plgpu.Barrier(num_arrivals=arrivals, **several)

    def ring(stages: int, copies: int, readers: int = layer.warpgroups) -> tuple:
        return barrier(copies, num_barriers=stages), barrier(readers, num_barriers=stages)

    def of_interpreter(arrivals: int):
        """Of all programs."""
        return plgpu.ClusterBarrier(collective_axes=("program",), num_arrivals=arrivals) if layer.interpret else None

    return _Barriers(
        weights=ring(layer.products[0].plan.config.stages, 2),
        x=ring(LAYER_X_STAGES, 1),
        keys=ring(layer.key_stages, PIECES, 1) if layer.attention else None,
        stored=barrier(layer.warpgroups),
        met=barrier(1),
        all_here=of_interpreter(1),
        all_stored=of_interpreter(layer.warpgroups) if layer.cut else None,
        together=barrier(layer.warpgroups) if layer.attention else None,
        attended=barrier(layer.warpgroups) if layer.attention else None,
    )


def _cut(refs: tuple, *sizes: int) -> Iterator[tuple]:
    """So many of them, and the rest."""
    for size in sizes:
        yield refs[:size]
        refs = refs[size:]
    yield refs


def decode_layer(
    attended,
    residual,
    norms: tuple,
    number,
    counter,
    weights: Sequence[tuple],
    *,
    configs: tuple[Int4Config, ...],
    programs: int,
    eps: float,
    activation: str,
    scale: float = 0.0,
    interpret: bool = False,
):
    """(residual, partial sums [S, M, N] of the next layer's qkv, counter, new caches); without its weights, normed rows for the sums.

    Args:
      attended: what the attention is to be given; or its rows [M, H Hd] with permuted columns, and there are no new caches then.
      residual: [M, D].
      norms: stacks [L, D] of the norm in front of gate_up and of the one that follows the layer.
      number: of the layer, int or int32 [].
      counter: int32 [2], 0 for layer 0, then what the layer before returned.
      weights: (bytes uint8 [1, N, K], scales bfloat16 [1, K/G, N]) of out, gate_up (`interleave_gate`), down and the next layer's qkv.
      configs: each product's blocks, all with the same tile and stages; gate_up's K is not split.
      programs: multiprocessors of the GPU.
      eps: of all norms.
      scale: of the attention's scores.
    """
    m, block_m = residual.shape[0], configs[0].block_m
    number = jnp.asarray(number, jnp.int32).reshape(1)

    def whole_tile(rows):
        return rows if m == block_m else jnp.pad(rows, ((0, block_m - m), (0, 0)))

    attention = None
    if isinstance(attended, NewTokens):
        caches, attention = (attended.k, attended.v), _attention(attended, programs, scale)
        attended = _given(attended)
    else:
        caches, attended = (), whole_tile(attended)
    how: dict[str, Any] = dict(configs=configs, programs=programs, rows=m, eps=eps, activation=activation)
    residual, result, counter, written = _launch(
        attended, whole_tile(residual), norms, number, counter, weights, attention=attention, interpret=interpret, **how
    )
    written = tuple(new.reshape(cache.shape) for new, cache in zip(written, caches, strict=True))
    return residual[:m], result[..., :m, :], counter, written


def _attention(tokens: NewTokens, programs: int, scale: float) -> Attention:
    """The shape of a launch's attention."""
    _, questions, group, kv_heads, slots, depth = tokens.k.shape
    share = tokens.qkv.shape[-1] // depth // kv_heads - 2
    generations, _ = layer_attention_tile(questions, group, kv_heads, share, programs)
    prompt_slots = tokens.prompt_k.shape[3]
    return Attention(questions, group, kv_heads, share, depth, prompt_slots, slots, generations, programs, scale)


def _given(tokens: NewTokens) -> Given:
    """The same arrays, as the kernel reads them."""
    depth = tokens.k.shape[-1]
    return Given(
        tokens.qkv.reshape(tokens.qkv.shape[0], -1, tokens.qkv.shape[-1]),
        tokens.cos,
        tokens.sin,
        (tokens.prompt_k.reshape(-1, depth), tokens.prompt_v.reshape(-1, depth)),
        tokens.prompt_lengths,
        (tokens.k.reshape(-1, depth), tokens.v.reshape(-1, depth)),
        tokens.slot.reshape(1),
        tokens.norms,
        tokens.bias,
    )
