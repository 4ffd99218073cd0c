"""Decode attention for NVIDIA GPUs (sm_80 and up): flash decoding over a cache whose prompt part is shared by a group.

Bound by the bytes of keys and values. One launch holds two kinds of programs, so that they run side by side:

- prompt programs: the G * H/K query rows of one question and kv head, against a part of that question's prompt, which
  is therefore read once for the whole group;
- suffix programs: the H/K query rows of one generation and kv head (padded to 16, the least a tensor core takes),
  against a part of its own suffix. Slots at `length` and beyond are not read: the parts divide the slots in use.

Each leaves float32 (max, sum, weighted values) in base 2; a second small kernel merges them (Dao et al., Flash-Decoding,
2023). A part with nothing to see leaves max = -inf, and the merge does not read its values.

Where `AttentionConfig.generations` says so, the kernel of `whole_attention_triton.py` is launched instead, which needs no merge.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import tuning, whole_attention_triton
from pallas_kernels.add_rms_norm_triton import permuted_column
from pallas_kernels.rows import Rows

_LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    start,
    end,
    first_visible,
    scale_log2,
    CODED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax of q [ROWS, D] over the slots [start, end) that are >= first_visible; base 2, float32.

    CODED: keys and values are codes, which become values by the scale of their slot.

    Every block holds at least one visible slot, because the caller starts at the block of `first_visible`.
    """
    ROWS: tl.constexpr = q.shape[0]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    slots = tl.arange(0, BLOCK)
    offsets = slots[:, None] * D + tl.arange(0, D)[None, :]
    for slot in tl.range(start, end, BLOCK, num_stages=STAGES):
        used = slot + slots < end
        k = tl.load(k_ptr + slot * D + offsets, mask=used[:, None], other=0.0)
        v = tl.load(v_ptr + slot * D + offsets, mask=used[:, None], other=0.0)
        if CODED:
            k = k.to(q.dtype)
            v = v.to(q.dtype)
        scores = tl.dot(q, tl.trans(k)) * scale_log2
        if CODED:
            scores *= tl.load(k_scale_ptr + slot + slots, mask=used, other=0.0)[None, :]
        scores = tl.where((used & (slot + slots >= first_visible))[None, :], scores, float("-inf"))
        highest_now = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - highest_now[:, None])
        correction = tl.exp2(highest - highest_now)
        total = total * correction + tl.sum(weights, axis=1)
        if CODED:
            weights *= tl.load(v_scale_ptr + slot + slots, mask=used, other=0.0)[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None])
        highest = highest_now
    return highest, total, acc


@triton.jit
def _part(slots_from, slots_to, index, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """[start, end) of part `index` of the slots [slots_from, slots_to), in whole blocks counted from slot 0."""
    first_block = slots_from // BLOCK
    blocks = tl.cdiv(slots_to, BLOCK) - first_block
    per_part = tl.cdiv(tl.maximum(blocks, 0), PARTS)
    start = (first_block + index * per_part) * BLOCK
    return start, tl.minimum(start + per_part * BLOCK, slots_to)


@triton.jit
def _attend_and_store(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots_base,
    stats_ptr,
    values_ptr,
    query,
    valid,
    split,
    start,
    end,
    first_visible,
    scale_log2,
    CODED: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of the query rows `query` (where `valid`) over slots [start, end), into part `split` of the outputs.

    `slots_base` is the number of slots in front of these in the stacks of keys, values and scales.
    """
    depth = tl.arange(0, D)
    q = tl.load(q_ptr + query[:, None] * D + depth[None, :], mask=valid[:, None], other=0.0)
    highest, total, acc = _attend(
        q,
        k_ptr + slots_base * D,
        v_ptr + slots_base * D,
        k_scale_ptr + slots_base,
        v_scale_ptr + slots_base,
        start,
        end,
        first_visible,
        scale_log2,
        CODED,
        D,
        BLOCK,
        STAGES,
    )
    slot = query * SPLITS + split
    tl.store(stats_ptr + slot * 2, highest, mask=valid)
    tl.store(stats_ptr + slot * 2 + 1, total, mask=valid)
    seen = valid & (highest > float("-inf"))
    tl.store(values_ptr + slot[:, None] * D + depth[None, :], acc, mask=seen[:, None])


@triton.jit
def decode_attention_kernel(
    q_ptr,
    prompt_k_ptr,
    prompt_v_ptr,
    prompt_lengths_ptr,
    k_ptr,
    v_ptr,
    length_ptr,
    layer_ptr,
    prompt_k_scale_ptr,
    prompt_v_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    stats_ptr,
    values_ptr,
    scale_log2: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    CODED: tl.constexpr,
    LAYER_IS_POINTER: tl.constexpr,
    LENGTH_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROMPT_SPLITS: tl.constexpr,
    SUFFIX_SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """stats float32[Q*G*H, S, 2] = (max, sum), values float32[Q*G*H, S, D]; S = PROMPT_SPLITS + SUFFIX_SPLITS."""
    SHARE: tl.constexpr = H // KV
    SPLITS: tl.constexpr = PROMPT_SPLITS + SUFFIX_SPLITS
    TILES: tl.constexpr = (G * SHARE + ROWS - 1) // ROWS
    SUFFIX_TILES: tl.constexpr = (SHARE + 15) // 16
    PROMPT_PROGRAMS: tl.constexpr = Q * KV * TILES * PROMPT_SPLITS
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    length = tl.load(length_ptr) if LENGTH_IS_POINTER else length_ptr
    pid = tl.program_id(0)

    if pid < PROMPT_PROGRAMS:
        split = pid % PROMPT_SPLITS
        tile = (pid // PROMPT_SPLITS) % TILES
        head = (pid // (PROMPT_SPLITS * TILES)) % KV
        question = pid // (PROMPT_SPLITS * TILES * KV)
        prompt_length = tl.load(prompt_lengths_ptr + question)
        prompt_row = tile * ROWS + tl.arange(0, ROWS)
        query = (question * G + prompt_row // SHARE) * H + head * SHARE + prompt_row % SHARE
        first_visible = tl.maximum(prompt_length + length - WINDOW, 0) if WINDOW > 0 else 0
        start, end = _part(first_visible, prompt_length, split, PROMPT_SPLITS, BLOCK)
        base = layer * tl.full((), Q * KV * P, tl.int64) + (question * KV + head) * tl.full((), P, tl.int64)
        _attend_and_store(
            q_ptr,
            prompt_k_ptr,
            prompt_v_ptr,
            prompt_k_scale_ptr,
            prompt_v_scale_ptr,
            base,
            stats_ptr,
            values_ptr,
            query,
            prompt_row < G * SHARE,
            split,
            start,
            end,
            first_visible,
            scale_log2,
            CODED,
            SPLITS,
            D,
            BLOCK,
            STAGES,
        )
    else:
        rest = pid - PROMPT_PROGRAMS
        split = rest % SUFFIX_SPLITS
        tile = (rest // SUFFIX_SPLITS) % SUFFIX_TILES
        head = (rest // (SUFFIX_SPLITS * SUFFIX_TILES)) % KV
        generation = rest // (SUFFIX_SPLITS * SUFFIX_TILES * KV)  # counted over all questions
        suffix_row = tile * 16 + tl.arange(0, 16)
        first_visible = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
        start, end = _part(first_visible, length, split, SUFFIX_SPLITS, BLOCK)
        base = layer * tl.full((), Q * G * KV * C, tl.int64)
        base += (generation * KV + head) * tl.full((), C, tl.int64)
        _attend_and_store(
            q_ptr,
            k_ptr,
            v_ptr,
            k_scale_ptr,
            v_scale_ptr,
            base,
            stats_ptr,
            values_ptr,
            generation * H + head * SHARE + suffix_row,
            suffix_row < SHARE,
            PROMPT_SPLITS + split,
            start,
            end,
            first_visible,
            scale_log2,
            CODED,
            SPLITS,
            D,
            BLOCK,
            STAGES,
        )


@triton.jit
def merge_kernel(
    stats_ptr,
    values_ptr,
    out_ptr,
    permuted_ptr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    """out[row] = sum_s 2^(max_s - max) values_s / sum_s 2^(max_s - max) sum_s; one program a row."""
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS_PAD)
    depth = tl.arange(0, D)
    slot = row * SPLITS + split
    highest = tl.load(stats_ptr + slot * 2, mask=split < SPLITS, other=float("-inf"))
    seen = highest > float("-inf")
    total = tl.load(stats_ptr + slot * 2 + 1, mask=seen, other=0.0)
    values = tl.load(values_ptr + slot[:, None] * D + depth[None, :], mask=seen[:, None], other=0.0)
    weights = tl.exp2(highest - tl.max(highest, axis=0))
    out = tl.sum(values * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + depth, out)
    if PERMUTED:
        tl.store(permuted_ptr + row * D + permuted_column(depth), out)


def kernel_constants(
    q,
    prompt_k,
    k,
    scale: float,
    window: int | None,
    config: tuning.AttentionConfig,
    coded: bool = False,
    permuted: bool = False,
) -> dict:
    """The kernel's shape and block parameters, shared by the GPU launch and the interpreter's tests."""
    (questions, generations, heads, head_dim), kv_heads = q.shape, k.shape[3]
    share = heads // kv_heads
    shape = {
        "scale_log2": scale * _LOG2_E,
        "Q": questions,
        "G": generations,
        "H": heads,
        "KV": kv_heads,
        "P": prompt_k.shape[3],
        "C": k.shape[4],
        "D": head_dim,
        "WINDOW": window or 0,
        "CODED": coded,
    }
    if config.generations:
        return shape | whole_attention_triton.form_constants(share, generations, config, permuted)
    return shape | {
        "BLOCK": config.block_slots,
        "STAGES": config.stages,
        "ROWS": min(config.prompt_rows, max(16, triton.next_power_of_2(generations * share))),
        "PROMPT_SPLITS": config.prompt_splits,
        "SUFFIX_SPLITS": config.suffix_splits,
    }


def kernel(config: tuning.AttentionConfig):
    """The kernel of the configuration's form."""
    return whole_attention_triton.whole_attention_kernel if config.generations else decode_attention_kernel


def grid(constants: dict) -> tuple[int]:
    """Prompt programs first: they are the longer ones."""
    if "GENERATIONS" in constants:
        return whole_attention_triton.grid(constants)
    share = constants["H"] // constants["KV"]
    tiles = triton.cdiv(constants["G"] * share, constants["ROWS"])
    prompt_programs = tiles * constants["PROMPT_SPLITS"]
    suffix_programs = constants["G"] * triton.cdiv(share, 16) * constants["SUFFIX_SPLITS"]
    return (constants["Q"] * constants["KV"] * (prompt_programs + suffix_programs),)


def decode_attention(
    q,
    prompt_k,
    prompt_v,
    prompt_lengths,
    k,
    v,
    length,
    layer,
    scale,
    window,
    scales=None,
    permuted: bool = False,
    config: tuning.AttentionConfig | None = None,
) -> Rows:
    """Launch the kernel and, of more than one part, the merge; the arguments are those of `pallas_kernels.decode_attention_rows`."""
    from pallas_kernels.triton_launch import triton_call

    questions, generations, heads, head_dim = q.shape
    kv_heads = k.shape[3]
    sizes = (questions * generations * kv_heads, questions * kv_heads, head_dim, heads // kv_heads)
    config = config or tuning.attention_config(*sizes)
    constants = kernel_constants(q, prompt_k, k, scale, window, config, scales is not None, permuted)
    rows, splits = questions * generations * heads, config.prompt_splits + config.suffix_splits
    result = jax.ShapeDtypeStruct((questions * generations, heads * head_dim), q.dtype)
    results = [result, result if permuted else jax.ShapeDtypeStruct((16,), q.dtype)]
    parts = [
        jax.ShapeDtypeStruct((rows, splits, 2), jnp.float32),
        jax.ShapeDtypeStruct((rows, splits, head_dim), jnp.float32),
    ]
    out = triton_call(
        q,
        prompt_k,
        prompt_v,
        prompt_lengths,
        k,
        v,
        length,
        layer,
        *(scales or (prompt_lengths,) * 4),  # pointers that the kernel doesn't follow
        kernel=kernel(config),
        out_shape=parts if splits > 1 else results,
        grid=grid(constants),
        num_warps=config.warps,
        num_stages=config.stages,
        LAYER_IS_POINTER=isinstance(layer, jax.Array),
        LENGTH_IS_POINTER=isinstance(length, jax.Array),
        **constants,
    )
    if splits > 1:
        out = triton_call(
            *out,
            kernel=merge_kernel,
            out_shape=results,
            grid=(rows,),
            num_warps=1,
            D=head_dim,
            SPLITS=splits,
            SPLITS_PAD=triton.next_power_of_2(splits),
            PERMUTED=permuted,
        )
    return Rows(out[0], out[1] if permuted else None)
