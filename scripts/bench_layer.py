"""Time what a decode step's layer does between two attentions, as one kernel (`pallas_kernels.decode_layer`), and check it.

    PYTHONPATH=.:scripts python scripts/bench_layer.py [--shapes llama-3.1-8b] [--rows 64] [--parts 0 3] [--splits 4,1,4,2]

Microseconds of a layer are the kernel's own, read by CUPTI over a chain of layers whose weights do not fit the L2 cache. The partial
sums that each layer leaves must be those of plain products of the same weights within two percent. `--parts`: of the attention, which the
kernel merges first; 0: its rows are merged. `--splits`: of K, of out, gate_up, down and qkv; default: the kernel's own.
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

from pallas_kernels import AttentionParts, LayerMatrix, Rows, decode_layer, decode_layer_mosaic, tuning
from pallas_kernels.rows import permute_columns
from pallas_kernels.tuning import Int4Config

CHAIN, GROUP, HEAD, EPS = 4, 64, 128, 1e-5


def layer_shapes(name: str) -> list[tuple[int, int]]:
    """(N, K) in the order of `decode_layer`."""
    qkv, out, gate_up, down = SHAPES[name]
    return [out, gate_up, down, qkv]


def inputs(shapes: list[tuple[int, int]], m: int, parts: int = 0) -> tuple:
    """Random rows or parts of an attention, residual, norms and, of every layer, matrices whose products have a variance of about 1."""
    keys = iter(jax.random.split(jax.random.key(0), 6 + 2 * CHAIN * len(shapes)))
    heads, width = m * shapes[0][1] // HEAD, shapes[0][0]
    size = (heads, max(1, parts))
    stats = jnp.stack([jax.random.normal(next(keys), size), jax.random.uniform(next(keys), size) + 1], -1)
    attended = AttentionParts(stats, jax.random.normal(next(keys), (*size, HEAD)))
    rows = Rows(jax.random.normal(next(keys), (m, shapes[0][1]), jnp.bfloat16))
    residual = jax.random.normal(next(keys), (m, width), jnp.bfloat16)
    norms = (1 + 0.1 * jax.random.normal(next(keys), (2, CHAIN, width))).astype(jnp.bfloat16)

    def matrix(n: int, k: int) -> LayerMatrix:
        packed = jax.random.bits(next(keys), (1, n, k), jnp.uint8)
        scales = jax.random.uniform(next(keys), (1, k // GROUP, n), minval=0.5, maxval=1) / (150 * k**0.5)
        return LayerMatrix(packed, scales.astype(jnp.bfloat16))

    matrices = [[matrix(*shape) for shape in shapes] for _ in range(CHAIN)]
    return attended if parts else rows, residual, (norms[0], norms[1]), matrices


def chain(configs: tuple[Int4Config, ...], attended: Any, residual: Any, norms: Any, matrices: Any) -> list[tuple]:
    """(residual, what the next layer's attention gets) of each layer; all attend alike."""
    left, counter, programs = [], jnp.zeros((1,), jnp.int32), jax.devices()[0].core_count
    given = permute_columns(attended.plain) if isinstance(attended, Rows) else attended
    for layer, own in enumerate(matrices):
        arguments = (given, residual, norms, layer, counter, own)
        how: dict[str, Any] = dict(configs=configs, programs=programs, eps=EPS, activation="silu")
        residual, sums, counter = decode_layer_mosaic.decode_layer(*arguments, **how)
        left.append((residual, sums))
    return left


def largest_error(left: list[tuple], attended: Any, residual: Any, norms: Any, matrices: Any) -> float:
    """Of a layer, against plain products that begin with the residual the kernel's layer began with."""
    plain = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    how: dict[str, Any] = dict(eps=EPS, activation="silu", implementation="reference")
    reference = jax.jit(
        lambda residual, own, layer: decode_layer(
            attended, residual, norms, own, jnp.zeros((1,), jnp.int32), layer=layer, **how
        )[1],
        compiler_options=plain if jax.default_backend() == "gpu" else None,
    )
    errors = []
    for layer, own in enumerate(matrices):
        want = reference(residual, own, layer).sum(0)
        residual, sums = left[layer]
        errors.append(float(jnp.linalg.norm(sums.sum(0) - want) / jnp.linalg.norm(want)))
    return max(errors)


def measure(
    shapes: list[tuple[int, int]], m: int, parts: int, configs: tuple[Int4Config, ...]
) -> Iterator[tuple[str, float]]:
    """(name, number) of the result."""
    operands = inputs(shapes, m, parts)
    compiled = jax.jit(lambda *given: chain(configs, *given)).lower(*operands).compile()
    left, timings = profiler.Cupti(finalize=False).measure(compiled, aggregate=False, iterations=5)(*operands)
    error = largest_error(left, *operands)
    if not error < 0.02:
        raise SystemExit(f"bench_layer: the kernel's results differ by {error}")
    yield "us", round(statistics.median(1e3 * ms for run in timings for name, ms in run if "mosaic" in name), 2)
    yield "bytes_us", round(sum(n * k * (1 + 2 / GROUP) for n, k in shapes) / BANDWIDTH_BYTES_PER_US, 2)
    yield "error", round(error, 5)


def main() -> None:
    """Print a JSON line a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[64])
    parser.add_argument("--parts", nargs="+", type=int, default=[0])
    parser.add_argument("--splits", nargs="+", default=[None], help="e.g. 4,1,4,2")
    options = parser.parse_args()
    choices = itertools.product(options.shapes, options.rows, options.parts, options.splits)
    for name, m, parts, splits in choices:
        shapes = layer_shapes(name)
        configs = tuning.decode_layer_configs(m, tuple(shapes), jax.devices()[0].core_count)
        if splits is not None:
            rows = max(16, tuning.power_of_two(m))
            configs = tuple(tuning.layer_config(rows, int(split)) for split in splits.split(","))
        if configs is None:
            raise SystemExit(f"bench_layer: the kernel cannot run {m} rows of {name}")
        result = dict(measure(shapes, m, parts, configs))
        print(json.dumps({"shape": name, "m": m, "parts": parts, "splits": splits, **result}), flush=True)


if __name__ == "__main__":
    main()
