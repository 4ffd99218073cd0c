"""Measure block sizes of the kernels on this GPU and write pallas_kernels/tuned/<device>.json.

    python scripts/autotune.py [--op int4_matmul|dense_matmul|gated_matmul|decode_attention] [--rows 16 64]
        [--shapes qwen2.5-1.5b llama-3.1-8b] [--output FILE] [--time-limit SECONDS]

One JSON line for every shape: microseconds, GB/s, part of the bytes bound, and what the library takes for 16-bit weights.

Kernels are launched on torch tensors (as the tests do) and replayed from a CUDA graph that walks through a stack of
layers larger than the L2 cache, so the times are those of a decoding loop without its host. Compilation runs in
parallel processes first, into Triton's cache. Every configuration is checked against a plain product before it is timed.
Splits of K leave partial sums that their consumer adds; reading them is charged at 3 TB/s.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only shapes and configurations are JAX's business here

import torch
import triton
import triton.language as tl
from kernel_timing import CACHE_BYTES, compile_all, fastest, partial_sum_us, right_time, sample, summary, tuned_entry
from tune_dense import dense_candidates, dense_compile, tune_dense
from tune_gated import gated_candidates, gated_compile, tune_gated

from pallas_kernels import decode_attention_triton, int4_matmul_triton, tuning
from pallas_kernels.tuning import MMA, MMA_SWAPPED, WGMMA, AttentionConfig, Int4Config

# Output and input widths of the linear layers: (N, K).
SHAPES = {
    "qwen2.5-1.5b": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
    "llama-3.2-3b": [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)],
    "llama-3.1-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
}
# Query heads, kv heads, head_dim.
HEADS = {"qwen2.5-1.5b": (12, 2, 128), "llama-3.2-3b": (24, 8, 128), "llama-3.1-8b": (32, 8, 128)}
GROUP, RANK = 64, 32
GATE_UP = 2  # of a model's SHAPES


def int4_forms(m: int) -> list[tuple]:
    """(product, block_m, block_n, block_k, warps) worth trying for M rows."""
    if m <= 32:
        rows = 16 if m <= 16 else 32
        swapped = itertools.product([MMA_SWAPPED], [rows], (32, 64), (128, 256, 512), (1, 2))
        return [*swapped, (MMA, rows, 64, 256, 4), (MMA, rows, 128, 256, 4), (WGMMA, rows, 64, 256, 4)]
    if m <= 64:
        return [(WGMMA, 64, 64, 256, 4), (WGMMA, 64, 128, 128, 4), (WGMMA, 64, 128, 256, 8)]
    forms = [(WGMMA, 128, 128, 128, 4), (WGMMA, 128, 128, 128, 8), (WGMMA, 128, 64, 256, 4)]
    return forms if m <= 128 else [*forms, (WGMMA, 256, 128, 128, 8), (WGMMA, 256, 64, 128, 4)]


def int4_candidates(m: int, n: int, k: int) -> list[Int4Config]:
    """Configurations that fit the GPU and give it between one and about four waves of warps."""
    found = []
    for (product, bm, bn, bk, warps), stages in itertools.product(int4_forms(m), (2, 3, 4)):
        shared = stages * bm * bk * 2 + (stages - 1) * bn * bk // 2
        # The wgmma form copies the scales of two groups as one word; else a copy of two bytes could not be asynchronous.
        two_byte_copies = product != WGMMA and bn * bk // GROUP < 64 * warps
        if shared > 220_000 or two_byte_copies or k % bk:
            continue
        tiles = triton.cdiv(n, bn) * triton.cdiv(m, bm)
        for split in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16):
            warps_each = tiles * split * warps / 132
            if (split == 1 or split <= k // bk // 2) and 2 <= warps_each <= 32:
                found.append(Int4Config(bm, bn, bk, split, product, warps, stages))
    return found


def int4_inputs(m: int, n: int, k: int) -> dict:
    """A stack of layers larger than the cache, with random nibbles."""
    layers = max(2, min(64, CACHE_BYTES // (n * k // 2)))
    cuda = {"device": "cuda"}
    return {
        "x": torch.randn(m, k, dtype=torch.bfloat16, **cuda),
        "packed": torch.randint(0, 256, (layers, n, k // 2), dtype=torch.uint8, **cuda),
        "scales": (torch.rand(layers, n, k // GROUP, **cuda) * 0.02 + 0.01).bfloat16(),
        "index": torch.arange(layers, dtype=torch.int32, **cuda).repeat_interleave(4).reshape(layers, 4).contiguous(),
        "xa": torch.randn(m, RANK, dtype=torch.bfloat16, **cuda),
        "b": torch.randn(layers, n, RANK, dtype=torch.bfloat16, **cuda) * 0.1,
    }


def int4_constants(m: int, n: int, k: int, config: Int4Config) -> dict:
    """Everything but the tensors."""
    return {
        "B_STACKED": True,
        "LAYER_IS_POINTER": True,
        "PTX": True,
        "DTYPE": tl.bfloat16,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **int4_matmul_triton.kernel_constants(m, n, k, GROUP, RANK, config),
    }


def int4_compile(m: int, n: int, k: int, config: Int4Config) -> None:
    """Fill Triton's cache with one kernel."""
    out = torch.bfloat16 if config.split_k == 1 else torch.float32
    types = [torch.bfloat16, torch.uint8, torch.bfloat16, torch.int32, torch.bfloat16, torch.bfloat16, out]
    int4_matmul_triton.int4_matmul_kernel.warmup(*types, grid=(1,), **int4_constants(m, n, k, config))


def int4_launch(inputs: dict, out, m: int, n: int, k: int, config: Int4Config, layer: int) -> None:
    """One layer's product."""
    int4_matmul_triton.int4_matmul_kernel[int4_matmul_triton.grid(m, n, config)](
        inputs["x"],
        inputs["packed"],
        inputs["scales"],
        inputs["index"][layer],
        inputs["xa"],
        inputs["b"],
        out,
        **int4_constants(m, n, k, config),
    )


def int4_expected(inputs: dict, layer: int, permuted: bool):
    """The product in float32 from the definition of the format."""
    packed, scales, x = inputs["packed"][layer], inputs["scales"][layer].float(), inputs["x"].float()
    n, groups = scales.shape
    halves = packed.reshape(n, groups, -1)
    nibbles = torch.cat([halves & 15, halves >> 4], -1).float() - 8
    weight = (nibbles * scales[..., None]).reshape(n, -1)
    if permuted:  # the wgmma form takes x's columns permuted; undo that for the plain product
        m, k = x.shape
        x = x.reshape(m, k // 16, 2, 4, 2).transpose(2, 3).reshape(m, k)
    return x @ weight.T + inputs["xa"].float() @ inputs["b"][layer].float().T


def tune_int4(m: int, n: int, k: int, candidates: list[Int4Config], report) -> dict | None:
    """The entry of the fastest candidate that is also right, its consumer's reads included."""
    inputs = int4_inputs(m, n, k)
    expected = {permuted: int4_expected(inputs, 1, permuted) for permuted in (False, True)}

    def time_of(config: Int4Config) -> float | str:
        shape, dtype = ((m, n), torch.bfloat16) if config.split_k == 1 else ((config.split_k, m, n), torch.float32)
        out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        launch = partial(int4_launch, inputs, out, m, n, k, config)
        us = right_time(launch, out, expected[config.product == WGMMA], inputs["packed"].shape[0])
        return us + partial_sum_us(m, n, config.split_k) if isinstance(us, float) else us

    return tuned_entry(fastest(candidates, time_of, report, m=m, n=n, k=k), m=m, n=n, k=k)


def attention_candidates(q: int, g: int, heads, prompt: int, suffix: int) -> list[AttentionConfig]:
    """Block sizes and splits that give between one and sixteen programs a multiprocessor."""
    rows, prompts, found = q * g * heads[1], q * heads[1], []
    for block, prompt_rows, suffix_splits, prompt_splits, warps, stages in itertools.product(
        (32, 64, 128), (16, 32), (1, 2, 3, 4, 6, 8, 16), (1, 2, 4), (2, 4), (2, 3, 4)
    ):
        programs = rows * suffix_splits
        if not 132 <= programs <= 16 * 132 or block * stages > 256:
            continue
        if prompt_splits > 1 and prompts * prompt_splits > 2 * 132:
            continue
        found.append(AttentionConfig(block, prompt_rows, suffix_splits, prompt_splits, warps, stages))
    return found + whole_attention_candidates(q, g, heads)


def whole_attention_candidates(q: int, g: int, heads) -> list[AttentionConfig]:
    """Programs that read the prompt too: tiles of at most 32 query rows, two thirds to eight programs a multiprocessor."""
    (h, kv, depth), found = heads, []
    for generations, splits, warps, per_warp, stages in itertools.product(
        (1, 2, 4), (1, 2, 4), (2, 4, 8), (16, 32), (2, 3, 4, 6)
    ):
        programs, rows = q * kv * triton.cdiv(g, generations) * splits, 16 * triton.cdiv(generations * h // kv, 16)
        shared = (stages - 1) * warps * per_warp * depth * 4
        if rows <= 32 and 88 <= programs <= 8 * 132 and shared <= 220_000:
            found.append(AttentionConfig(warps * per_warp, rows, splits, 0, warps, stages, generations))
    return found


def attention_inputs(q: int, g: int, heads, prompt: int, suffix: int) -> dict:
    """Random caches over enough layers to leave the L2."""
    h, kv, depth = heads
    layer_bytes = 4 * depth * kv * (q * prompt + q * g * suffix)
    layers = max(2, min(16, 2 * CACHE_BYTES // layer_bytes))
    half = {"device": "cuda", "dtype": torch.bfloat16}
    return {
        "q": torch.randn(q, g, h, depth, **half),
        "prompt_k": torch.randn(layers, q, kv, prompt, depth, **half),
        "prompt_v": torch.randn(layers, q, kv, prompt, depth, **half),
        "lengths": torch.full((q,), prompt, dtype=torch.int32, device="cuda"),
        "k": torch.randn(layers, q, g, kv, suffix, depth, **half),
        "v": torch.randn(layers, q, g, kv, suffix, depth, **half),
        "length": torch.full((4,), suffix, dtype=torch.int32, device="cuda"),
        "index": torch.arange(layers, dtype=torch.int32, device="cuda").repeat_interleave(4).reshape(layers, 4),
    }


def attention_compile(q: int, g: int, heads, prompt: int, suffix: int, config: AttentionConfig) -> None:
    """Fill Triton's cache with one kernel; shapes are those of `attention_inputs`."""
    h, kv, depth = heads
    like = {"q": (q, g, h, depth), "prompt_k": (1, q, kv, prompt, depth), "k": (1, q, g, kv, suffix, depth)}
    empty = [torch.empty(shape, device="meta") for shape in like.values()]
    half, whole, wide = torch.bfloat16, torch.int32, torch.float32
    outputs = [half if config.prompt_splits + config.suffix_splits == 1 else wide] * 2
    decode_attention_triton.kernel(config).warmup(
        *[half, half, half, whole, half, half, whole, whole],
        *[wide] * 4,  # of a cache without codes: pointers that the kernel doesn't follow
        *outputs,
        grid=(1,),
        LAYER_IS_POINTER=True,
        LENGTH_IS_POINTER=True,
        num_warps=config.warps,
        num_stages=config.stages,
        **decode_attention_triton.kernel_constants(*empty, depth**-0.5, None, config),
    )


def attention_launch(inputs: dict, buffers, config: AttentionConfig, layer: int) -> None:
    """The kernel, and the merge of its parts if there are several, on one layer."""
    stats, values, out = buffers
    rows, splits = stats.shape[:2]
    constants = decode_attention_triton.kernel_constants(
        inputs["q"], inputs["prompt_k"], inputs["k"], inputs["q"].shape[-1] ** -0.5, None, config
    )
    names = ("q", "prompt_k", "prompt_v", "lengths", "k", "v", "length")
    decode_attention_triton.kernel(config)[decode_attention_triton.grid(constants)](
        *(inputs[name] for name in names),
        inputs["index"][layer],
        *(stats,) * 4,
        *((stats, values) if splits > 1 else (out, out)),
        LAYER_IS_POINTER=True,
        LENGTH_IS_POINTER=True,
        num_warps=config.warps,
        num_stages=config.stages,
        **constants,
    )
    if splits > 1:
        sizes = dict(D=values.shape[-1], SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits), PERMUTED=False)
        decode_attention_triton.merge_kernel[(rows,)](stats, values, out, out, num_warps=1, **sizes)


def attention_buffers(inputs: dict, config: AttentionConfig):
    """Outputs that hold NaN."""
    q, g, h, depth = inputs["q"].shape
    splits, cuda = config.prompt_splits + config.suffix_splits, {"device": "cuda"}
    stats = torch.full((q * g * h, splits, 2), float("nan"), **cuda)
    values = torch.full((q * g * h, splits, depth), float("nan"), **cuda)
    return stats, values, torch.full((q * g * h, depth), float("nan"), dtype=torch.bfloat16, **cuda)


def attention_expected(inputs: dict, layer: int):
    """Plain attention in float32."""
    q, g, h, depth = inputs["q"].shape
    kv = inputs["k"].shape[3]
    prompt_k, prompt_v = (inputs[name][layer][:, None].expand(-1, g, -1, -1, -1) for name in ("prompt_k", "prompt_v"))
    keys = torch.cat([prompt_k, inputs["k"][layer]], 3).float().repeat_interleave(h // kv, 2)
    values = torch.cat([prompt_v, inputs["v"][layer]], 3).float().repeat_interleave(h // kv, 2)
    scores = torch.einsum("qghd,qghsd->qghs", inputs["q"].float(), keys) * depth**-0.5
    return torch.einsum("qghs,qghsd->qghd", scores.softmax(-1), values).reshape(q * g * h, depth)


def tune_attention(q: int, g: int, heads, prompt: int, suffix: int, candidates, report):
    """The entry of the fastest candidate that is also right."""
    inputs = attention_inputs(q, g, heads, prompt, suffix)
    expected = attention_expected(inputs, 1)

    def time_of(config: AttentionConfig) -> float | str:
        buffers = attention_buffers(inputs, config)
        launch = partial(attention_launch, inputs, buffers, config)
        return right_time(launch, buffers[2], expected, inputs["k"].shape[0])

    best = fastest(candidates, time_of, report, q=q, g=g, heads=heads, prompt=prompt, suffix=suffix)
    sizes = {"rows": q * g * heads[1], "prompts": q * heads[1], "head_dim": heads[2], "share": heads[0] // heads[1]}
    return tuned_entry(best, **sizes)


@dataclass(frozen=True)
class Op:
    """One kernel's part of the tuning; every function takes a shape's numbers first."""

    shapes: Callable[[argparse.Namespace], list[tuple]]
    candidates: Callable[..., list]
    compile: Callable[..., None]
    """Of a shape and a configuration."""
    tune: Callable[..., dict | None]
    """The entry of the tuned file, of a shape, its candidates and `report`."""
    moved: Callable[..., float]
    """Bytes that are read and written at least."""


def all_products(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(M, N, K) of every linear layer."""
    return [(m, n, k) for name in options.shapes for (n, k) in SHAPES[name] for m in options.rows]


def gate_products(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(M, N, K) of gate and up."""
    return [(m, *SHAPES[name][GATE_UP]) for name in options.shapes for m in options.rows]


def attention_shapes(options: argparse.Namespace) -> list[tuple]:
    """(Q, G, heads, prompt, suffix)."""
    return [(q, 8, HEADS[name], 256, options.suffix) for name in options.shapes for q in (8, 32)]


OPS = {
    "int4_matmul": Op(
        all_products,
        int4_candidates,
        int4_compile,
        tune_int4,
        lambda m, n, k: n * k * (0.5 + 2 / GROUP) + 2 * m * (n + k),
    ),
    "dense_matmul": Op(
        all_products, dense_candidates, dense_compile, tune_dense, lambda m, n, k: 2 * (n * k + m * (n + k))
    ),
    "gated_matmul": Op(
        gate_products, gated_candidates, gated_compile, tune_gated, lambda m, n, k: 2 * (n * k + m * (n // 2 + k))
    ),
    "decode_attention": Op(
        attention_shapes,
        attention_candidates,
        attention_compile,
        tune_attention,
        lambda q, g, heads, prompt, suffix: 4 * heads[1] * heads[2] * q * (prompt + g * suffix),
    ),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--suffix", type=int, default=768, help="suffix slots that decode attention reads")
    parser.add_argument("--candidates", type=int, default=40, help="at most this many configurations a shape")
    parser.add_argument("--output", type=Path, help="default: pallas_kernels/tuned/<device>.json")
    parser.add_argument("--log", type=Path, help="every measurement as JSON lines")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Tune, then write the file; what was not reached before the time limit keeps its previous entries."""
    options = parse(arguments)
    deadline, device = time.time() + options.time_limit, torch.cuda.get_device_name()
    output = options.output or Path(tuning.__file__).parent / "tuned" / tuning.device_file(device)
    log = options.log.open("a") if options.log else sys.stderr
    entries = json.loads(output.read_text()) if output.exists() else {}

    def report(row: dict) -> None:
        print(json.dumps(row), file=log, flush=True)

    def keep(op: str, entry: dict) -> None:
        same = [
            old
            for old in entries.get(op, [])
            if any(old[key] != entry[key] for key in entry if key not in ("config", "us", "library_us"))
            or old["config"].get("product") == tuning.MOSAIC  # autotune_mosaic.py writes those
        ]
        entries[op] = [*same, entry]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(entries, indent=1) + "\n")

    for op in options.op:
        plan = {shape: sample(OPS[op].candidates(*shape), options.candidates) for shape in OPS[op].shapes(options)}
        jobs = [(*shape, config) for shape, configs in plan.items() for config in configs]
        compile_all(OPS[op].compile, jobs, deadline - 30)
        for shape, candidates in plan.items():
            if time.time() < deadline and (entry := OPS[op].tune(*shape, candidates, report)):
                keep(op, entry)
                print(summary(op, entry, OPS[op].moved(*shape)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
