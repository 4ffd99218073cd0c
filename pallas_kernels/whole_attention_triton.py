"""Decode attention for NVIDIA GPUs (sm_80 and up) whose programs read the prompt themselves, so that little or nothing is merged.

A program takes a few generations of a question and one kv head, as many as their query rows fit one tile of a tensor core,
through one list of blocks: those of the prompt, then those of each generation's suffix, where the rows of the other
generations are masked. All programs run at once and do equal work. Memory gives a prompt up about once, the L2 cache to the
other programs of its question; these start at different places of their lists, so that reads of both kinds mix.

Inside of a program every warp has its own slots of each block and its own online softmax (float32, base 2), so no warp waits
for another one's scores; the softmaxes are merged once, behind the loop. The warps are the batch of a batched product.

With `suffix_splits` > 1 a program takes a part of the list and leaves (max, sum, weighted values) to the merge of
`decode_attention_triton.py`, which launches this kernel. `rope_attention_triton.py` puts rotation and cache write in front of it.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# Triton is optional, and its kernel language is not typed Python.

import triton
import triton.language as tl

from pallas_kernels import tuning

LOWEST = tl.constexpr(-1e30)
"""Start of the running maximum: below every score, and finite, so that rows that have seen nothing yet make no NaN."""


@triton.jit
def list_of_blocks(
    prompt_length,
    length,
    tokens,
    tile,
    split,
    G: tl.constexpr,
    WINDOW: tl.constexpr,
    GENERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """(blocks of a part of a tile's list, first visible slot of the prompt and of a suffix, generations, first list, and the place).

    The place where the part begins is one of the lists of slots, -1 for the prompt, then the tile's generations, and a slot of it.
    """
    TILES: tl.constexpr = (G + GENERATIONS - 1) // GENERATIONS
    prompt_first = tl.maximum(prompt_length + tokens - WINDOW, 0) if WINDOW > 0 else 0
    suffix_first = tl.maximum(tokens - WINDOW, 0) if WINDOW > 0 else 0
    prompt_blocks = tl.maximum(tl.cdiv(prompt_length, BLOCK) - prompt_first // BLOCK, 0)
    suffix_blocks = tl.cdiv(length, BLOCK) - suffix_first // BLOCK
    members = tl.where(suffix_blocks > 0, tl.minimum(GENERATIONS, G - tile * GENERATIONS), 0)
    blocks = prompt_blocks + members * suffix_blocks
    each = tl.cdiv(blocks, SPLITS)
    begin = split * each
    index = (begin + blocks * tile // TILES) % tl.maximum(blocks, 1)
    member = tl.where(index < prompt_blocks, -1, (index - prompt_blocks) // tl.maximum(suffix_blocks, 1))
    of_suffix = suffix_first // BLOCK + index - prompt_blocks - member * suffix_blocks
    slot = BLOCK * tl.where(member < 0, prompt_first // BLOCK + index, of_suffix)
    first_member = tl.where(prompt_blocks > 0, -1, 0)
    return tl.minimum(each, blocks - begin), prompt_first, suffix_first, members, first_member, member, slot


@triton.jit
def list_bases(
    layer,
    question,
    head,
    tile,
    Q: tl.constexpr,
    G: tl.constexpr,
    KV: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    GENERATIONS: tl.constexpr,
):
    """Slots in front of the prompt's in its stack, and in front of the suffix of the tile's first generation in its own."""
    prompt_base = layer * tl.full((), Q * KV * P, tl.int64) + (question * KV + head) * tl.full((), P, tl.int64)
    suffix_base = layer * tl.full((), Q * G * KV * C, tl.int64)
    suffix_base += ((question * G + tile * GENERATIONS) * KV + head) * tl.full((), C, tl.int64)
    return prompt_base, suffix_base


@triton.jit
def attend(
    q,
    highest,
    total,
    acc,
    prompt_k_ptr,
    prompt_v_ptr,
    k_ptr,
    v_ptr,
    prompt_k_scale_ptr,
    prompt_v_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    prompt_length,
    length,
    tokens,
    layer,
    question,
    head,
    tile,
    split,
    scale_log2: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    KV: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    CODED: tl.constexpr,
    GENERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The softmaxes (highest, total, acc) of q [WARPS, ROWS, D], gone on over part `split` of the list of the tile's blocks.

    In use are the prompt's slots < prompt_length and the suffixes' < length; q is of the last of `tokens` tokens behind the prompt.
    """
    WARPS: tl.constexpr = q.shape[0]
    ROWS: tl.constexpr = q.shape[1]
    D: tl.constexpr = q.shape[2]
    SLOTS: tl.constexpr = BLOCK // WARPS
    steps, prompt_first, suffix_first, members, first_member, member, slot = list_of_blocks(
        prompt_length, length, tokens, tile, split, G, WINDOW, GENERATIONS, BLOCK, SPLITS
    )
    prompt_base, suffix_base = list_bases(layer, question, head, tile, Q, G, KV, P, C, GENERATIONS)
    generation = tl.arange(0, ROWS) // SHARE
    slots = tl.arange(0, WARPS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    # Slots and depth times strides would be an addition for every copy; of one range, a copy's place is part of its instruction.
    offsets = tl.reshape(tl.arange(0, BLOCK * D), (WARPS, SLOTS, D))
    offsets = tl.max_contiguous(tl.multiple_of(offsets, [1, 1, D]), [1, 1, D])
    # The place in the list is counted on from block to block, because all loads wait for it and the one warp of a scheduler has
    # nothing else to do: a division there costs more than a product.
    for _ in tl.range(0, steps, num_stages=STAGES):
        of_prompt = member < 0
        end = tl.where(of_prompt, prompt_length, length)
        base = slot + tl.where(of_prompt, prompt_base, suffix_base + member * (KV * C))
        used = slots < end - slot
        keys = tl.where(of_prompt, prompt_k_ptr, k_ptr) + base * D
        values = tl.where(of_prompt, prompt_v_ptr, v_ptr) + base * D
        k = tl.load(keys + offsets, mask=used[:, :, None], other=0.0)
        v = tl.load(values + offsets, mask=used[:, :, None], other=0.0)
        if CODED:
            k = k.to(q.dtype)
            v = v.to(q.dtype)
        scores = tl.dot(q, tl.permute(k, (0, 2, 1)))
        if CODED:
            k_scale = tl.where(of_prompt, prompt_k_scale_ptr, k_scale_ptr) + base
            scores *= tl.load(k_scale + slots, mask=used, other=0.0)[:, None, :]
        seen = used[:, None, :]
        if GENERATIONS > 1:
            seen &= (of_prompt | (generation == member))[None, :, None]
        if WINDOW > 0:
            seen &= (slot + slots >= tl.where(of_prompt, prompt_first, suffix_first))[:, None, :]
        scores = tl.where(seen, scores, float("-inf"))
        highest_now = tl.maximum(highest, tl.max(scores, axis=2) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - highest_now[:, :, None])
        correction = tl.exp2(highest - highest_now)
        total = total * correction[:, :, None] + weights
        if CODED:
            v_scale = tl.where(of_prompt, prompt_v_scale_ptr, v_scale_ptr) + base
            weights *= tl.load(v_scale + slots, mask=used, other=0.0)[:, None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, :, None])
        highest = highest_now
        over = slot + BLOCK >= end
        member = tl.where(over, tl.where(member + 1 == members, first_member, member + 1), member)
        slot = tl.where(over, tl.where(member < 0, prompt_first, suffix_first) // BLOCK * BLOCK, slot + BLOCK)
    return highest, total, acc


@triton.jit
def merge_warps(highest, total, acc):
    """(max, sum, weighted values) of every row over the warps' softmaxes."""
    top = tl.max(highest, axis=0)
    factor = tl.exp2(highest - top[None, :])
    return top, tl.sum(tl.sum(total, axis=2) * factor, axis=0), tl.sum(acc * factor[:, :, None], axis=0)


@triton.jit
def store_heads(out_ptr, permuted_ptr, query, valid, total, acc, PERMUTED: tl.constexpr):
    """The rows `query` of [Q*G*H, D] where `valid`, and if PERMUTED the same with permuted columns."""
    D: tl.constexpr = acc.shape[1]
    N: tl.constexpr = acc.shape[0]
    out = (acc / tl.where(valid, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    target = query[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptr + target, out, mask=valid[:, None])
    if PERMUTED:  # in registers: stores of two columns each cost a microsecond and more
        sixteens = tl.reshape(out, (N, D // 16, 4, 2, 2))
        permuted = tl.reshape(tl.permute(sixteens, (0, 1, 3, 2, 4)), (N, D))
        tl.store(permuted_ptr + target, permuted, mask=valid[:, None])


@triton.jit
def whole_attention_kernel(
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
    first_out_ptr,
    second_out_ptr,
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
    GENERATIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    """Programs (part of the list, tile of GENERATIONS, kv head, question).

    SPLITS = 1: the result [Q*G*H, D] and, if PERMUTED, the same with permuted columns. Else stats float32[Q*G*H, SPLITS, 2]
    and values float32[Q*G*H, SPLITS, D], as the merge reads them.
    """
    SHARE: tl.constexpr = H // KV
    TILES: tl.constexpr = (G + GENERATIONS - 1) // GENERATIONS
    layer = tl.load(layer_ptr) if LAYER_IS_POINTER else layer_ptr
    length = tl.load(length_ptr) if LENGTH_IS_POINTER else length_ptr
    pid = tl.program_id(0)
    split = pid % SPLITS
    tile = (pid // SPLITS) % TILES
    head = (pid // (SPLITS * TILES)) % KV
    question = pid // (SPLITS * TILES * KV)
    prompt_length = tl.load(prompt_lengths_ptr + question)

    row = tl.arange(0, ROWS)
    depth = tl.arange(0, D)
    generation = tile * GENERATIONS + row // SHARE
    valid = (row < GENERATIONS * SHARE) & (generation < G)
    query = (question * G + generation) * H + head * SHARE + row % SHARE
    q = tl.load(q_ptr + query[:, None] * D + depth[None, :], mask=valid[:, None], other=0.0)
    q = tl.broadcast_to(q[None], (WARPS, ROWS, D))

    highest = tl.full((WARPS, ROWS), LOWEST, tl.float32)
    total = tl.zeros((WARPS, ROWS, BLOCK // WARPS), tl.float32)
    acc = tl.zeros((WARPS, ROWS, D), tl.float32)
    highest, total, acc = attend(
        q,
        highest,
        total,
        acc,
        prompt_k_ptr,
        prompt_v_ptr,
        k_ptr,
        v_ptr,
        prompt_k_scale_ptr,
        prompt_v_scale_ptr,
        k_scale_ptr,
        v_scale_ptr,
        prompt_length,
        length,
        length,
        layer,
        question,
        head,
        tile,
        split,
        scale_log2,
        Q,
        G,
        SHARE,
        KV,
        P,
        C,
        WINDOW,
        CODED,
        GENERATIONS,
        BLOCK,
        SPLITS,
        STAGES,
    )
    top, total, acc = merge_warps(highest, total, acc)
    if SPLITS > 1:
        part = query * SPLITS + split
        tl.store(first_out_ptr + part * 2, tl.where(total > 0, top, float("-inf")), mask=valid)
        tl.store(first_out_ptr + part * 2 + 1, total, mask=valid)
        tl.store(second_out_ptr + part[:, None] * D + depth[None, :], acc, mask=(valid & (total > 0))[:, None])
    else:
        store_heads(first_out_ptr, second_out_ptr, query, valid, total, acc, PERMUTED)


def form_constants(share: int, generations: int, config: tuning.AttentionConfig, permuted: bool) -> dict:
    """The blocks of this form; the shape's other constants are those of `decode_attention_triton.kernel_constants`."""
    in_tile, rows = config.tile(share, generations)
    return {
        "GENERATIONS": in_tile,
        "ROWS": rows,
        "BLOCK": config.block_slots,
        "WARPS": config.warps,
        "SPLITS": config.suffix_splits,
        "STAGES": config.stages,
        "PERMUTED": permuted and config.suffix_splits == 1,
    }


def grid(constants: dict) -> tuple[int]:
    """Programs of one question side by side: they share its prompt."""
    tiles = triton.cdiv(constants["G"], constants["GENERATIONS"])
    return (constants["Q"] * constants["KV"] * tiles * constants["SPLITS"],)
