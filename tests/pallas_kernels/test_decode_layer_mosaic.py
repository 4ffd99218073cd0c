"""The kernel of a decode layer against float64: in Mosaic's interpreter on a CPU, compiled on a GPU."""

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch, layer_counter

if not dispatch.MOSAIC_JAX[0] <= jax.__version_info__ < dispatch.MOSAIC_JAX[1]:
    pytest.skip("needs the jax of Mosaic's interpreter", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # what the detector found is nowhere public

from pallas_kernels import decode_layer_mosaic, tuning
from pallas_kernels.codes import LAYER_CODE
from pallas_kernels.int4_matmul_mosaic import Plan
from pallas_kernels.mosaic_layer_plan import Cut, Product
from pallas_kernels.rows import permute_columns
from tests.pallas_kernels.decode_layers import EPS, expected, expected_attention, random_layer, random_tokens
from tests.pallas_kernels.oracles import relative_error

INTERPRET = jax.default_backend() == "cpu"
PROGRAMS = 3 if INTERPRET else jax.devices()[0].core_count
TOLERANCE = 8e-3
SCALE = 0.2


@pytest.mark.parametrize(
    ("m", "width", "heads", "ffn", "qkv", "splits", "activation"),
    [
        (5, 256, 256, 384, 384, (2, 1, 3, 1), "silu"),
        (5, 256, 256, 384, None, (2, 1, 3), "silu"),
        (33, 256, 512, 512, 256, (2, 1, 2, 2), "gelu_tanh"),
        (64, 512, 256, 512, 768, (1, 1, 2, 1), "silu"),
        (17, 384, 128, 640, 512, (1, 1, 5, 3), "gelu_tanh"),
        (64, 256, 384, 384, 384, (3, 1, 1, 2), "silu"),
    ],
)
def test_layer(m, width, heads, ffn, qkv, splits, activation):
    _check(m, width, heads, ffn, qkv, splits, activation, PROGRAMS)


@pytest.mark.parametrize("qkv", [384, None])
def test_programs_without_work_keep_pace(qkv):
    """Seven programs: one has no tile of any product, and two no row to norm."""
    _check(5, 256, 256, 384, qkv, (2, 1, 3, 1)[: 4 if qkv else 3], "silu", 7 if INTERPRET else PROGRAMS)


@pytest.mark.parametrize(
    ("m", "width", "ffn", "qkv", "programs", "left", "parts"),
    [
        (9, 256, 256, 384, 3, 1, 2),  # of four tiles the last one; the third program adds up
        (33, 640, 256, 384, 3, 1, 2),  # pieces of two and three blocks
        (64, 256, 384, None, 5, 1, 2),  # the last layer; three programs add up
        (17, 768, 128, 384, 5, 2, 2),  # no whole turn
        (5, 256, 384, 384, 4, 2, None),  # pieces of two tiles would leave no program to add up
    ],
)
def test_cut_tiles(m, width, ffn, qkv, programs, left, parts):
    """Tiles of gate and up that whole turns of all programs leave."""
    if not INTERPRET:
        # As many parts as fit, at most one a block; and so many tiles that none does.
        programs, left = PROGRAMS, left * (4 if width < 640 else 24) if parts else PROGRAMS - 4
        ffn, parts = 64 * (PROGRAMS + left), min(width // 128, (PROGRAMS - PROGRAMS // 8) // left) if parts else None
    plan = Plan(tuning.layer_config(16, 1), width // 128, 64, LAYER_CODE, 0, False, INTERPRET)
    cut = Product(plan, ffn // 64, gated=True).cut(programs)
    assert cut == (Cut(ffn // 64 - left, left, parts) if parts else None)
    splits = (1, 1, min(2, ffn // 128), 1)[: 4 if qkv else 3]
    _check(m, width, 256, ffn, qkv, splits, "silu" if m % 2 else "gelu_tanh", programs)


@pytest.mark.parametrize(
    ("questions", "group", "kv_heads", "share", "depth", "slots", "slot", "programs", "how"),
    [
        (2, 3, 2, 2, 64, (40, 80), 33, 3, {}),
        (1, 5, 2, 3, 128, (72, 136), 64, 5, dict(normed=False)),
        (2, 2, 1, 6, 128, (64, 64), 0, 5, dict(biased=False, parts=1)),
        (1, 4, 1, 12, 64, (8, 200), 191, 3, {}),
    ],
)
def test_layer_that_attends(questions, group, kv_heads, share, depth, slots, slot, programs, how):
    """In the interpreter: programs with two tiles; a new token that begins a block; no token but the prompt's, and a program without a tile;
    24 query heads, and the last slot of a block."""
    tokens = random_tokens(np.random.default_rng(slot), questions, group, kv_heads, share, depth, *slots, slot, **how)
    heads, programs = kv_heads * share * depth, programs if INTERPRET else PROGRAMS
    _check(questions * group, 256, heads, 256, 384, (1, 1, 2, 1), "silu", programs, tokens)


def _check(m, width, heads, ffn, qkv, splits, activation, programs, tokens=None):
    """Two in a chain, as far as one follows; the second has other norms. Programs and warp groups never race for memory."""
    layer = random_layer(np.random.default_rng(m), m, width, heads, ffn, qkv)
    configs = tuple(tuning.layer_config(max(16, tuning.power_of_two(m)), split) for split in splits)
    counter = layer_counter()
    for number in range(2 if qkv else 1):
        residual, result, counter, caches = decode_layer_mosaic.decode_layer(
            permute_columns(layer.attended) if tokens is None else tokens,
            layer.residual,
            layer.norms,
            number,
            counter,
            layer.matrices,
            configs=configs,
            programs=programs,
            eps=EPS,
            activation=activation,
            scale=SCALE,
            interpret=INTERPRET,
        )
        rows = None
        if tokens is not None:
            rows, *want_caches = expected_attention(tokens, number, SCALE)
            for cache, want in zip(caches, want_caches, strict=True):
                np.testing.assert_allclose(np.asarray(cache, np.float64), want, rtol=8e-3, atol=8e-3)
            tokens = tokens._replace(k=caches[0], v=caches[1])
        want_residual, want = expected(layer, number, activation, rows)
        assert relative_error(np.asarray(residual, np.float64), want_residual) < TOLERANCE
        result = np.asarray(result, np.float64)
        assert relative_error(result.sum(0) if qkv else result, want) < TOLERANCE
    assert not INTERPRET or not gpu_callbacks.get_races().races_found
