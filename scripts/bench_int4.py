"""Time the int4 product beside cuBLAS's product of 16-bit weights, each with and without the adapter, and beside dequantizing first.

    PYTHONPATH=.:scripts python scripts/bench_int4.py [--rows 16 64 128 256] [--shapes llama-3.1-8b] [--calls] [--json FILE]

All times are of the kernels themselves, read by CUPTI, over a stack of layers that does not fit the L2 cache, with the blocks that a rollout would
take. The int4 kernel gets x A^T as it does there; cuBLAS's adapter is one more product, of the same x A^T with B, added to the first. A product that
leaves partial sums is charged for who reads them, as in `autotune_mosaic.py`. With --calls, the two branches of the dispatch rule, adapter and all kernels included:
'fused', the public function, which permutes x's columns first, and 'dequantized', the matrix in 16 bits and then the library's product
(XLA's choice without measuring).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from autotune_mosaic import all_layers, inputs, measured, parts_us
from bench_kernels import GROUP, RANK, SHAPES
from jax import lax
from jax.experimental.mosaic.gpu import profiler
from kernel_timing import BANDWIDTH_BYTES_PER_US, CACHE_BYTES, PLAIN

import pallas_kernels
from pallas_kernels import dequantized, dispatch, tuning

FLOP_PER_US = 790e6
CALLS, MOST_CALLS = ("fused", "dequantized"), 24
"""Branches of the dispatch rule, and calls of one that are compiled into a program."""
PASSES, ROUNDS = 5, 3
"""Of cuBLAS's, over all layers, and of the others, each of which is several runs over all layers; the median is taken."""


def cublas(shapes: list[tuple[int, int]], rows: list[int]) -> dict:
    """{(m, n, k): (microseconds without an adapter, and with one)} by PyTorch; in a process of its own, whose CUPTI is not JAX's."""
    import torch

    def kernel_us(product, layers: int) -> float:
        product(0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for layer in list(range(layers)) * PASSES:
                product(layer)
            torch.cuda.synchronize()
        kernels = [event.device_time for event in profile.events() if event.device_time > 0]
        launches = len(kernels) // (layers * PASSES)  # of one product
        return sum(statistics.median(kernels[first::launches]) for first in range(launches))

    times = {}
    for n, k in shapes:
        layers = max(2, CACHE_BYTES // (2 * n * k))
        weights = torch.randn((layers, n, k), dtype=torch.bfloat16, device="cuda")
        b = torch.randn((layers, n, RANK), dtype=torch.bfloat16, device="cuda")
        for m in rows:
            x, xa = (torch.randn((m, width), dtype=torch.bfloat16, device="cuda") for width in (k, RANK))
            out = torch.empty((m, n), dtype=torch.bfloat16, device="cuda")

            def plain(layer: int, x=x, out=out, weights=weights) -> None:
                torch.mm(x, weights[layer].t(), out=out)

            def adapted(layer: int, plain=plain, xa=xa, out=out, b=b) -> None:
                plain(layer)
                out.addmm_(xa, b[layer].t())

            times[m, n, k] = (kernel_us(plain, layers), kernel_us(adapted, layers))
    return times


class Case(NamedTuple):
    """A product to measure: rows of x and the widths of a matrix, with what is compiled for it."""

    m: int
    n: int
    k: int
    config: tuning.Int4Config
    programs: dict
    """By name: what makes operands and the product, and what runs on these, once a layer."""


def compiled(m: int, n: int, k: int, calls: bool) -> Case | None:
    """None where the blocks of these sizes are not Mosaic's."""
    config = tuning.int4_config(m, n, k, GROUP, mosaic=True)
    if config.product != tuning.MOSAIC:
        return None
    programs = {}
    for name, adapter in (("int4", False), ("int4_lora", True)):
        lowered = inputs.lower("int4", m, n, k, adapter)
        operands, _ = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), lowered.out_info)
        make = lowered.compile()
        programs[name] = make, all_layers("int4", operands, config)
    for name, call in (("fused", fused), ("dequantized", dequantized.matmul)) if calls else ():
        programs[name] = make, jax.jit(partial(all_calls, call), compiler_options=PLAIN).lower(*operands).compile()
    return Case(m, n, k, config, programs)


def fused(x, packed, scales, layer, xa, b, out_dtype) -> jax.Array:
    """The public function."""
    how = dict(layer=layer, xa=xa, lora_b=b, out_dtype=out_dtype, implementation=dispatch.TRITON)
    return pallas_kernels.int4_matmul(x, packed, scales, **how)


def all_calls(call, x, packed, scales, xa, b) -> list:
    """One of each layer, or of as many as `MOST_CALLS`."""
    outs = []
    for layer in range(min(packed.shape[0], MOST_CALLS)):
        out = call(x, packed, scales, layer, xa[0], b[layer], x.dtype)
        x, out = lax.optimization_barrier((x, out))
        outs.append(out[0, 0])
    return outs


def times_of(case: Case) -> dict[str, float]:
    """Microseconds by name, the median of some rounds, in which the programs take turns: what ran before decides the clock.

    Raises:
      SystemExit: a product is wrong.
    """
    given = {name: make() for name, (make, _) in case.programs.items()}
    rounds = [{name: time_of(case, name, *given[name]) for name in given} for _ in range(ROUNDS)]
    return {name: statistics.median(times[name] for times in rounds) for name in given}


def time_of(case: Case, name: str, operands: tuple, expected: jax.Array) -> float:
    """Microseconds of one of the programs."""
    _, program = case.programs[name]
    if name in CALLS:
        _, runs = profiler.Cupti(finalize=False).measure(program, iterations=3)(*operands)
        return statistics.median(1e3 * ms for ms in runs) / min(operands[1].shape[0], MOST_CALLS)
    us = measured(program, operands, expected)
    if not isinstance(us, float):
        sys.exit(f"{case.m} rows of {case.k} x {case.n}, {case.config}: {us}")
    return us + parts_us(case.m, case.n, case.config)


def bound_us(m: int, n: int, k: int) -> float:
    """The larger of bytes / 4.3 TB/s and operations / 790 TFLOP/s, without an adapter."""
    moved = n * k * (1 / 2 + 2 / GROUP) + 2 * m * (n + k)
    return max(moved / BANDWIDTH_BYTES_PER_US, 2 * m * n * k / FLOP_PER_US)


def table(rows: list[dict]) -> str:
    """The measurements as aligned text; percentages are of cuBLAS's time, with the adapter in both or in neither."""
    lines = [
        f"{'K':>6} {'N':>6} {'M':>5} {'bound':>7} {'int4':>7} {'cuBLAS':>7} {'':>5} {'+ LoRA':>7} {'cuBLAS + LoRA':>14} {'':>5} {'fused':>7} {'dequantized':>11}"
    ]
    for row in rows:
        calls = " ".join(f"{row[name]:{width}.1f}" for name, width in zip(CALLS, (7, 11), strict=True) if name in row)
        shares = row["int4"] / row["cublas"], row["int4_lora"] / row["cublas_lora"]
        lines.append(
            f"{row['k']:6} {row['n']:6} {row['m']:5} {row['bound']:7.1f} {row['int4']:7.1f} {row['cublas']:7.1f} {shares[0]:5.0%} "
            f"{row['int4_lora']:7.1f} {row['cublas_lora']:14.1f} {shares[1]:5.0%} {calls}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 128, 256])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--calls", action="store_true", help="time both branches of the dispatch rule too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if problem := dispatch.mosaic_problem(dispatch.current_device(), jax.numpy.bfloat16, jax.numpy.bfloat16, GROUP):
        parser.error(f"the kernel cannot run here: {problem}")
    shapes, rows = list(dict.fromkeys(shape for name in options.shapes for shape in SHAPES[name])), []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        library = pool.submit(cublas, shapes, options.rows).result()
    sizes = [(m, n, k) for n, k in shapes for m in options.rows]
    with ThreadPoolExecutor(8) as pool:
        for case in pool.map(lambda size: compiled(*size, options.calls), sizes):
            if case is None:
                continue
            m, n, k, config, _ = case
            times = times_of(case) | dict(zip(("cublas", "cublas_lora"), library[m, n, k], strict=True))
            row = {"op": "int4_matmul", "m": m, "n": n, "k": k, "bound": bound_us(m, n, k)} | times
            rows.append(row)
            rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}
            line = json.dumps(rounded | {"config": vars(config)})
            print(line, flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(line + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
