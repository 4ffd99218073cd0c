"""Rotation, cache write and attention of one token in one launch for NVIDIA GPUs (sm_80 and up).

The programs are those of `whole_attention_triton.py`: each owns a few generations of a question and a kv head, so no other one
reads or writes their new slots. A program sums, norms and rotates its query heads and its generations' keys as
`rope_cache_triton.py` does, with the same roundings, and writes keys and values into the caches. It does not wait to read them
back: the new token is where the online softmax of one of the warps starts, (its score, 1, its values), and the list of blocks is
that of the slots before. New keys and values are rows of the tile of query heads, so that two small products of the tile with
itself give those scores and values, in the layout that the loop wants.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

from typing import Any

import jax
import triton
import triton.language as tl

from pallas_kernels import tuning, whole_attention_triton
from pallas_kernels.decode_attention_triton import kernel_constants as attention_constants
from pallas_kernels.rope_cache_triton import norm_heads, sum_heads
from pallas_kernels.rows import Rows
from pallas_kernels.whole_attention_triton import LOWEST, attend, list_bases, list_of_blocks, merge_warps, store_heads


@triton.jit
def join_halves(first, second):
    """[N, D] from its halves [N, D / 2]."""
    N: tl.constexpr = first.shape[0]
    D: tl.constexpr = 2 * first.shape[1]
    of_first = (tl.arange(0, 2) == 0)[None, :, None]
    return tl.reshape(tl.where(of_first, first[:, None, :], second[:, None, :]), (N, D))


@triton.jit
def prefetch(keys, values, slots, D: tl.constexpr):
    """Ask for the `slots` [BLOCK] of keys and values in the L2 cache, in the lines of 128 bytes that they take up."""
    LINE: tl.constexpr = 128 // (keys.dtype.element_ty.primitive_bitwidth // 8)
    lines = slots[:, None] * D + LINE * tl.arange(0, D // LINE)[None, :]
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [keys + lines], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(asm, "=r,l", [values + lines], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def rope_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    prompt_k_ptr,
    prompt_v_ptr,
    prompt_lengths_ptr,
    k_in_ptr,
    v_in_ptr,
    q_norm_ptr,
    k_norm_ptr,
    bias_ptr,
    slot_ptr,
    layer_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    permuted_ptr,
    scale_log2: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    GENERATIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PERMUTED: tl.constexpr,
    PARTS: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    SLOT_IS_POINTER: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """Programs (tile of GENERATIONS, kv head, question). The caches that go in are those that come out.

    PREFETCHED: blocks of the list that the L2 cache is asked for before the heads are waited for; 0 where inline PTX has no meaning.
    """
    HALF: tl.constexpr = D // 2
    ALL: tl.constexpr = H + 2 * KV
    SHARE: tl.constexpr = H // KV
    TILES: tl.constexpr = (G + GENERATIONS - 1) // GENERATIONS
    K_ROW: tl.constexpr = GENERATIONS * SHARE
    V_ROW: tl.constexpr = K_ROW + GENERATIONS
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    pid = tl.program_id(0)
    tile = pid % TILES
    head = (pid // TILES) % KV
    question = pid // (TILES * KV)

    # The tile's rows: query heads, of each generation together, then the generations' keys, then their values.
    row = tl.arange(0, ROWS)
    is_q = row < K_ROW
    is_k = (row >= K_ROW) & (row < V_ROW)
    is_v = (row >= V_ROW) & (row < V_ROW + GENERATIONS)
    member = tl.where(is_q, row // SHARE, (row - K_ROW) % GENERATIONS)
    exists = (is_q | is_k | is_v) & (tile * GENERATIONS + member < G)
    generation = question * G + tile * GENERATIONS + member  # counted over all questions
    projected = tl.where(is_q, head * SHARE + row % SHARE, tl.where(is_k, H, H + KV) + head)

    depth = tl.arange(0, HALF)[None, :]
    # The question's angles in every row: of one row, they would go through shared memory, which all loads behind would wait for.
    angle = tl.where(exists, question, 0)[:, None] * HALF + depth
    cos = tl.load(cos_ptr + angle, mask=exists[:, None], other=0.0).to(DTYPE).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=exists[:, None], other=0.0).to(DTYPE).to(tl.float32)
    source = qkv_ptr + (generation * ALL + projected)[:, None] * D + depth
    bias = bias_ptr + (layer * ALL + projected)[:, None] * D + depth
    first, second = sum_heads(source, bias, exists[:, None], Q * G * ALL * D, PARTS, BIASED, D, DTYPE)
    # Behind the heads' loads: what depends on these two would be waited for in front of them.
    slot = tl.load(slot_ptr) if SLOT_IS_POINTER else slot_ptr
    prompt_length = tl.load(prompt_lengths_ptr + question)
    if PREFETCHED > 0:
        _, _, _, _, _, place, first_slot = list_of_blocks(
            prompt_length, slot, slot + 1, tile, 0, G, WINDOW, GENERATIONS, BLOCK, 1
        )
        prompt_base, suffix_base = list_bases(layer, question, head, tile, Q, G, KV, P, C, GENERATIONS)
        base = tl.where(place < 0, prompt_base, suffix_base + place * (KV * C)) * D
        last = tl.where(place < 0, prompt_length, slot) - 1
        for block in tl.static_range(PREFETCHED):
            slots = tl.maximum(tl.minimum(first_slot + block * BLOCK + tl.arange(0, BLOCK), last), 0)
            keys = tl.where(place < 0, prompt_k_ptr, k_ptr) + base
            prefetch(keys, tl.where(place < 0, prompt_v_ptr, v_ptr) + base, slots, D)
    turned_first, turned_second = first, second
    if NORMED:
        norm_ptr = tl.where(is_q[:, None], q_norm_ptr, k_norm_ptr) + layer * D + depth
        turned_first, turned_second = norm_heads(first, second, norm_ptr, EPS, D, DTYPE)
    rotates = (row < V_ROW)[:, None]
    first = tl.where(rotates, turned_first * cos - turned_second * sin, first).to(DTYPE)
    second = tl.where(rotates, turned_second * cos + turned_first * sin, second).to(DTYPE)

    position = layer * tl.full((), Q * G * KV * C, tl.int64) + slot
    position += (generation * KV + head) * tl.full((), C, tl.int64)
    target = position[:, None] * D + depth
    tl.store(k_ptr + target, first, mask=(is_k & exists)[:, None])
    tl.store(k_ptr + target + HALF, second, mask=(is_k & exists)[:, None])
    tl.store(v_ptr + target, first, mask=(is_v & exists)[:, None])
    tl.store(v_ptr + target + HALF, second, mask=(is_v & exists)[:, None])

    heads = tl.broadcast_to(join_halves(first, second)[None], (WARPS, ROWS, D))
    in_first_warp = (tl.arange(0, WARPS) == 0)[:, None]
    own_k = row[None, :] == K_ROW + member[:, None]
    own_v = row[None, :] == V_ROW + member[:, None]
    scores = tl.where(own_k[None], tl.dot(heads, tl.permute(heads, (0, 2, 1))), 0.0)
    highest = tl.where(in_first_warp, tl.sum(scores, axis=2) * scale_log2, LOWEST)
    in_first_slot = (tl.arange(0, BLOCK // WARPS) == 0)[None, None, :]
    total = tl.where(in_first_warp[:, :, None] & in_first_slot, tl.full((WARPS, ROWS, 1), 1.0, tl.float32), 0.0)
    acc = tl.dot((in_first_warp[:, :, None] & own_v[None]).to(DTYPE), heads)
    highest, total, acc = attend(
        heads,
        highest,
        total,
        acc,
        prompt_k_ptr,
        prompt_v_ptr,
        k_ptr,
        v_ptr,
        prompt_k_ptr,
        prompt_v_ptr,
        k_ptr,
        v_ptr,
        prompt_length,
        slot,
        slot + 1,
        layer,
        question,
        head,
        tile,
        0,
        scale_log2,
        Q,
        G,
        SHARE,
        KV,
        P,
        C,
        WINDOW,
        False,
        GENERATIONS,
        BLOCK,
        1,
        STAGES,
    )
    _, total, acc = merge_warps(highest, total, acc)
    store_heads(out_ptr, permuted_ptr, generation * H + projected, is_q & exists, total, acc, PERMUTED)


def kernel_constants(
    parts, prompt_k, k, scale: float, window: int | None, config: tuning.AttentionConfig, permuted: bool, **rotation
) -> dict:
    """The kernel's shape and blocks, shared by the GPU launch and the interpreter's tests; `rotation`: EPS, NORMED, BIASED."""
    _, questions, group, kv_heads, _, head_dim = k.shape
    q = jax.ShapeDtypeStruct((questions, group, parts.shape[-1] // head_dim - 2 * kv_heads, head_dim), "bfloat16")
    constants = attention_constants(q, prompt_k, k, scale, window, config, permuted=permuted)
    return {name: constants[name] for name in constants if name not in ("CODED", "SPLITS")} | {
        "PARTS": parts.shape[0],
        **rotation,
    }


def prefetched(config: tuning.AttentionConfig) -> int:
    """Blocks that the loop has asked for when it begins."""
    return max(1, config.stages - 1)


def grid(constants: dict) -> tuple[int]:
    """Those of the attention in one part."""
    return whole_attention_triton.grid(constants | {"SPLITS": 1})


def rope_attention(
    parts,
    cos,
    sin,
    prompt_k,
    prompt_v,
    prompt_lengths,
    k,
    v,
    slot,
    layer,
    scale,
    window,
    norms,
    eps,
    bias,
    dtype,
    config,
    permuted,
) -> tuple[Rows, jax.Array, jax.Array]:
    """Launch the kernel; the arguments are those of `pallas_kernels.rope_attention`, qkv always as partial sums."""
    from pallas_kernels.triton_launch import triton_call

    rotation: dict[str, Any] = dict(EPS=eps, NORMED=norms is not None, BIASED=bias is not None)
    constants = kernel_constants(parts, prompt_k, k, scale, window, config, permuted, **rotation)
    q_norm, k_norm = norms or (cos, cos)  # pointers that the kernel doesn't follow
    result = jax.ShapeDtypeStruct((k.shape[1] * k.shape[2], constants["H"] * constants["D"]), dtype)
    cache = jax.ShapeDtypeStruct(k.shape, k.dtype)
    k, v, out, reordered = triton_call(
        parts,
        cos,
        sin,
        prompt_k,
        prompt_v,
        prompt_lengths,
        k,
        v,
        q_norm,
        k_norm,
        cos if bias is None else bias,
        slot,
        layer,
        kernel=rope_attention_kernel,
        out_shape=[cache, cache, result, result if permuted else jax.ShapeDtypeStruct((16,), dtype)],
        grid=grid(constants),
        num_warps=config.warps,
        num_stages=config.stages,
        input_output_aliases={6: 0, 7: 1},
        DTYPE={"bfloat16": tl.bfloat16, "float16": tl.float16}[dtype.name],
        SLOT_IS_POINTER=isinstance(slot, jax.Array),
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        PREFETCHED=prefetched(config),
        **constants,
    )
    return Rows(out, reordered if permuted else None), k, v
