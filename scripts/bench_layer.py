"""Time what a decode step's layer does between two attentions, as one kernel (`pallas_kernels.decode_layer`), and check it.

    PYTHONPATH=.:scripts python scripts/bench_layer.py [--shapes llama-3.1-8b] [--rows 64] [--blocks 128,128,4,1,4,2]

Microseconds of a layer are the kernel's own, read by CUPTI over a chain of layers whose weights do not fit the L2 cache. The partial
sums that each layer leaves must be those of plain products of the same weights within two percent. `--blocks`: tile of weights, block
of K, and the splits of K of out, gate_up, down and qkv; default: the kernel's own.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from bench_kernels import SHAPES
from jax.experimental.mosaic.gpu import profiler
from kernel_timing import BANDWIDTH_BYTES_PER_US

from pallas_kernels import AttentionParts, LayerMatrix, decode_layer, decode_layer_mosaic, tuning
from pallas_kernels.codes import LAYER_CODE
from pallas_kernels.tuning import Int4Config, mosaic_config

CHAIN, GROUP, HEAD, EPS = 4, 64, 128, 1e-5


def layer_shapes(name: str) -> list[tuple[int, int]]:
    """(N, K) in the order of `decode_layer`."""
    qkv, out, gate_up, down = SHAPES[name]
    return [out, gate_up, down, qkv]


def inputs(shapes: list[tuple[int, int]], m: int) -> tuple:
    """Random parts of an attention, residual, norms and, of every layer, matrices whose products have a variance of about 1."""
    keys = iter(jax.random.split(jax.random.key(0), 5 + 2 * CHAIN * len(shapes)))
    heads, width = m * shapes[0][1] // HEAD, shapes[0][0]
    stats = jnp.stack([jax.random.normal(next(keys), (heads, 3)), jax.random.uniform(next(keys), (heads, 3)) + 1], -1)
    parts = AttentionParts(stats, jax.random.normal(next(keys), (heads, 3, HEAD)))
    residual = jax.random.normal(next(keys), (m, width), jnp.bfloat16)
    norms = (1 + 0.1 * jax.random.normal(next(keys), (2, CHAIN, width))).astype(jnp.bfloat16)

    def matrix(n: int, k: int) -> LayerMatrix:
        packed = jax.random.bits(next(keys), (1, n, k), jnp.uint8)
        scales = jax.random.uniform(next(keys), (1, k // GROUP, n), minval=0.5, maxval=1) / (150 * k**0.5)
        return LayerMatrix(packed, scales.astype(jnp.bfloat16))

    matrices = [[matrix(*shape) for shape in shapes] for _ in range(CHAIN)]
    return parts, residual, (norms[0], norms[1]), matrices


def chain(configs: tuple[Int4Config, ...] | None, parts: Any, residual: Any, norms: Any, matrices: Any) -> list[Any]:
    """What each layer leaves for the next one's attention; all attend alike. configs None: plain products."""
    left, counter, programs = [], jnp.zeros((1,), jnp.int32), jax.devices()[0].core_count
    for layer, own in enumerate(matrices):
        how: dict[str, Any] = dict(eps=EPS, activation="silu")
        if configs is None:
            arguments = (parts, residual, norms, own, counter)
            residual, sums, _ = decode_layer(*arguments, layer=layer, implementation="reference", **how)
        else:
            arguments = (parts, residual, norms, layer, counter, own)
            residual, sums, counter = decode_layer_mosaic.decode_layer(
                *arguments, configs=configs, programs=programs, **how
            )
        left.append(sums)
    return left


def measure(shapes: list[tuple[int, int]], m: int, configs: tuple[Int4Config, ...]) -> Iterator[tuple[str, float]]:
    """(name, number) of the result."""
    operands = inputs(shapes, m)
    compiled = jax.jit(lambda *given: chain(configs, *given)).lower(*operands).compile()
    plain = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    wanted = jax.jit(lambda *given: chain(None, *given), compiler_options=plain)(*operands)
    left, timings = profiler.Cupti(finalize=False).measure(compiled, aggregate=False, iterations=5)(*operands)
    errors = [
        float(jnp.linalg.norm(got.sum(0) - want.sum(0)) / jnp.linalg.norm(want))
        for got, want in zip(left, wanted, strict=True)
    ]
    if not max(errors) < 0.02:
        raise SystemExit(f"bench_layer: the kernel's results differ by {max(errors)}")
    yield "us", round(statistics.median(1e3 * ms for run in timings for name, ms in run if "mosaic" in name), 2)
    yield "bytes_us", round(sum(n * k * (1 + 2 / GROUP) for n, k in shapes) / BANDWIDTH_BYTES_PER_US, 2)
    yield "error", round(max(errors), 5)


def main() -> None:
    """Print a JSON line a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[64])
    parser.add_argument("--blocks", nargs="+", default=[None], help="e.g. 128,128,4,1,4,2")
    options = parser.parse_args()
    for name, m, blocks in itertools.product(options.shapes, options.rows, options.blocks):
        shapes = layer_shapes(name)
        configs = tuning.decode_layer_configs(m, tuple(shapes), jax.devices()[0].core_count)
        if blocks is not None:
            block_n, block_k, *splits = map(int, blocks.split(","))
            tile = max(16, tuning.power_of_two(m)), block_n, block_k
            configs = tuple(mosaic_config(*tile, split, code=LAYER_CODE) for split in splits)
        if configs is None:
            raise SystemExit(f"bench_layer: the kernel cannot run {m} rows of {name}")
        result = dict(measure(shapes, m, configs))
        print(json.dumps({"shape": name, "m": m, "blocks": blocks, **result}), flush=True)


if __name__ == "__main__":
    main()
