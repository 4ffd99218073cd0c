"""Measure block sizes of the kernels on this GPU and write pallas_kernels/tuned/<device>.json.

    python scripts/autotune.py [--op int4_matmul|dense_matmul|gated_matmul|decode_attention] [--rows 16 64]
        [--shapes qwen2.5-1.5b llama-3.1-8b] [--output FILE] [--time-limit SECONDS]

One JSON line for every shape: microseconds, GB/s, part of the bytes bound, and what cuBLAS takes with bf16 weights.

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
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only shapes and configurations are JAX's business here

import torch
import triton
import triton.language as tl
from kernel_timing import CACHE_BYTES, check, compile_all, graph_time, partial_sum_us, sample, summary
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
OPS = ("int4_matmul", "dense_matmul", "gated_matmul", "decode_attention")
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


def tune_int4(m: int, n: int, k: int, candidates: list[Int4Config], report) -> tuple[float, Int4Config] | None:
    """The fastest candidate that is also right."""
    inputs = int4_inputs(m, n, k)
    layers, best = inputs["packed"].shape[0], None
    expected = {permuted: int4_expected(inputs, 1, permuted) for permuted in (False, True)}
    for config in candidates:
        shape, dtype = ((m, n), torch.bfloat16) if config.split_k == 1 else ((config.split_k, m, n), torch.float32)
        out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        launch = lambda layer, config=config, out=out: int4_launch(inputs, out, m, n, k, config, layer)  # noqa: E731
        try:
            launch(1)
        except triton.runtime.errors.OutOfResources as error:
            report({"m": m, "n": n, "k": k, "config": vars(config), "error": str(error)})
            continue
        error = check(out, expected[config.product == WGMMA])
        if not error < 1e-2:
            report({"m": m, "n": n, "k": k, "config": vars(config), "error": f"wrong by {error}"})
            continue
        us = graph_time(launch, layers)
        if not check(out, expected[config.product == WGMMA]) < 1e-2:
            report({"m": m, "n": n, "k": k, "config": vars(config), "error": "wrong under load"})
            continue
        total = us + partial_sum_us(m, n, config.split_k)
        report({"m": m, "n": n, "k": k, "config": vars(config), "us": us, "total": total, "relative_error": error})
        best = min(best, (total, config), key=lambda pair: pair[0]) if best else (total, config)
    return best


def attention_candidates(rows: int, prompts: int) -> list[AttentionConfig]:
    """Block sizes and splits that give between one and sixteen programs a multiprocessor."""
    found = []
    for block, prompt_rows, suffix, prompt, warps, stages in itertools.product(
        (32, 64, 128), (16, 32), (1, 2, 3, 4, 6, 8, 16), (1, 2, 4), (2, 4), (2, 3, 4)
    ):
        programs = rows * suffix
        if not 132 <= programs <= 16 * 132 or block * stages > 256:
            continue
        if prompt > 1 and prompts * prompt > 2 * 132:
            continue
        found.append(AttentionConfig(block, prompt_rows, suffix, prompt, warps, stages))
    # One program for prompt and suffix, and no merge, where that makes enough programs.
    whole = itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 5)) if rows >= 96 else ()
    return found + [AttentionConfig(block, 16, 1, 0, *how) for block, *how in whole if block * how[1] <= 384]


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


def attention_kernel(config: AttentionConfig):
    """The kernel of the configuration."""
    whole = decode_attention_triton.whole_attention_kernel
    return decode_attention_triton.decode_attention_kernel if config.prompt_splits else whole


def attention_compile(q: int, g: int, heads, prompt: int, suffix: int, config: AttentionConfig) -> None:
    """Fill Triton's cache with one kernel; shapes are those of `attention_inputs`."""
    h, kv, depth = heads
    like = {"q": (q, g, h, depth), "prompt_k": (1, q, kv, prompt, depth), "k": (1, q, g, kv, suffix, depth)}
    empty = [torch.empty(shape, device="meta") for shape in like.values()]
    half, whole, wide = torch.bfloat16, torch.int32, torch.float32
    outputs = [wide, wide] if config.prompt_splits else [half, half]
    attention_kernel(config).warmup(
        *[half, half, half, whole, half, half, whole, whole],
        *[wide] * 4,  # of a cache without codes: pointers that the kernel doesn't follow
        *outputs,
        grid=(1,),
        LAYER_IS_POINTER=True,
        LENGTH_IS_POINTER=True,
        num_warps=config.warps,
        num_stages=config.stages,
        **decode_attention_triton.kernel_constants(*empty, depth**-0.5, None, config),
        **({} if config.prompt_splits else {"PERMUTED": False}),
    )


def attention_launch(inputs: dict, buffers, config: AttentionConfig, layer: int) -> None:
    """The kernel, and the merge of its parts, on one layer."""
    stats, values, out = buffers
    constants = decode_attention_triton.kernel_constants(
        inputs["q"], inputs["prompt_k"], inputs["k"], inputs["q"].shape[-1] ** -0.5, None, config
    )
    names = ("q", "prompt_k", "prompt_v", "lengths", "k", "v", "length")
    attention_kernel(config)[decode_attention_triton.grid(constants)](
        *(inputs[name] for name in names),
        inputs["index"][layer],
        *(stats,) * 4,
        *((stats, values) if config.prompt_splits else (out, out)),
        LAYER_IS_POINTER=True,
        LENGTH_IS_POINTER=True,
        num_warps=config.warps,
        num_stages=config.stages,
        **constants,
        **({} if config.prompt_splits else {"PERMUTED": False}),
    )
    if config.prompt_splits:
        rows, splits = stats.shape[:2]
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
    """The fastest candidate that is also right."""
    inputs = attention_inputs(q, g, heads, prompt, suffix)
    expected, best = attention_expected(inputs, 1), None
    shape = {"q": q, "g": g, "heads": heads, "prompt": prompt, "suffix": suffix}
    moved = 4 * heads[1] * heads[2] * q * (prompt + g * suffix)
    for config in candidates:
        buffers = attention_buffers(inputs, config)
        launch = lambda layer, config=config, buffers=buffers: attention_launch(inputs, buffers, config, layer)  # noqa: E731
        try:
            launch(1)
        except triton.runtime.errors.OutOfResources as error:
            report({**shape, "config": vars(config), "error": str(error)})
            continue
        error = check(buffers[2], expected)
        if not error < 1e-2:
            report({**shape, "config": vars(config), "error": f"wrong by {error}"})
            continue
        us = graph_time(launch, inputs["k"].shape[0])
        if not check(buffers[2], expected) < 1e-2:
            report({**shape, "config": vars(config), "error": "wrong under load"})
            continue
        report({**shape, "config": vars(config), "us": us, "tb_per_s": moved / us / 1e6, "relative_error": error})
        best = min(best, (us, config), key=lambda pair: pair[0]) if best else (us, config)
    return best


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
        ]
        entries[op] = [*same, entry]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(entries, indent=1) + "\n")

    if "int4_matmul" in options.op:
        shapes = [(m, n, k) for name in options.shapes for (n, k) in SHAPES[name] for m in options.rows]
        plan = {shape: sample(int4_candidates(*shape), options.candidates) for shape in shapes}
        jobs = [(*shape, config) for shape, configs in plan.items() for config in configs]
        compile_all(int4_compile, jobs, deadline - 30)
        for (m, n, k), candidates in plan.items():
            if time.time() < deadline and (best := tune_int4(m, n, k, candidates, report)):
                entry = {**tuning.as_entry(best[1], m=m, n=n, k=k), "us": round(best[0], 2)}
                keep("int4_matmul", entry)
                print(summary("int4_matmul", entry, n * k * (0.5 + 2 / GROUP) + 2 * m * (n + k)), flush=True)
    if "dense_matmul" in options.op:
        shapes = [(m, n, k) for name in options.shapes for (n, k) in SHAPES[name] for m in options.rows]
        plan = {shape: sample(dense_candidates(*shape), options.candidates) for shape in shapes}
        compile_all(dense_compile, [(*s, config) for s, configs in plan.items() for config in configs], deadline - 30)
        for (m, n, k), candidates in plan.items():
            if time.time() < deadline and (entry := tune_dense(m, n, k, candidates, report)):
                keep("dense_matmul", entry)
                print(summary("dense_matmul", entry, 2 * (n * k + m * (n + k))), flush=True)
    if "gated_matmul" in options.op:
        shapes = [(m, *SHAPES[name][GATE_UP]) for name in options.shapes for m in options.rows]
        plan = {shape: sample(gated_candidates(*shape), options.candidates) for shape in shapes}
        compile_all(gated_compile, [(*s, config) for s, configs in plan.items() for config in configs], deadline - 30)
        for (m, n, k), candidates in plan.items():
            if time.time() < deadline and (entry := tune_gated(m, n, k, candidates, report)):
                keep("gated_matmul", entry)
                print(summary("gated_matmul", entry, 2 * (n * k + m * (n // 2 + k))), flush=True)
    if "decode_attention" in options.op:
        plan = {}
        for name, q in itertools.product(options.shapes, (8, 32)):
            heads = HEADS[name]
            candidates = attention_candidates(q * 8 * heads[1], q * heads[1])
            plan[q, 8, heads, 256, options.suffix] = sample(candidates, options.candidates)
        jobs = [(*shape, config) for shape, configs in plan.items() for config in configs]
        compile_all(attention_compile, jobs, deadline - 30)
        for (q, g, heads, prompt, suffix), candidates in plan.items():
            if time.time() < deadline and (best := tune_attention(q, g, heads, prompt, suffix, candidates, report)):
                sizes = {"rows": q * g * heads[1], "prompts": q * heads[1], "head_dim": heads[2]}
                entry = tuning.as_entry(best[1], **sizes, share=heads[0] // heads[1])
                keep("decode_attention", {**entry, "us": round(best[0], 2)})
                print(f"decode_attention heads={heads} q={q}: {best[0]:.1f} us {best[1]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
