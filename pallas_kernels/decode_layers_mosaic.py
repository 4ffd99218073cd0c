"""All layers of a decode step, attentions and products, in one launch: for Hopper GPUs by Pallas Mosaic GPU.

    parts     = rows @ qkv^T
    attended  = attention of the new tokens
    residual += attended @ out^T           rows = norm(residual)
    gated     = activation(rows @ gate^T) * (rows @ up^T)
    residual += gated @ down^T             rows = norm(residual), for the next layer

With few rows, a product of its own spends half its time on its start, its first reads and its end (docs/benchmarks.md). Here one
program a multiprocessor stays for all of them, and its warp groups have roles. One copies (TMA) into a ring in shared memory, as far ahead as it
holds them, and never waits for anything but room: weights, and where the attention comes, keys and values, whose slots have the same size. What the
next step needs arrives while the others still multiply, store, wait for the other programs, and norm, across layers too. One brings rows of x, and
meets the other programs before it does. The others multiply: each takes 64 rows of weights, dequantizes them in registers and hands them to the
tensor core as its left operand, as in `int4_matmul_mosaic.py`; and they attend (`mosaic_layer_attention.py`), with the memory of the ring of x for their own.

Between two steps, all programs meet at a counter in device memory, which only ever counts up. They run at the same time because there is one for
each multiprocessor, and whatever ran there before ends without waiting for them; a program that waits for seconds all the same ends with an error.

Where attentions have to be apart, a launch has one layer's steps from out to the next layer's qkv, and the first one qkv only; a chain of launches
takes the counter along, starting from 0, and each knows from its layer's number what the counter must reach.

Sums of gate and up are needed whole, so their K is not split between programs. Where whole turns leave a few tiles, a last turn of them
would have most programs wait for a few: K of these tiles is cut into pieces instead, which programs multiply and store first, each before its
tiles. Programs that had no piece are done before the others, and add the pieces up; a second count says that all are there. Each program counts its own
in while its tile is multiplied already: what was stored has to be there before, and the warp group that brings x has the time to wait for it.

Rows of gate and up alternate by eights (`interleave_gate`), so that a thread's accumulators hold both of a pair. Activations have
permuted columns between the products (`rows.permute_columns`), as the products read them.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Mosaic GPU needs a newer jax than the one the CPU's tests are checked with.

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.codes import LAYER_CODE
from pallas_kernels.mosaic_attention_plan import Attention, AttentionRefs, Given, attention_memory
from pallas_kernels.mosaic_instructions import ROWS, swizzle_bytes, tiled
from pallas_kernels.mosaic_layer_attention import PIECES
from pallas_kernels.mosaic_layer_plan import ALL, ATTENTION, FIRST, ONE, Layer, Operands, Pieces, Product, Refs
from pallas_kernels.mosaic_layer_roles import copy_weights, copy_x, multiply
from pallas_kernels.mosaic_product_plan import Plan
from pallas_kernels.mosaic_ring import Slots
from pallas_kernels.rope_attention import NewTokens
from pallas_kernels.tuning import LAYER_X_STAGES, Int4Config, layer_attention_tile

COPY_REGISTERS, MULTIPLY_REGISTERS = 48, 208
"""Of a thread: of two warp groups that copy, and two that multiply."""


class _Buffers(NamedTuple):
    """Arrays in device memory that programs hand each other, or leave."""

    left: dict[str, Any]
    """What products leave: partial sums, and of gate_up the gated rows."""
    rows: dict[str, Any]
    """What norms after out and after down leave."""
    attended: Any = None
    pieces: Any = None
    """Sums of tiles that are cut."""


@partial(
    jax.jit,
    static_argnames=("steps", "attention", "configs", "count", "programs", "m", "eps", "activation", "interpret"),
)
def _launch(
    x,
    tokens,
    residual,
    norms,
    number,
    counter,
    weights,
    *,
    steps: tuple[str, ...],
    attention: Attention | None,
    configs: tuple[Int4Config, ...],
    count: int,
    programs: int,
    m: int,
    eps: float,
    activation: str,
    interpret: bool,
):
    """(residual, what the last step leaves, counter, new caches); residual and `x` have as many rows as a tile.

    `x` is what the first step reads; `tokens` what the attention is given but for qkv, or None.
    """
    names = tuple(step for step in steps if step != ATTENTION)
    block_m, dtype = x.shape[0], x.dtype
    products = {}
    for name, (packed, scales), config in zip(names, weights, configs, strict=True):
        n, k = packed.shape[1:]
        plan = Plan(config, k // config.block_k, k // scales.shape[1], LAYER_CODE, 0, False, interpret)
        ahead = int(name == "qkv" and steps[0] == "out")
        products[name] = Product(plan, n // config.block_n, name == "gate_up", ahead)
    layer = Layer(steps, products, attention, count, programs, m, eps, activation, interpret)

    def array(*shape: int, of=dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    left = {
        name: array(config.split_k, block_m, packed.shape[1])
        for name, config, (packed, _) in zip(names, configs, weights, strict=True)
    }
    if "qkv" in left and not attention:  # for the kernel that follows
        left["qkv"] = array(*left["qkv"].shape, of=jnp.float32)
    normed = {step: array(*residual.shape) for step in ("out", "down") if step in steps}
    buffers = _Buffers(left, normed)
    if "gate_up" in steps:
        left["gate_up"] = array(block_m, left["gate_up"].shape[2] // 2)
    if attention:
        del normed["down"]  # which is where the next layer reads its `x`
        x, tokens = jax.new_ref(x), tokens._replace(suffix=tuple(map(jax.new_ref, tokens.suffix)))
        buffers = buffers._replace(attended=array(block_m, weights[names.index("out")][0].shape[2]))
    if cut := layer.cut:
        columns = cut.tiles * products["gate_up"].plan.config.block_n
        buffers = buffers._replace(pieces=array(cut.parts, block_m, columns))
    residual = jax.new_ref(residual)
    shared = counter if interpret else jax.new_ref(counter)
    given = (x, tokens, residual, norms, number, shared, weights)
    inputs, tree = jax.tree.flatten(given)
    outputs, buffers_tree = jax.tree.flatten(buffers)

    def kernel(*refs):
        of_inputs, of_outputs, shared = refs[: len(inputs)], refs[len(inputs) :][: len(outputs)], refs[-2:]
        layers = _refs(layer, tree.unflatten(of_inputs), buffers_tree.unflatten(of_outputs), *shared)
        role = lax.axis_index("warpgroup")

        @pl.when(role >= layer.warpgroups)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            pl.when(role == layer.warpgroups)(lambda: copy_weights(layer, layers))
            pl.when(role > layer.warpgroups)(lambda: copy_x(layer, layers))

        @pl.when(role < layer.warpgroups)
        def _():
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
            multiply(layer, layers)

    packed, scales = weights[0]
    call = plgpu.kernel(
        kernel,
        out_type=outputs,
        **_grid(layer),
        num_threads=layer.warpgroups + 2,
        thread_name="warpgroup",
        scratch_types=(_memory(layer, dtype, packed.dtype, scales.dtype), _barriers(layer)),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, approx_math=True
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    buffers = buffers_tree.unflatten(call(*inputs))
    result = jax.freeze(x) if attention else buffers.left["qkv"] if steps[-1] == "qkv" else buffers.rows["down"]
    caches = tuple(map(jax.freeze, tokens.suffix)) if attention else ()
    return jax.freeze(residual), result, counter if interpret else jax.freeze(shared), caches


def _grid(layer: Layer) -> dict[str, Any]:
    """The interpreter's programs are one cluster, in place of the counter."""
    if layer.interpret:
        return dict(grid=(1,), grid_names=("cluster",), cluster=(layer.programs,), cluster_names=("program",))
    return dict(grid=(layer.programs,), grid_names=("program",))


def _refs(layer: Layer, inputs: tuple, buffers: _Buffers, memory: "_Memory", barriers: "_Barriers") -> Refs:
    """By what the warp groups know them."""
    x, tokens, residual, norms, number, counter, weights = inputs
    rows, attention = buffers.rows, None
    of_products, of_attention = memory.either
    packed, keys = memory.slots
    if layer.attention:
        rows = {**rows, "down": x}
        ring = Slots((keys,), *barriers.weights)
        attention = AttentionRefs(tokens._replace(qkv=buffers.left["qkv"]), ring, of_attention, barriers.together)
    # What each product reads; the first one, what the launch is given.
    sources = {"out": buffers.attended, "gate_up": rows.get("out"), "down": buffers.left.get("gate_up")}
    sources |= {"qkv": rows.get("down"), layer.steps[0]: x}
    pieces = None
    if layer.cut:
        pieces = Pieces(buffers.pieces, counter.at[pl.ds(1, 1)], barriers.piece_stored, barriers.all_stored)
    return Refs(
        {
            name: Operands(sources[name], *pair, buffers.left[name])
            for name, pair in zip(layer.products, weights, strict=True)
        },
        residual,
        norms,
        number,
        counter.at[pl.ds(0, 1)],
        rows,
        Slots((packed, memory.scales), *barriers.weights),
        Slots((of_products,), *barriers.x),
        memory.left,
        pieces,
        barriers.stored,
        barriers.met,
        memory.squares,
        barriers.all_here,
        attention,
    )


class _Memory(NamedTuple):
    """Shared memory of a program."""

    slots: Any
    """Of the ring, (for weights, then in the same place for keys and values, or None)."""
    scales: Any
    either: Any
    """(slots for x, then in the same place what the attention has beside its ring, `AttentionMemory` or None)."""
    left: Any
    squares: Any


class _Barriers(NamedTuple):
    """Of the rings (full, empty), and those that `Refs`, `Pieces` and `AttentionRefs` have."""

    weights: tuple[Any, Any]
    x: tuple[Any, Any]
    stored: Any
    met: Any
    piece_stored: Any
    all_here: Any
    all_stored: Any
    together: Any


def _memory(layer: Layer, x_dtype, packed_dtype, scales_dtype) -> _Memory:
    plan, attention, stages = layer.plan, layer.attention, layer.stages
    config = plan.config
    packed = plgpu.SMEM((stages, config.block_n, plan.block_bytes), packed_dtype, transforms=tiled(plan.block_bytes, 1))
    x = plgpu.SMEM((LAYER_X_STAGES, config.block_m, config.block_k), x_dtype, transforms=tiled(128, 2))
    slots, either, left = (packed, None), (x, None), None
    if attention:
        # Of heads of 64, half a slot stays empty.
        rows = config.block_n * plan.block_bytes // (2 * attention.depth)
        keys = plgpu.SMEM((stages, rows, attention.depth), x_dtype, transforms=tiled(128, 2))
        slots, either = (packed, keys), (x, attention_memory(attention, layer.warpgroups, x_dtype))
        # The interpreter takes two names of a memory for a race even where barriers are between them.
        slots, either = (both if layer.interpret else plgpu.RefUnion(*both) for both in (slots, either))
    if layer.interpret:
        shape = (layer.warpgroups, ROWS, plan.group)
        left = plgpu.SMEM(shape, x_dtype, transforms=tiled(swizzle_bytes(plan.group), 2))
    return _Memory(
        slots,
        plgpu.SMEM((stages, plan.groups, config.block_n), scales_dtype),
        either,
        left,
        plgpu.SMEM((4 * layer.warpgroups,), jnp.float32),
    )


def _barriers(layer: Layer) -> _Barriers:
    def barrier(arrivals: int, **several: int):
        return plgpu.Barrier(num_arrivals=arrivals, **several)

    def ring(stages: int, copies: int) -> tuple:
        return barrier(copies, num_barriers=stages), barrier(layer.warpgroups, num_barriers=stages)

    def of_interpreter(arrivals: int):
        """Of all programs."""
        return plgpu.ClusterBarrier(collective_axes=("program",), num_arrivals=arrivals) if layer.interpret else None

    return _Barriers(
        weights=ring(layer.stages, PIECES if layer.attention else 2),
        x=ring(LAYER_X_STAGES, 1),
        stored=barrier(layer.warpgroups),
        met=barrier(1),
        piece_stored=barrier(layer.warpgroups) if layer.cut else None,
        all_here=of_interpreter(1),
        all_stored=of_interpreter(layer.warpgroups) if layer.cut else None,
        together=barrier(layer.warpgroups) if layer.attention and layer.interpret else None,
    )


def decode_layers(
    tokens: NewTokens,
    residual,
    rows,
    norms: tuple,
    matrices: Sequence[tuple],
    *,
    configs: tuple[Int4Config, ...],
    programs: int,
    eps: float,
    activation: str,
    scale: float,
    interpret: bool = False,
):
    """(normed rows [M, D] after the last layer, new caches), of all layers in one launch.

    Args:
      rows: [M, D], the residual normed for the first layer, with permuted columns.
      norms: stacks [L, D] of the norm in front of gate_up and of the one that follows a layer.
      matrices: (bytes uint8 [L, N, K], scales bfloat16 [L, K/G, N]) of qkv, out, gate_up (`interleave_gate`) and down.
      configs: each product's blocks, all with the same tile and stages; gate_up's K is not split.
      programs: multiprocessors of the GPU.
      eps: of all norms.
      scale: of the attention's scores.
    """
    m, block_m = residual.shape[0], configs[0].block_m
    how: dict[str, Any] = dict(configs=configs, programs=programs, m=m, eps=eps, activation=activation)
    attention = _attention(tokens, matrices[0][0].shape[1], programs, scale)
    how |= dict(steps=ALL, attention=attention, count=len(norms[0]), interpret=interpret)
    number, counter = jnp.zeros((1,), jnp.int32), jnp.zeros((2,), jnp.int32)
    rows, residual = (_whole_tile(array, block_m) for array in (rows, residual))
    _, result, _, written = _launch(rows, _given(tokens), residual, norms, number, counter, matrices, **how)
    return result[:m], tuple(new.reshape(cache.shape) for new, cache in zip(written, (tokens.k, tokens.v), strict=True))


def decode_layer(
    attended,
    residual,
    norms: tuple,
    number,
    counter,
    matrices: Sequence[tuple],
    *,
    configs: tuple[Int4Config, ...],
    programs: int,
    eps: float,
    activation: str,
    interpret: bool = False,
):
    """(residual, partial sums [S, M, N] of the next layer's qkv, counter), of one layer without its attention; of the last one, normed rows for the sums.

    Args:
      attended: [M, H Hd] with permuted columns.
      number: of the layer, int or int32 [].
      counter: int32 [2], 0 for layer 0, then what the layer before returned.
      matrices: of all layers: out, gate_up, down and, for a layer that is not the last, qkv.

    The other arguments are those of `decode_layers`.
    """
    steps, (m, block_m) = ONE[: len(matrices)], (residual.shape[0], configs[0].block_m)
    how: dict[str, Any] = dict(configs=configs, programs=programs, m=m, eps=eps, activation=activation)
    how |= dict(steps=steps, attention=None, count=1, interpret=interpret)
    attended, residual = (_whole_tile(array, block_m) for array in (attended, residual))
    number = jnp.asarray(number, jnp.int32).reshape(1)
    residual, result, counter, _ = _launch(attended, None, residual, norms, number, counter, matrices, **how)
    return residual[:m], result[..., :m, :], counter


def first_qkv(rows, matrix: tuple, *, config: Int4Config, programs: int, interpret: bool = False):
    """Partial sums [S, M, N] of layer 0's qkv, of normed rows [M, D] with permuted columns and the matrix of all layers."""
    how: dict[str, Any] = dict(configs=(config,), programs=programs, m=rows.shape[0], eps=0.0, activation="silu")
    how |= dict(steps=FIRST, attention=None, count=1, interpret=interpret)
    x, counter = _whole_tile(rows, config.block_m), jnp.zeros((2,), jnp.int32)
    unused = jnp.zeros((1, 8), x.dtype)
    launched = _launch(x, None, unused, (unused, unused), counter[:1], counter, (matrix,), **how)
    return launched[1][:, : rows.shape[0]]


def _whole_tile(rows, block_m: int):
    m = rows.shape[0]
    return rows if m == block_m else jnp.pad(rows, ((0, block_m - m), (0, 0)))


def _attention(tokens: NewTokens, width: int, programs: int, scale: float) -> Attention:
    """The shape of a launch's attention; `width` is that of qkv."""
    _, questions, group, kv_heads, slots, depth = tokens.k.shape
    share = width // depth // kv_heads - 2
    generations, _ = layer_attention_tile(questions, group, kv_heads, share, programs)
    prompt_slots = tokens.prompt_k.shape[3]
    return Attention(questions, group, kv_heads, share, depth, prompt_slots, slots, generations, programs, scale)


def _given(tokens: NewTokens) -> Given:
    """The same arrays, as the kernel reads them; it makes the sums of qkv itself."""
    depth = tokens.k.shape[-1]
    return Given(
        None,
        tokens.cos,
        tokens.sin,
        (tokens.prompt_k.reshape(-1, depth), tokens.prompt_v.reshape(-1, depth)),
        tokens.prompt_lengths,
        (tokens.k.reshape(-1, depth), tokens.v.reshape(-1, depth)),
        tokens.slot.reshape(1),
        tokens.norms,
        tokens.bias,
    )
