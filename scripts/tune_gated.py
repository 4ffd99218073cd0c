"""Configurations of the product of gate and up with its gate, and what each takes: a part of `autotune.py`."""

import itertools
from functools import partial

import torch
from kernel_timing import CACHE_BYTES, fastest, graph_time, right_time, tuned_entry

from pallas_kernels import gated_activation_triton, gated_matmul_triton, tuning
from pallas_kernels.tuning import GatedConfig

BLOCKS = ((64, 3), (64, 4), (64, 6), (128, 3), (128, 4))
"""(block_k, stages)."""
EXTRA = (8, 16, 32)
"""Columns beside a tile."""
SHARED_BYTES, SUMS_A_THREAD = 220_000, 160
"""Above either nothing runs, or registers spill."""
ACTIVATION = "silu"


def gated_forms(m: int) -> list[tuple[int, int, bool, int]]:
    """(block_m, block_n, swapped, warps) worth trying for M rows."""
    if m <= 32:
        rows = 16 if m <= 16 else 32
        return [(rows, 64, True, 4), (rows, 128, True, 4), (rows, 128, True, 8), (rows, 64, False, 4)]
    block_m = 64 if m <= 64 else 128
    forms = list(itertools.product([block_m], (64, 128), (False, True), (4, 8)))
    return forms if m <= 128 else [*forms, (256, 64, False, 8), (256, 64, True, 8)]


def gated_candidates(m: int, n: int, k: int) -> list[GatedConfig]:
    """Configurations that fit the GPU, with the fewest columns beside a tile that save a round of programs, and with none."""
    found = []
    for (bm, bn, swapped, warps), (bk, stages) in itertools.product(gated_forms(m), BLOCKS):
        rounds = {extra: tuning.gated_rounds(m, n, bm, bn + extra) for extra in (0, *EXTRA)}
        fewer = [extra for extra in EXTRA if rounds[extra] < rounds[0]]
        for extra in (0, *([] if swapped else fewer[:1])):
            columns = 2 * (bn + extra)
            fits = 2 * stages * bk * (bm + columns) <= SHARED_BYTES and bm * columns <= SUMS_A_THREAD * 32 * warps
            if fits and k % bk == 0:
                found.append(GatedConfig(bm, bn, extra, bk, swapped, warps, stages))
    return found


def gated_constants(x, weight, config: GatedConfig) -> dict:
    """Everything but the tensors."""
    constants = gated_matmul_triton.kernel_constants(x, weight, None, ACTIVATION, config)
    return {"LAYER_IS_POINTER": True, "num_warps": config.warps, "num_stages": config.stages, **constants}


def gated_compile(m: int, n: int, k: int, config: GatedConfig) -> None:
    """Fill Triton's cache with one kernel."""
    half, shapes = torch.bfloat16, (torch.empty(m, k, device="meta"), torch.empty(2, n, k, device="meta"))
    gated_matmul_triton.gated_matmul_kernel.warmup(
        half, half, half, torch.int32, half, grid=(1,), **gated_constants(*shapes, config)
    )


def gated_time(inputs: dict, config: GatedConfig) -> float | str:
    """Microseconds of one configuration, or what is wrong with it."""
    x, weight, index, expected = (inputs[name] for name in ("x", "weight", "index", "expected"))
    out = torch.full(expected.shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    constants = gated_constants(x, weight, config)
    grid = gated_matmul_triton.grid(constants)

    def launch(layer: int) -> None:
        gated_matmul_triton.gated_matmul_kernel[grid](x, weight, x, index[layer], out, **constants)

    return right_time(launch, out, expected, weight.shape[0])


def gated_inputs(m: int, n: int, k: int) -> dict:
    """x, a stack of layers larger than the cache, pointers to their indices, and layer 1's result in float32."""
    layers = max(2, min(28, CACHE_BYTES // (2 * n * k)))
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    x, weight = torch.randn(m, k, **half), torch.randn(layers, n, k, **half) * k**-0.5
    index = torch.arange(layers, dtype=torch.int32, device="cuda").repeat_interleave(4).reshape(layers, 4).contiguous()
    gate, up = (x.float() @ weight[1].float().T).chunk(2, dim=1)
    return {"x": x, "weight": weight, "index": index, "expected": torch.nn.functional.silu(gate) * up}


def library_time(x, weight) -> float:
    """Microseconds of cuBLAS's product and then the kernel of the gate."""
    layers, (m, n) = weight.shape[0], (x.shape[0], weight.shape[1])
    both, out = (torch.empty(1, m, width, dtype=x.dtype, device="cuda") for width in (n, n // 2))
    constants = gated_activation_triton.kernel_constants(both, ACTIVATION, None, permuted=False)
    grid, warps = gated_activation_triton.grid(constants), gated_activation_triton.WARPS

    def launch(layer: int) -> None:
        torch.mm(x, weight[layer].T, out=both[0])
        gated_activation_triton.gated_activation_kernel[grid](
            both, both, 0, out, out, LAYER_IS_POINTER=False, num_warps=warps, **constants
        )

    return graph_time(launch, layers)


def tune_gated(m: int, n: int, k: int, candidates: list[GatedConfig], report) -> dict | None:
    """The entry of the fastest candidate that is also right, with the time of cuBLAS and the gate beside it."""
    inputs = gated_inputs(m, n, k)
    library = library_time(inputs["x"], inputs["weight"])
    best = fastest(candidates, partial(gated_time, inputs), report, m=m, n=n, k=k)
    return tuned_entry(best, library=library, m=m, n=n, k=k)
