"""Time a layer of a decode step in 8 bits as one kernel (`pallas_kernels.decode_layer`), with its attention or what follows that, and check it.

    PYTHONPATH=.:scripts python scripts/bench_layer.py [--shapes llama-3.1-8b] [--rows 64] [--suffixes 0 256 511] [--splits 4,1,4,2]

Microseconds of a layer are those of its kernels, read by CUPTI over a chain of layers whose weights and caches do not fit the L2 cache. 8
completions a prompt of 256 tokens, with `--suffixes` tokens each: 'one kernel', and an attention of its own in front of the layer's
('apart', and of these 'attention'). Without `--suffixes`, the layer's kernel of rows that have attended. What each layer leaves must be that of
plain products of the same weights within two percent. `--splits`: of K, of out, gate_up, down and qkv; default: the kernel's own.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from bench_kernels import SHAPES
from jax.experimental.mosaic.gpu import profiler
from kernel_timing import BANDWIDTH_BYTES_PER_US

from pallas_kernels import (
    LayerMatrix,
    NewTokens,
    Rows,
    decode_layer,
    decode_layer_mosaic,
    layer_counter,
    rope_attention,
    tuning,
)
from pallas_kernels.rows import permute_columns
from pallas_kernels.tuning import Int4Config

CHAIN, GROUP, HEAD, EPS = 4, 64, 128, 1e-5
GENERATIONS, PROMPT, SUFFIX = 8, 256, 512


def layer_shapes(name: str) -> list[tuple[int, int]]:
    """(N, K) in the order of `decode_layer`."""
    qkv, out, gate_up, down = SHAPES[name]
    return [out, gate_up, down, qkv]


def inputs(shapes: list[tuple[int, int]], m: int) -> tuple:
    """Random residual, norms and, of every layer, matrices whose products have a variance of about 1."""
    keys = iter(jax.random.split(jax.random.key(0), 2 + 2 * CHAIN * len(shapes)))
    width = shapes[0][0]
    residual = jax.random.normal(next(keys), (m, width), jnp.bfloat16)
    norms = (1 + 0.1 * jax.random.normal(next(keys), (2, CHAIN, width))).astype(jnp.bfloat16)

    def matrix(n: int, k: int) -> LayerMatrix:
        packed = jax.random.bits(next(keys), (1, n, k), jnp.uint8)
        scales = jax.random.uniform(next(keys), (1, k // GROUP, n), minval=0.5, maxval=1) / (150 * k**0.5)
        return LayerMatrix(packed, scales.astype(jnp.bfloat16))

    return residual, (norms[0], norms[1]), [[matrix(*shape) for shape in shapes] for _ in range(CHAIN)]


def new_tokens(shapes: list[tuple[int, int]], m: int, parts: int) -> NewTokens:
    """Of random caches."""
    keys = iter(jax.random.split(jax.random.key(1), 6))
    questions, heads = m // GENERATIONS, shapes[0][1] // HEAD
    kv_heads = (shapes[3][0] // HEAD - heads) // 2

    def normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    prompt = [normal(CHAIN, questions, kv_heads, PROMPT, HEAD) for _ in range(2)]
    caches = [normal(CHAIN, questions, GENERATIONS, kv_heads, SUFFIX, HEAD) for _ in range(2)]
    angles = jax.random.uniform(next(keys), (questions, HEAD // 2), maxval=6)
    qkv = normal(parts, questions, GENERATIONS, shapes[3][0], dtype=jnp.float32)
    lengths, slot = jnp.full((questions,), PROMPT, jnp.int32), jnp.asarray(0, jnp.int32)
    return NewTokens(qkv, jnp.cos(angles), jnp.sin(angles), *prompt, lengths, *caches, slot)


def attended_apart(tokens: NewTokens, layer: Any, **how: Any) -> tuple[Rows, jax.Array, jax.Array]:
    """The heads' outputs, and the caches with the new token."""
    out, k, v, _ = rope_attention(**tokens._asdict(), layer=layer, scale=HEAD**-0.5, dtype=jnp.bfloat16, **how)
    return out, k, v


Chain = Callable[..., list[tuple[jax.Array, jax.Array]]]


def chain(configs: tuple[Int4Config, ...], one_kernel: bool) -> Chain:
    """(residual, partial sums of what follows) of each layer; all attend alike, each with its own caches."""
    how: dict[str, Any] = dict(
        configs=configs, programs=jax.devices()[0].core_count, eps=EPS, activation="silu", scale=HEAD**-0.5
    )

    def layers(attended: Any, residual: Any, norms: Any, matrices: Any) -> list[tuple[jax.Array, jax.Array]]:
        left, counter = [], layer_counter()
        for layer, own in enumerate(matrices):
            given = attended
            if isinstance(attended, NewTokens) and not one_kernel:
                rows, k, v = attended_apart(attended, layer, permuted=True)
                given, attended = rows.permuted, attended._replace(k=k, v=v)
            residual, sums, counter, caches = decode_layer_mosaic.decode_layer(
                given, residual, norms, layer, counter, own, **how
            )
            if caches:
                attended = attended._replace(k=caches[0], v=caches[1])
            left.append((residual, sums))
        return left

    return layers


def reference_of(attended_first: bool) -> Callable[..., jax.Array]:
    """The partial sums that a layer leaves, by plain products, compiled for all layers."""
    plain = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    how: dict[str, Any] = dict(eps=EPS, activation="silu", implementation="reference")

    def reference(attended: Any, residual: Any, norms: Any, own: Any, layer: Any) -> jax.Array:
        rows = attended
        if attended_first:
            rows, _, _ = attended_apart(attended, layer, permuted=False, implementation="reference")
        return decode_layer(rows, residual, norms, own, layer_counter(), layer=layer, **how).following.sum(0)

    return jax.jit(reference, compiler_options=plain if jax.default_backend() == "gpu" else None)


def largest_error(
    left: list[tuple], reference: Callable, attended: Any, residual: Any, norms: Any, matrices: Any
) -> float:
    """Of a layer, against plain products that begin with the residual the kernel's layer began with."""
    errors = []
    for layer, own in enumerate(matrices):
        want = reference(attended, residual, norms, own, jnp.asarray(layer))
        residual, sums = left[layer]
        errors.append(float(jnp.linalg.norm(sums.sum(0) - want) / jnp.linalg.norm(want)))
    return max(errors)


class Bench:
    """One shape's chain of layers, with the attention in their kernels or apart."""

    def __init__(self, configs: tuple[Int4Config, ...], attends: bool, one_kernel: bool, operands: tuple) -> None:
        self.compiled = jax.jit(chain(configs, one_kernel)).lower(*operands).compile()
        self.reference = reference_of(attends)

    def measure(self, *operands: Any) -> dict[str, float]:
        """Microseconds of a layer in the layers' kernels and in the attention's own, and the largest error."""
        cupti = profiler.Cupti(finalize=False)
        left, timings = cupti.measure(self.compiled, aggregate=False, iterations=5)(*operands)
        given = [Rows(a) if i == 0 and not isinstance(a, NewTokens) else a for i, a in enumerate(operands)]
        error = largest_error(left, self.reference, *given)
        if not error < 0.02:
            raise SystemExit(f"bench_layer: the kernel's results differ by {error}")

        def median(*parts: str) -> float:
            runs = [[1e3 * ms for name, ms in run if any(part in name for part in parts)] for run in timings]
            return round(sum(map(statistics.median, zip(*runs, strict=True))) / CHAIN, 2)

        return {"layer": median("mosaic"), "attention": median("attention", "rope"), "error": round(error, 5)}


def bench(name: str, m: int, configs: tuple[Int4Config, ...], suffixes: list[int | None]) -> Iterator[dict[str, Any]]:
    """A result for each length."""
    shapes = layer_shapes(name)
    given = inputs(shapes, m)
    weights = round(sum(n * k * (1 + 2 / GROUP) for n, k in shapes) / BANDWIDTH_BYTES_PER_US, 2)
    if suffixes == [None]:
        rows = permute_columns(jax.random.normal(jax.random.key(2), (m, shapes[0][1]), jnp.bfloat16))
        own = Bench(configs, False, True, (rows, *given)).measure(rows, *given)
        yield {"weights_bytes_us": weights, "us": own["layer"], "error": own["error"]}
        return
    tokens = new_tokens(shapes, m, configs[3].split_k)
    one, apart = (Bench(configs, True, one_kernel, (tokens, *given)) for one_kernel in (True, False))
    for suffix in suffixes:
        operands = (tokens._replace(slot=jnp.asarray(suffix, jnp.int32)), *given)
        whole, parts = one.measure(*operands), apart.measure(*operands)
        caches = 4 * HEAD * tokens.k.shape[3] * (m * suffix + m // GENERATIONS * PROMPT)
        yield {
            "suffix": suffix,
            "weights_bytes_us": weights,
            "cache_bytes_us": round(caches / BANDWIDTH_BYTES_PER_US, 2),
            "one_kernel_us": whole["layer"],
            "apart_us": round(parts["layer"] + parts["attention"], 2),
            "attention_us": parts["attention"],
            "error": whole["error"],
        }


def main() -> None:
    """Print a JSON line a shape and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[64])
    parser.add_argument("--suffixes", nargs="+", type=int, default=[None])
    parser.add_argument("--splits", nargs="+", default=[None], help="e.g. 4,1,4,2")
    options = parser.parse_args()
    for name, m, splits in itertools.product(options.shapes, options.rows, options.splits):
        configs = tuning.decode_layer_configs(m, tuple(layer_shapes(name)), jax.devices()[0].core_count)
        if splits is not None:
            rows = max(16, tuning.power_of_two(m))
            configs = tuple(tuning.layer_config(rows, int(split)) for split in splits.split(","))
        if configs is None:
            raise SystemExit(f"bench_layer: the kernel cannot run {m} rows of {name}")
        for result in bench(name, m, configs, options.suffixes):
            print(json.dumps({"shape": name, "m": m, "splits": splits, **result}), flush=True)


if __name__ == "__main__":
    main()
