"""Time a layer of a decode step in 8 bits, in one launch of all layers (`pallas_kernels.decode_layers`) or with attentions apart, and check it.

    PYTHONPATH=.:scripts python scripts/bench_layer.py [--shapes llama-3.1-8b] [--rows 64] [--suffixes 0 256 511] [--splits 2,4,1,4]

Microseconds of a layer are those of its kernels, read by CUPTI over a chain of layers whose weights and caches do not fit the L2 cache. 8
completions a prompt of 256 tokens, with `--suffixes` tokens each: 'one launch', and an attention of its own in front of each layer's kernel
('apart', and of these 'attention'). Rows after the last layer must be those of plain products of the same weights within
two percent. `--splits`: of K, of qkv, out, gate_up and down; default: the kernel's own.
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
from kernel_timing import BANDWIDTH_BYTES_PER_US, PLAIN

from pallas_kernels import (
    LayerMatrices,
    LayerMatrix,
    NewTokens,
    Rows,
    decode_layers,
    decode_layers_mosaic,
    layer_counter,
    rope_attention,
    tuning,
)
from pallas_kernels.rows import permute_columns
from pallas_kernels.tuning import Int4Config

CHAIN, GROUP, HEAD, EPS = 4, 64, 128, 1e-5
GENERATIONS, PROMPT, SUFFIX = 8, 256, 512


def inputs(name: str, m: int) -> tuple:
    """New tokens of random caches, residual, rows, norms and matrices whose products have a variance of about 1."""
    shapes = dict(zip(LayerMatrices._fields, SHAPES[name], strict=True))
    keys = iter(jax.random.split(jax.random.key(0), 20))
    width, questions = shapes["out"][0], m // GENERATIONS
    heads = shapes["out"][1] // HEAD
    kv_heads = (shapes["qkv"][0] // HEAD - heads) // 2

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    def matrix(n: int, k: int) -> LayerMatrix:
        packed = jax.random.bits(next(keys), (CHAIN, n, k), jnp.uint8)
        scales = jax.random.uniform(next(keys), (CHAIN, k // GROUP, n), minval=0.5, maxval=1) / (150 * k**0.5)
        return LayerMatrix(packed, scales.astype(jnp.bfloat16))

    prompt = [normal(CHAIN, questions, kv_heads, PROMPT, HEAD) for _ in range(2)]
    caches = [normal(CHAIN, questions, GENERATIONS, kv_heads, SUFFIX, HEAD) for _ in range(2)]
    angles = jax.random.uniform(next(keys), (questions, HEAD // 2), maxval=6)
    lengths, slot = jnp.full((questions,), PROMPT, jnp.int32), jnp.asarray(0, jnp.int32)
    tokens = NewTokens(jnp.cos(angles), jnp.sin(angles), *prompt, lengths, *caches, slot)
    norms = tuple(1 + 0.1 * normal(CHAIN, width) for _ in range(2))
    matrices = LayerMatrices(**{of: matrix(*shape) for of, shape in shapes.items()})
    return tokens, normal(m, width), normal(m, width), norms, matrices


Layers = Callable[..., tuple[jax.Array, ...]]


def one_launch(configs: tuple[Int4Config, ...]) -> Layers:
    """(rows after the last layer, keys, values), all by one kernel."""
    how: dict[str, Any] = dict(configs=configs, programs=jax.devices()[0].core_count)

    def layers(tokens: NewTokens, residual: Any, rows: Any, norms: Any, matrices: Any) -> tuple[jax.Array, ...]:
        rows, caches = decode_layers_mosaic.decode_layers(
            tokens,
            residual,
            permute_columns(rows),
            norms,
            matrices,
            eps=EPS,
            activation="silu",
            scale=HEAD**-0.5,
            **how,
        )
        return rows, *caches

    return layers


def apart(configs: tuple[Int4Config, ...]) -> Layers:
    """The same by a kernel for each layer and attention."""
    how: dict[str, Any] = dict(programs=jax.devices()[0].core_count)
    qkv, *others = configs

    def layers(tokens: NewTokens, residual: Any, rows: Any, norms: Any, matrices: Any) -> tuple[jax.Array, ...]:
        counter = layer_counter()
        left = decode_layers_mosaic.first_qkv(permute_columns(rows), matrices.qkv, config=qkv, **how)
        for layer in range(CHAIN):
            parts = left.reshape(left.shape[0], *tokens.k.shape[1:3], -1)
            attended, k, v, _ = rope_attention(
                parts, **tokens._asdict(), layer=layer, scale=HEAD**-0.5, dtype=jnp.bfloat16, permuted=True
            )
            tokens = tokens._replace(k=k, v=v)
            last = layer == CHAIN - 1
            used, blocks = (matrices[1:], others) if last else ((*matrices[1:], matrices.qkv), [*others, qkv])
            residual, left, counter = decode_layers_mosaic.decode_layer(
                attended.permuted,
                residual,
                norms,
                layer,
                counter,
                used,
                configs=tuple(blocks),
                eps=EPS,
                activation="silu",
                **how,
            )
        return left, tokens.k, tokens.v

    return layers


def reference(tokens: NewTokens, residual: Any, rows: Any, norms: Any, matrices: Any) -> jax.Array:
    """The rows, by plain products."""
    how: dict[str, Any] = dict(eps=EPS, activation="silu", scale=HEAD**-0.5, implementation="reference")
    return decode_layers(tokens, residual, Rows(rows), norms, matrices, **how)[0]


class Bench:
    """One form of a chain of layers."""

    def __init__(self, layers: Layers, operands: tuple) -> None:
        self.compiled = jax.jit(layers).lower(*operands).compile()

    def measure(self, operands: tuple, want: jax.Array) -> dict[str, float]:
        """Microseconds of a layer in the layers' kernels and in the attention's own, and the error of the last rows."""
        cupti = profiler.Cupti(finalize=False)
        (rows, *_), timings = cupti.measure(self.compiled, aggregate=False, iterations=5)(*operands)
        error = float(jnp.linalg.norm(rows - want) / jnp.linalg.norm(want))
        if not error < 0.02:
            raise SystemExit(f"bench_layer: the kernel's results differ by {error}")

        def median(*parts: str) -> float:
            runs = [[1e3 * ms for name, ms in run if any(part in name for part in parts)] for run in timings]
            return round(sum(map(statistics.median, zip(*runs, strict=True))) / CHAIN, 2)

        return {"layer": median("mosaic"), "attention": median("attention", "rope"), "error": round(error, 5)}


def bench(name: str, m: int, configs: tuple[Int4Config, ...], suffixes: list[int]) -> Iterator[dict[str, Any]]:
    """A result for each length."""
    tokens, *others = inputs(name, m)
    forms = [Bench(form(configs), (tokens, *others)) for form in (one_launch, apart)]
    plain = jax.jit(reference, compiler_options=PLAIN)
    for suffix in suffixes:
        operands = (tokens._replace(slot=jnp.asarray(suffix, jnp.int32)), *others)
        whole, parts = (form.measure(operands, plain(*operands)) for form in forms)
        caches = 4 * HEAD * tokens.k.shape[3] * (m * suffix + m // GENERATIONS * PROMPT)
        yield {
            "suffix": suffix,
            "weights_bytes_us": round(
                sum(n * k * (1 + 2 / GROUP) for n, k in SHAPES[name]) / BANDWIDTH_BYTES_PER_US, 2
            ),
            "cache_bytes_us": round(caches / BANDWIDTH_BYTES_PER_US, 2),
            "one_launch_us": whole["layer"],
            "apart_us": round(parts["layer"] + parts["attention"], 2),
            "attention_us": parts["attention"],
            "error": whole["error"],
        }


def main() -> None:
    """Print a JSON line a shape and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[64])
    parser.add_argument("--suffixes", nargs="+", type=int, default=[256])
    parser.add_argument("--splits", nargs="+", default=[None], help="e.g. 2,4,1,4")
    options = parser.parse_args()
    for name, m, splits in itertools.product(options.shapes, options.rows, options.splits):
        configs = tuning.decode_layer_configs(m, tuple(SHAPES[name]), jax.devices()[0].core_count)
        if splits is not None:
            rows = max(16, tuning.power_of_two(m))
            configs = tuple(tuning.layer_config(rows, int(split)) for split in splits.split(","))
        if configs is None:
            raise SystemExit(f"bench_layer: the kernel cannot run {m} rows of {name}")
        for result in bench(name, m, configs, options.suffixes):
            print(json.dumps({"shape": name, "m": m, "splits": splits, **result}), flush=True)


if __name__ == "__main__":
    main()
