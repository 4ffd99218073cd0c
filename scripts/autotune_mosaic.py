"""Measure the Mosaic GPU form of the int4 product and write its entries beside those of `autotune.py` (which times Triton's forms).

    python scripts/autotune_mosaic.py [--code int4 int8] [--rows 16 64 1024] [--shapes llama-3.1-8b]

Times are the kernel's own, read by CUPTI over a stack of layers that does not fit the L2 cache, of int4 with a LoRA epilogue of rank 32 (8-bit
weights are copies that have the adapter merged in), plus a charge for reading partial sums as `autotune.py` makes it, of 16 bits here. A configuration
must give the float32 product of the same weights within a percent.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from bench_kernels import GROUP, RANK, SHAPES
from jax import lax
from jax.experimental.mosaic.gpu import profiler
from kernel_timing import CACHE_BYTES, PARTIAL_SUM_BYTES_PER_US, PLAIN, summary, tuned_entry

from pallas_kernels import int4_matmul_mosaic, reference, tuning
from pallas_kernels.codes import PER_BYTE
from pallas_kernels.mosaic_product_plan import can_cut
from pallas_kernels.rows import permute_columns
from pallas_kernels.tuning import Int4Config, mosaic_config

PROGRAMS, MOST = 132, 8
"""Multiprocessors of an H200, and candidates of a shape that are measured."""


def candidates(code: str, m: int, n: int, k: int) -> list[Int4Config]:
    """Those that `estimate` finds fastest, of all blocks that registers and shared memory hold and all shares of K."""
    found = {}
    for block_m, block_n, block_k in itertools.product((16, 32, 64, 128, 256), (128, 192, 256), (64, 128, 256, 512)):
        if block_m > max(16, tuning.power_of_two(m)) or block_n // 64 * block_m > 512 or n % block_n:
            continue
        # Rows of 64 bytes come at two thirds of the speed of those of 128 (docs/benchmarks.md), which shows while x has few rows.
        short = block_k < 128 * PER_BYTE[code] and k % (128 * PER_BYTE[code]) == 0
        if (block_k == 64 and block_m < 256) or (short and block_m <= 64):
            continue
        whole = mosaic_config(block_m, block_n, block_k, 1, rank=RANK, code=code)
        tiles, steps = -(-m // block_m) * (n // block_n), k // block_k
        shares = [replace(whole, split_k=split) for split in range(1, 13) if split == 1 or tiles * split <= PROGRAMS]
        if tiles < PROGRAMS:
            even = steps * (PROGRAMS - tiles) / PROGRAMS
            shares += [replace(whole, rest=rest) for rest in {int(even), int(even) - 1, int(0.8 * even)} if rest > 0]
        if block_m >= m:
            cut = [replace(whole, cut=cut) for cut in (8, 16, 32, 64, 128)]
            shares += [config for config in cut if can_cut(config, tiles, steps, PROGRAMS)][:1]
        for config in shares:
            if config.stages >= 2 and config.fits(m, n, k, GROUP):
                found[config] = estimate(code, config, m, n, k)
    return sorted(found, key=found.__getitem__)[:MOST]


def estimate(code: str, config: Int4Config, m: int, n: int, k: int) -> float:
    """About how many microseconds a product takes: a start and an end, and the blocks that a program multiplies or its bytes, whichever is slower."""
    warpgroups, steps = config.block_n // 64, k // config.block_k
    tiles = -(-m // config.block_m) * (n // config.block_n)
    # About 32 cycles for 64 x 16 weights with few rows of x, beside which dequantizing shows; a piece's block has them for each warp group.
    piece = config.block_k / 16 * 32 * 0.0007
    tensor_core = warpgroups * config.block_k / 16 * max(32, config.block_m / 2) * 0.0006
    tensor_core *= {16: 1.1, 32: 1.2, 64: 1.6}.get(config.block_m, 1.14)
    copied = config.block_n * (config.block_k / PER_BYTE[code] + 16) + 2 * config.block_m * config.block_k
    block = max(tensor_core, copied / 60e3)
    if config.rest:
        turns = -(-tiles // (PROGRAMS - tiles))
        blocks = max(steps - config.rest, turns * (config.rest + 0.5))
    elif config.cut:
        blocks = steps * (1 + piece / block)
    else:
        rounds = 1 if config.split_k > 1 else -(-tiles // PROGRAMS)
        blocks = rounds * -(-steps // config.split_k)
    from_memory = n * k * (1 / PER_BYTE[code] + 2 / GROUP) / 4.3e6
    return 2.8 + max(blocks * block, from_memory) + parts_us(m, n, config)


def parts_us(m: int, n: int, config: Int4Config) -> float:
    """What a consumer is charged for reading parts in 16 bits instead of one result."""
    return (config.parts - 1) * 2 * m * n / PARTIAL_SUM_BYTES_PER_US


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), compiler_options=PLAIN)
def inputs(code: str, m: int, n: int, k: int, adapter: bool) -> tuple[tuple, jax.Array]:
    """Random operands of a stack of layers, and the product of the last one."""
    per_byte = PER_BYTE[code]
    layers = max(2, -(-CACHE_BYTES // (n * k // per_byte)))
    keys = jax.random.split(jax.random.key(m + n + k), 5)
    packed = jax.random.bits(keys[0], (layers, n, k // per_byte), jnp.uint8)
    packed = packed.view(jnp.int8) if code == "int8" else packed
    scales = (0.01 * jax.random.uniform(keys[1], (layers, n, k // GROUP), minval=1, maxval=2)).astype(jnp.bfloat16)
    x, xa = jax.random.normal(keys[2], (m, k), jnp.bfloat16), jax.random.normal(keys[3], (1, m, RANK), jnp.bfloat16)
    b = 0.1 * jax.random.normal(keys[4], (layers, n, RANK), jnp.bfloat16)
    float32 = [a.astype(jnp.float32) for a in (x, xa[0], b[-1])]
    weights = reference.dequantize(packed[-1], scales[-1], jnp.float32, code)
    expected = jnp.matmul(float32[0], weights.T, precision="highest")
    if not adapter:
        return (permute_columns(x), packed, scales, None, None), expected
    return (permute_columns(x), packed, scales, xa, b), expected + float32[1] @ float32[2].T


def all_layers(code: str, operands: tuple, config: Int4Config):
    """The compiled program that runs the kernel once a layer, and returns what the last one gave."""

    def run(x, packed, scales, xa, b):
        def one(layer, _=None):
            return int4_matmul_mosaic.partial_sums(x, packed, scales, layer, xa, b, jnp.bfloat16, config, code)

        return lax.fori_loop(1, packed.shape[0], one, one(0))

    return jax.jit(run).lower(*operands).compile()


def measured(program, operands: tuple, expected) -> float | str:
    """Microseconds a kernel, or what is wrong with it."""
    result, timings = profiler.Cupti(finalize=False).measure(program, aggregate=False, iterations=3)(*operands)
    error = float(jnp.linalg.norm(result.astype(jnp.float32).sum(0) - expected) / jnp.linalg.norm(expected))
    if not error < 1e-2:
        return f"wrong by {error}"
    return statistics.median(1e3 * ms for run in timings for name, ms in run if "mosaic" in name)


def tune(code: str, m: int, n: int, k: int) -> dict | None:
    """The entry of the fastest candidate."""
    operands, expected = inputs(code, m, n, k, code == "int4")
    plan, best = candidates(code, m, n, k), None
    with ThreadPoolExecutor(8) as pool:
        for config, program in zip(
            plan, pool.map(lambda config: all_layers(code, operands, config), plan), strict=True
        ):
            result = measured(program, operands, expected)
            print(
                json.dumps({"code": code, "m": m, "n": n, "k": k, "config": vars(config), "result": result}),
                file=sys.stderr,
            )
            if isinstance(result, float):
                us = result + parts_us(m, n, config)
                best = min(best or (us, config), (us, config), key=lambda pair: pair[0])
    return tuned_entry(best, m=m, n=n, k=k)


def identity(entry: dict) -> tuple:
    """What a file has one entry of."""
    return entry["m"], entry["n"], entry["k"], entry["config"]["product"] == tuning.MOSAIC


def main() -> None:
    """Tune, and write the file after every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", nargs="+", default=["int4", "int8"], choices=["int4", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--output", type=Path, help="default: pallas_kernels/tuned/<device>.json")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds")
    options = parser.parse_args()
    start, device = time.time(), jax.devices()[0].device_kind
    output = options.output or Path(tuning.__file__).parent / "tuned" / tuning.device_file(device)
    entries = json.loads(output.read_text()) if output.exists() else {}
    shapes = dict.fromkeys(shape for name in options.shapes for shape in SHAPES[name])
    for code, m, (n, k) in itertools.product(options.code, options.rows, shapes):
        if time.time() - start > options.time_limit or not (entry := tune(code, m, n, k)):
            continue
        op = f"{code}_matmul"
        others = [e for e in entries.get(op, []) if identity(e) != identity(entry)]
        entries[op] = [*others, entry]
        output.write_text(json.dumps(entries, indent=1) + "\n")
        print(summary(op, entry, n * k * (1 / PER_BYTE[code] + 2 / GROUP) + 2 * m * (n + k)), flush=True)


if __name__ == "__main__":
    main()
