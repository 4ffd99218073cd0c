"""The Mosaic GPU form of the int4 product against float64: in Mosaic's interpreter on a CPU, compiled on a GPU."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch

if not dispatch.MOSAIC_JAX[0] <= jax.__version_info__ < dispatch.MOSAIC_JAX[1]:
    pytest.skip("needs the jax of Mosaic's interpreter", allow_module_level=True)

from pallas_kernels import dequantize, int4_matmul, int4_matmul_mosaic, tuning
from pallas_kernels.rows import permute_columns, unpermute_columns
from tests.pallas_kernels.oracles import random_int4, relative_error

INTERPRET = jax.default_backend() == "cpu"
TOLERANCE = 4e-3


def product(x, packed, scales, layer, xa, b, config, code="int4", out_dtype=jnp.bfloat16, **how):
    arrays = [None if a is None else jnp.asarray(a) for a in (xa, b)]
    out = int4_matmul_mosaic.partial_sums(
        permute_columns(x),
        jnp.asarray(packed),
        jnp.asarray(scales, jnp.bfloat16),
        layer,
        *arrays,
        out_dtype,
        config,
        code,
        interpret=INTERPRET,
        **how,
    )
    assert out.dtype == out_dtype
    return np.asarray(out, np.float64).sum(0)


def rows(rng, m, k):
    return jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "blocks"),
    [
        (1, 128, 512, 64, (16, 128, 128, 1)),
        (5, 256, 1536, 64, (16, 256, 256, 2)),
        (16, 384, 3584, 64, (16, 128, 256, 3)),
        (16, 384, 1536, 64, (16, 192, 256, 3)),
        (5, 128, 1536, 64, (64, 128, 256, 2)),  # blocks for more rows
        (33, 256, 1024, 128, (64, 256, 256, 1)),
        (200, 128, 1024, 128, (256, 128, 128, 4)),
        (130, 512, 512, 64, (64, 256, 128, 1)),
        (40, 256, 2048, 64, (32, 256, 256, 4)),
        (33, 128, 1280, 64, (64, 128, 256, 1)),  # scales of 20 groups: rows of 40 bytes
        (16, 128, 896, 64, (16, 128, 128, 3)),
    ],
)
def test_product(m, n, k, group, blocks):
    rng = np.random.default_rng(m + n + k)
    packed, scales, weight = random_int4(rng, n, k, group)
    x = rows(rng, m, k)
    out = product(x, packed, scales, None, None, None, tuning.mosaic_config(*blocks))
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T) < TOLERANCE


def test_weights_whose_columns_are_reordered_take_rows_as_they_are():
    """So a head's rows need no operation of their own (`Transformer.proposal_logits`)."""
    rng = np.random.default_rng(1)
    packed, scales = rng.integers(0, 256, (128, 512)).astype(np.uint8), rng.uniform(0.01, 0.02, (128, 8))
    x, config = rows(rng, 5, 512), tuning.mosaic_config(16, 128, 128, 1)
    given = unpermute_columns(jnp.asarray(packed)), jnp.asarray(scales, jnp.bfloat16)
    out = int4_matmul_mosaic.partial_sums(
        x, *given, None, None, None, jnp.float32, config, "fast8", interpret=INTERPRET
    )
    weight = dequantize(packed, given[1], jnp.float32, "fast8")
    assert relative_error(out[0], np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T) < TOLERANCE


@pytest.mark.parametrize("code", ["int8", "fast8"])
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "blocks"),
    [
        (5, 256, 1536, 64, (16, 256, 128, 2)),
        (33, 128, 1024, 128, (64, 128, 256, 1)),
        (200, 128, 512, 64, (256, 128, 128, 1)),
    ],
)
def test_product_with_eight_bits(m, n, k, group, blocks, code):
    rng = np.random.default_rng(m)
    packed = rng.integers(0, 256, (n, k)).astype(np.uint8).view(np.int8 if code == "int8" else np.uint8)
    scales = jnp.asarray(rng.uniform(0.01, 0.02, (n, k // group)), jnp.bfloat16)
    weight = dequantize(packed, np.asarray(scales), np.float64, code)
    x = rows(rng, m, k)
    out = product(x, packed, scales, None, None, None, tuning.mosaic_config(*blocks, code=code), code)
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T) < TOLERANCE


@pytest.mark.parametrize(
    ("m", "k", "programs"), [*((33, k, programs) for k in (128, 1536) for programs in (2, 3, 5)), (96, 512, 3)]
)
def test_programs_take_tiles_in_turn(m, k, programs):
    """Five tiles, or ten of 64 rows of x each; the ring goes on from one to the next, whether it holds a tile's blocks or not."""
    rng = np.random.default_rng(k)
    packed = rng.integers(0, 256, (640, k)).astype(np.uint8)
    scales = jnp.asarray(rng.uniform(0.01, 0.02, (640, k // 64)), jnp.bfloat16)
    x, config = rows(rng, m, k), tuning.mosaic_config(64, 128, 128, 1, code="fast8")
    out = product(x, packed, scales, None, None, None, config, "fast8", programs=programs)
    weight = dequantize(packed, np.asarray(scales), np.float64, "fast8")
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T) < TOLERANCE


@pytest.mark.parametrize(
    ("programs", "rest", "m", "block_m"), [(0, 1, 5, 16), (1, 2, 96, 32), (2, 3, 5, 16), (5, 4, 96, 32)]
)
def test_programs_without_a_tile_take_the_rest_of_k(programs, rest, m, block_m):
    """So many more than tiles; none of them, and all of K is the tiles' own."""
    rng = np.random.default_rng(programs + m)
    packed, scales, weight = random_int4(rng, 256, 896, 64)
    x, xa, b = rows(rng, m, 896), rows(rng, m, 16), rows(rng, 256, 16)
    config = replace(tuning.mosaic_config(block_m, 128, 128, 1), rest=rest)
    tiles = 2 * -(-m // block_m)
    out = product(x, packed, scales, None, xa[None], b, config, programs=tiles + programs)
    expected = np.asarray(x, np.float64) @ weight.T + np.asarray(xa, np.float64) @ np.asarray(b, np.float64).T
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("m", "n", "k", "programs", "blocks", "cut", "rank"),
    [
        (25, 640, 512, 4, (32, 128, 128, 1), 16, 16),
        (64, 640, 1024, 4, (64, 128, 128, 1), 32, 0),
        (20, 640, 256, 4, (32, 128, 64, 1), 16, 128),  # two products of the adapter
        (60, 768, 768, 5, (64, 128, 128, 1), 32, 32),  # a piece that two programs make, and results through the ring
        (5, 1024, 2048, 3, (16, 256, 256, 1), 16, 0),  # too many pieces: all are tiles
        (96, 384, 512, 4, (32, 128, 128, 1), 16, 0),  # more rows than a tile has: none is cut
    ],
)
def test_tiles_that_are_more_than_programs_are_cut(m, n, k, programs, blocks, cut, rank):
    """Each program takes a piece beside its tile."""
    rng = np.random.default_rng(m + n)
    packed, scales, weight = random_int4(rng, n, k, 64)
    x, xa, b = rows(rng, m, k), rows(rng, m, rank or 1), rows(rng, n, rank or 1)
    config = replace(tuning.mosaic_config(*blocks), cut=cut)
    adapter = (xa[None], b) if rank else (None, None)
    out = product(x, packed, scales, None, *adapter, config, programs=programs)
    expected = np.asarray(x, np.float64) @ weight.T
    if rank:
        expected = expected + np.asarray(xa, np.float64) @ np.asarray(b, np.float64).T
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize("stages", [2, 4])
def test_results_take_slots_of_the_ring_where_it_has_as_many(stages):
    """Four slots of 64 rows of x by 64 of K, for four warp groups."""
    rng = np.random.default_rng(stages)
    packed, scales, weight = random_int4(rng, 256, 512, 64)
    x, config = rows(rng, 130, 512), replace(tuning.mosaic_config(64, 256, 64, 1), stages=stages)
    out = product(x, packed, scales, None, None, None, config, programs=2)
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T) < TOLERANCE


@pytest.mark.parametrize(("m", "blocks"), [(5, (16, 128, 128, 1)), (64, (64, 128, 256, 1)), (64, (64, 256, 128, 1))])
def test_logits_are_whole_sums_in_float32(m, blocks):
    """A head's: K is not split, and nothing is rounded behind the sums of bfloat16 weights."""
    rng = np.random.default_rng(m)
    packed = rng.integers(0, 256, (512, 768)).astype(np.uint8)
    scales = jnp.asarray(rng.uniform(0.01, 0.02, (512, 12)), jnp.bfloat16)
    weight = dequantize(packed, np.asarray(scales), jnp.bfloat16, "fast8")
    x, config = rows(rng, m, 768), tuning.mosaic_config(*blocks, code="fast8")
    out = product(x, packed, scales, None, None, None, config, "fast8", jnp.float32)
    assert relative_error(out, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T) < 1e-5


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("code", ["int8", "fast8"])
def test_the_differentiable_product_of_few_rows_is_the_kernels(code, split_k, monkeypatch):
    """With its adapter, and a gradient by the dequantized weights."""
    launch = partial(int4_matmul_mosaic.partial_sums, interpret=INTERPRET)
    launched = []
    monkeypatch.setattr(int4_matmul_mosaic, "partial_sums", lambda *given: (launched.append(given), launch(*given))[1])
    monkeypatch.setattr(sys.modules["pallas_kernels.int4_matmul"], "has_int8_kernel", lambda *_: True)
    config = tuning.mosaic_config(16, 128, 128, split_k, code=code)
    monkeypatch.setattr(tuning, "int8_config", lambda *_: config)
    rng = np.random.default_rng(split_k)
    packed = rng.integers(0, 256, (256, 512)).astype(np.uint8).view(np.int8 if code == "int8" else np.uint8)
    scales = jnp.asarray(rng.uniform(0.01, 0.02, (256, 8)), jnp.bfloat16)
    weight = dequantize(packed, np.asarray(scales), np.float64, code)
    x, xa, b, g = (rows(rng, *shape) for shape in [(5, 512), (5, 16), (256, 16), (5, 256)])

    def product(x):
        return int4_matmul(x, jnp.asarray(packed), scales, xa=xa, lora_b=b, out_dtype=jnp.float32, code=code)

    out, pull = jax.vjp(jax.jit(product), x)
    assert launched
    assert out.dtype == jnp.float32
    adapter = np.asarray(xa, np.float64) @ np.asarray(b, np.float64).T
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T + adapter) < TOLERANCE
    (dx,) = pull(g.astype(jnp.float32))
    assert relative_error(dx, np.asarray(g, np.float64) @ weight) < 2 * TOLERANCE


@pytest.mark.parametrize(("rank", "parts"), [(16, 1), (12, 3), (32, 5), (96, 2), (192, 2)])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("stacked", [False, True])
def test_adapter_of_the_layer(stacked, split_k, rank, parts):
    rng = np.random.default_rng(rank)
    packed, scales, weight = random_int4(rng, 128, 512, 64, layers=(3,))
    x, b = rows(rng, 5, 512), jnp.asarray(rng.normal(size=(3, 128, rank)), jnp.bfloat16)
    xa = jnp.asarray(rng.normal(size=(parts, 5, rank)), jnp.float32 if parts > 1 else jnp.bfloat16)
    for layer in (1, jnp.int32(2)):
        out = product(
            x, packed, scales, layer, xa, b if stacked else b[layer], tuning.mosaic_config(16, 128, 128, split_k)
        )
        adapter = np.asarray(xa, np.float64).sum(0) @ np.asarray(b[layer], np.float64).T
        assert relative_error(out, np.asarray(x, np.float64) @ weight[layer].T + adapter) < TOLERANCE


@pytest.mark.parametrize(
    ("m", "n", "rank", "parts", "blocks"),
    [
        (136, 512, 32, 1, (64, 256, 128, 1)),
        (200, 384, 96, 3, (128, 192, 128, 2)),
        (264, 256, 16, 2, (256, 128, 64, 1)),
        (131, 256, 32, 1, (64, 128, 128, 1)),  # no eights of rows
        (72, 256, 32, 1, (32, 128, 256, 1)),  # stored by threads, not through the ring
    ],
)
def test_the_last_tile_of_rows_is_not_full(m, n, rank, parts, blocks):
    """Its copies leave out what x and the result do not have, and x A^T has no more rows either."""
    rng = np.random.default_rng(m)
    packed, scales, weight = random_int4(rng, n, 1024, 64)
    x, b = rows(rng, m, 1024), rows(rng, n, rank)
    xa = jnp.asarray(rng.normal(size=(parts, m, rank)), jnp.float32)
    out = product(x, packed, scales, None, xa, b, tuning.mosaic_config(*blocks, rank=rank))
    assert out.shape == (m, n)
    adapter = np.asarray(xa, np.float64).sum(0) @ np.asarray(b, np.float64).T
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T + adapter) < TOLERANCE


@pytest.mark.parametrize("rank", [16, 96, 256, 768])
@pytest.mark.parametrize("block_m", [16, 64, 256])
def test_a_wide_adapter_gets_its_room_from_the_ring(block_m, rank):
    config = tuning.mosaic_config(block_m, 128, 128, 1)
    fitting = int4_matmul_mosaic._fitting(config, rank, "int4")
    assert 2 <= fitting.stages <= config.stages
    assert fitting.stages <= tuning.mosaic_stages(fitting, rank)
    assert fitting.block_m == block_m or tuning.mosaic_stages(config, rank) < 2


def test_an_adapter_too_wide_for_a_tile_of_all_rows():
    """256 rows of rank 512 alone are more than shared memory."""
    rng = np.random.default_rng(0)
    packed, scales, weight = random_int4(rng, 128, 512, 64)
    x, xa, b = (rows(rng, *shape) for shape in [(200, 512), (200, 512), (128, 512)])
    out = product(x, packed, scales, None, xa, b, tuning.mosaic_config(256, 128, 128, 1))
    wanted = np.asarray(x, np.float64) @ weight.T + np.asarray(xa, np.float64) @ np.asarray(b, np.float64).T
    assert relative_error(out, wanted) < TOLERANCE


def test_fresh_inputs_give_fresh_results():
    """Nothing of an earlier call stays behind in the ring of slots."""
    config = tuning.mosaic_config(16, 128, 256, 1)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        packed, scales, weight = random_int4(rng, 256, 4096, 64)
        x = rows(rng, 16, 4096)
        out = product(x, packed, scales, None, None, None, config)
        assert relative_error(out, np.asarray(x, np.float64) @ weight.T) < TOLERANCE
