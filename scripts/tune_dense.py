"""Configurations of the product with 16-bit weights, and what each takes: a part of `autotune.py`."""

import itertools
from functools import partial

import torch
import triton
from kernel_timing import CACHE_BYTES, fastest, graph_time, partial_sum_us, right_time, tuned_entry

from pallas_kernels import dense_matmul_triton
from pallas_kernels.tuning import DenseConfig

MULTIPROCESSORS = 132
BLOCKS = ((64, 4), (64, 6), (128, 3), (128, 4))
"""(block_k, stages)."""


def dense_forms(m: int) -> list[tuple[int, int, bool, int]]:
    """(block_m, block_n, swapped, warps) worth trying for M rows."""
    if m <= 32:
        rows = 16 if m <= 16 else 32
        return [(rows, 64, True, 4), (rows, 128, True, 4), (rows, 128, True, 8)]
    if m <= 64:
        return [(64, 64, False, 4), (64, 128, False, 4), (64, 64, True, 4), (64, 128, True, 4), (64, 128, True, 8)]
    forms = [(128, 64, False, 4), (128, 128, False, 8), (128, 64, True, 4), (128, 128, True, 8)]
    return forms if m <= 128 else [*forms, (256, 64, True, 4), (256, 128, True, 8), (128, 256, False, 8)]


def dense_candidates(m: int, n: int, k: int) -> list[DenseConfig]:
    """Configurations that fit the GPU and fill it: nearly one or two programs a multiprocessor, or many."""
    found = []
    for (bm, bn, swapped, warps), (bk, stages) in itertools.product(dense_forms(m), BLOCKS):
        if k % bk or 2 * stages * bk * (bm + bn) > 220_000:
            continue
        tiles = triton.cdiv(n, bn) * triton.cdiv(m, bm)
        for split in range(1, min(12, k // bk // 2) + 1):
            waves = tiles * split / MULTIPROCESSORS
            if 0.72 <= waves <= 1 or 1.44 <= waves <= 2 or (split == 1 and waves > 1):
                found.append(DenseConfig(bm, bn, bk, split, swapped, warps, stages))
    return found


def dense_constants(m: int, n: int, k: int, config: DenseConfig) -> dict:
    """Everything but the tensors."""
    constants = dense_matmul_triton.kernel_constants(m, n, k, config)
    return {"LAYER_IS_POINTER": True, "num_warps": config.warps, "num_stages": config.stages, **constants}


def dense_compile(m: int, n: int, k: int, config: DenseConfig) -> None:
    """Fill Triton's cache with one kernel."""
    half, out = torch.bfloat16, torch.bfloat16 if config.split_k == 1 else torch.float32
    dense_matmul_triton.dense_matmul_kernel.warmup(
        half, half, torch.int32, out, grid=(1,), **dense_constants(m, n, k, config)
    )


def dense_time(inputs: dict, config: DenseConfig) -> float | str:
    """Microseconds of one configuration with its consumer's reads, or what is wrong with it."""
    x, weight, index, expected = (inputs[name] for name in ("x", "weight", "index", "expected"))
    (m, k), (layers, n, _) = x.shape, weight.shape
    dtype = torch.bfloat16 if config.split_k == 1 else torch.float32
    out = torch.full((config.split_k, m, n), float("nan"), dtype=dtype, device="cuda")
    constants, grid = dense_constants(m, n, k, config), dense_matmul_triton.grid(m, n, config)

    def launch(layer: int) -> None:
        dense_matmul_triton.dense_matmul_kernel[grid](x, weight, index[layer], out, **constants)

    us = right_time(launch, out, expected, layers)
    return us + partial_sum_us(m, n, config.split_k) if isinstance(us, float) else us


def tune_dense(m: int, n: int, k: int, candidates: list[DenseConfig], report) -> dict | None:
    """The entry of the fastest candidate that is also right, with cuBLAS's time beside it."""
    layers = max(2, min(28, CACHE_BYTES // (2 * n * k)))
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    x, weight = torch.randn(m, k, **half), torch.randn(layers, n, k, **half)
    index = torch.arange(layers, dtype=torch.int32, device="cuda").repeat_interleave(4).reshape(layers, 4).contiguous()
    inputs = {"x": x, "weight": weight, "index": index, "expected": x.float() @ weight[1].float().T}
    out = torch.empty(m, n, **half)
    library = graph_time(lambda layer: torch.mm(x, weight[layer].T, out=out), layers)
    best = fastest(candidates, partial(dense_time, inputs), report, m=m, n=n, k=k)
    return tuned_entry(best, library=library, m=m, n=n, k=k)
