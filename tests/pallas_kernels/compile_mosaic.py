"""Compile the Mosaic GPU kernels for an H200 that isn't there: `python -m tests.pallas_kernels.compile_mosaic`.

Prints a line of JSON a kernel, with what ptxas says of it. Run apart from the tests, because it needs the packages of the GPU extra
and a process of which XLA keeps what ptxas says.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import LayerMatrix, NewTokens, decode_layer_mosaic, int4_matmul_mosaic, tuning
from pallas_kernels.codes import PER_BYTE
from tests.rollout.gpu_program import h200

GROUP, LAYERS, N, K, RANK, MULTIPROCESSORS, KV_HEADS = 64, 2, 2048, 2048, 128, 132, 2
DTYPES = {"int4": jnp.uint8, "int8": jnp.int8}


def configurations() -> Iterator[tuple[str, tuning.Int4Config]]:
    """(code, blocks) of the heuristic and of the measurements on an H200; of K's splits only whether there are any matters."""
    found = {("int4", tuning.mosaic_heuristic(m, n, K)) for m in (16, 32, 64, 128, 256) for n in (128, N)}
    found |= {("int8", tuning.mosaic_heuristic(m, n, K, code="int8")) for m in (16, 64, 128, 256) for n in (128, N)}
    for code in DTYPES:
        entries = tuning.tuned("NVIDIA H200").get(f"{code}_matmul", [])
        configs = [tuning.Int4Config(**entry["config"]) for entry in entries]
        found |= {(code, config) for config in configs if config.product == tuning.MOSAIC}
    tiles = {(code, c.block_m, c.block_n, c.block_k, min(c.split_k, 2)) for code, c in found}
    for code, *blocks in sorted(tiles):
        yield code, tuning.mosaic_config(*blocks, code=code)


def layers() -> Iterator[tuple[tuple, tuple[tuning.Int4Config, ...]]]:
    """((N, K) of the matrices, blocks) of whole layers, also of fewer rows, and of a last one."""
    wide = ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096))
    narrow = ((1536, 1536), (17920, 1536), (1536, 8960), (2048, 1536))
    for m, shapes in [(16, wide), (32, wide), (64, wide), (64, wide[:3]), (64, narrow)]:
        configs = tuning.decode_layer_configs(m, shapes, MULTIPROCESSORS)
        assert configs is not None
        yield shapes, configs


def layer_said_by_ptxas(shapes: tuple, configs: tuple[tuning.Int4Config, ...], sharding) -> str:
    """Of a layer's kernel for a tile of rows, which begins with an attention of eight completions a question and heads of 128."""
    m, width, heads = configs[0].block_m, shapes[0][0], shapes[0][1] // 128
    questions, qkv = m // 8, (heads + 2 * KV_HEADS) * 128

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    prompt = array((LAYERS, questions, KV_HEADS, 256, 128), jnp.bfloat16)
    suffix = array((LAYERS, questions, 8, KV_HEADS, 512, 128), jnp.bfloat16)
    tables = [array((questions, 64), jnp.float32)] * 2
    lengths, slot = array((questions,), jnp.int32), array((), jnp.int32)
    sums, bias = array((2, questions, 8, qkv), jnp.float32), array((LAYERS, qkv), jnp.bfloat16)
    own_norms = (array((LAYERS, 128), jnp.bfloat16),) * 2
    tokens = NewTokens(sums, *tables, prompt, prompt, lengths, suffix, suffix, slot, own_norms, bias)
    matrices = [LayerMatrix(array((1, n, k), jnp.uint8), array((1, k // GROUP, n), jnp.bfloat16)) for n, k in shapes]
    norms = (array((LAYERS, width), jnp.bfloat16),) * 2
    operands = (tokens, array((m, width), jnp.bfloat16), norms, array((), jnp.int32), array((2,), jnp.int32), matrices)

    def layer(*operands):
        how = dict(configs=configs, programs=MULTIPROCESSORS, eps=1e-6, activation="silu", scale=0.1)
        return decode_layer_mosaic.decode_layer(*operands, **how)

    return what_ptxas_says(layer, *operands)


def what_ptxas_says(function, *operands) -> str:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
        jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compile()
        (file,) = Path(folder).glob("*.ptxas")
        return file.read_text()


def said_by_ptxas(code: str, config: tuning.Int4Config, rank: int, sharding) -> str:
    """Of the kernel for one whole tile of rows and an adapter of that rank."""
    m = config.block_m
    shapes = {
        "x": ((m, K), jnp.bfloat16),
        "packed": ((LAYERS, N, K // PER_BYTE[code]), DTYPES[code]),
        "scales": ((LAYERS, N, K // GROUP), jnp.bfloat16),
        "layer": ((), jnp.int32),
    }
    if rank:
        shapes |= {"xa": ((2, m, rank), jnp.float32), "lora_b": ((LAYERS, N, rank), jnp.bfloat16)}
    operands = {name: jax.ShapeDtypeStruct(*of, sharding=sharding) for name, of in shapes.items()}

    def product(x, packed, scales, layer, xa=None, lora_b=None):
        return int4_matmul_mosaic.partial_sums(x, packed, scales, layer, xa, lora_b, jnp.bfloat16, config, code)

    return what_ptxas_says(product, *operands.values())


def main() -> None:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask for its version
    jax.config.update("jax_enable_compilation_cache", False)  # ptxas says nothing of a program from there
    sharding = h200()
    for code, config in configurations():
        for rank in (0, RANK):
            said = said_by_ptxas(code, config, rank, sharding)
            print(json.dumps({"code": code, "rank": rank, **asdict(config), "ptxas": said}))
    for shapes, configs in layers():
        said = layer_said_by_ptxas(shapes, configs, sharding)
        print(json.dumps({"code": "fast8", "layer": shapes, **asdict(configs[0]), "ptxas": said}))


if __name__ == "__main__":
    main()
