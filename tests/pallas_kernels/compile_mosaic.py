"""Compile the Mosaic GPU kernels for an H200 that isn't there: `python -m tests.pallas_kernels.compile_mosaic`.

Prints a line of JSON a kernel, with what ptxas says of it and the bytes of its code. Run apart from the tests, because it needs the packages of the GPU extra
and a process of which XLA keeps what ptxas says.
"""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import LayerMatrix, NewTokens, decode_layers_mosaic, int4_matmul_mosaic, tuning
from pallas_kernels.codes import PER_BYTE
from tests.rollout.gpu_program import h200

GROUP, LAYERS, N, K, RANK, MULTIPROCESSORS = 64, 2, 6144, 2048, 128, 132
DTYPES = {"int4": jnp.uint8, "int8": jnp.int8}


def configurations() -> Iterator[tuple[str, tuning.Int4Config]]:
    """(code, blocks) of the heuristic and of the measurements on an H200; of K's shares only their kind matters."""
    found = {("int4", tuning.mosaic_heuristic(m, n, K)) for m in (16, 32, 64, 128, 256) for n in (128, N)}
    found |= {("int8", tuning.mosaic_heuristic(m, n, K, code="int8")) for m in (16, 64, 128, 256) for n in (128, N)}
    for code in DTYPES:
        entries = tuning.tuned("NVIDIA H200").get(f"{code}_matmul", [])
        configs = [tuning.Int4Config(**entry["config"]) for entry in entries]
        found |= {(code, config) for config in configs if config.product == tuning.MOSAIC}
    tiles = {(code, min(c.rest, 1), c.cut, c.block_m, c.block_n, c.block_k, min(c.split_k, 2)) for code, c in found}
    for code, rest, cut, *blocks in sorted(tiles):
        yield code, replace(tuning.mosaic_config(*blocks, code=code), rest=rest, cut=cut)


def layers() -> Iterator[tuple[tuple, tuple[tuning.Int4Config, ...], int]]:
    """((N, K) of the matrices, blocks, heads' width) of whole layers, also of fewer rows."""
    wide = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    narrow = ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960))
    for m, shapes, depth in [(16, wide, 128), (32, wide, 128), (32, wide, 64), (64, wide, 128), (64, narrow, 128)]:
        configs = tuning.decode_layer_configs(m, shapes, MULTIPROCESSORS)
        assert configs is not None
        yield shapes, configs, depth


def compiled_layers(
    shapes: tuple, configs: tuple[tuning.Int4Config, ...], depth: int, apart: str, sharding
) -> dict[str, Any]:
    """The kernel of all layers for a tile of rows, eight completions a question; or of one ("one", "last") whose attention is apart."""
    (qkv, width), (_, heads), *_ = shapes
    m, kv_heads = configs[0].block_m, (qkv - heads) // depth // 2
    questions = m // 8

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    prompt = array((LAYERS, questions, kv_heads, 256, depth))
    suffix = array((LAYERS, questions, 8, kv_heads, 512, depth))
    tables = [array((questions, depth // 2), jnp.float32)] * 2
    lengths, slot = array((questions,), jnp.int32), array((), jnp.int32)
    own_norms, bias = (array((LAYERS, depth)),) * 2, array((LAYERS, qkv))
    tokens = NewTokens(*tables, prompt, prompt, lengths, suffix, suffix, slot, own_norms, bias)
    matrices = tuple(LayerMatrix(array((LAYERS, n, k), jnp.uint8), array((LAYERS, k // GROUP, n))) for n, k in shapes)
    rows, norms = array((m, width)), (array((LAYERS, width)),) * 2
    how: dict[str, Any] = dict(programs=MULTIPROCESSORS, eps=1e-6, activation="silu")
    if apart:
        of_layer = (array((m, heads)), rows, norms, array((), jnp.int32), array((2,), jnp.int32))
        used, of_used = (of[1:] if apart == "last" else (*of[1:], of[0]) for of in (matrices, configs))
        return compiled(partial(decode_layers_mosaic.decode_layer, configs=of_used, **how), *of_layer, used)
    how |= dict(configs=configs, scale=0.1)
    return compiled(partial(decode_layers_mosaic.decode_layers, **how), tokens, rows, rows, norms, matrices)


def compiled(function, *operands) -> dict[str, Any]:
    """What ptxas says of the one kernel, and the bytes of its code: the last instruction's address and its 16."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_DUMP_TO": folder}
        jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compile()
        (said,), (code,) = Path(folder).glob("*.ptxas"), Path(folder).glob("*.sass*")
        addresses = re.findall(r"^[^/]*/\*([0-9a-f]{4,})\*/", code.read_text(), flags=re.M)
        return {"ptxas": said.read_text(), "bytes": int(addresses[-1], 16) + 16}


def compiled_product(code: str, config: tuning.Int4Config, rank: int, sharding, extra_rows: int = 0) -> dict[str, Any]:
    """The kernel for one whole tile of rows and so many more, and an adapter of that rank."""
    # With pieces, a few tiles more than programs.
    m, n = config.block_m + extra_rows, N if not config.cut else (MULTIPROCESSORS + 8) * config.block_n
    shapes = {
        "x": ((m, K), jnp.bfloat16),
        "packed": ((LAYERS, n, K // PER_BYTE[code]), DTYPES[code]),
        "scales": ((LAYERS, n, K // GROUP), jnp.bfloat16),
        "layer": ((), jnp.int32),
    }
    if rank:
        shapes |= {"xa": ((2, m, rank), jnp.float32), "lora_b": ((LAYERS, n, rank), jnp.bfloat16)}
    operands = {name: jax.ShapeDtypeStruct(*of, sharding=sharding) for name, of in shapes.items()}

    def product(x, packed, scales, layer, xa=None, lora_b=None):
        return int4_matmul_mosaic.partial_sums(
            x, packed, scales, layer, xa, lora_b, jnp.bfloat16, config, code, programs=MULTIPROCESSORS
        )

    return compiled(product, *operands.values())


def main() -> None:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask for its version
    jax.config.update("jax_enable_compilation_cache", False)  # ptxas says nothing of a program from there
    sharding = h200()
    for code, config in configurations():
        for rank in (0, RANK):
            kernel = compiled_product(code, config, rank, sharding)
            print(json.dumps({"code": code, "rank": rank, **asdict(config), **kernel}))
    for blocks in ((64, 128, 256, 1), (128, 256, 128, 1), (128, 192, 128, 2), (256, 128, 64, 1)):
        config = tuning.mosaic_config(*blocks)
        kernel = compiled_product("int4", config, RANK, sharding, extra_rows=8)
        print(json.dumps({"code": "int4", "rank": RANK, "extra_rows": 8, **asdict(config), **kernel}))
    for (shapes, configs, depth), apart in itertools.product(layers(), ("", "one", "last")):
        kernel = compiled_layers(shapes, configs, depth, apart, sharding)
        print(json.dumps({"code": "fast8", "layer": shapes, "apart": apart, **asdict(configs[0]), **kernel}))


if __name__ == "__main__":
    main()
