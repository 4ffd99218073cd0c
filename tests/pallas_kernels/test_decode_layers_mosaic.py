"""The kernel of decode layers against float64: in Mosaic's interpreter on a CPU, compiled on a GPU."""

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch, layer_counter

if not dispatch.MOSAIC_JAX[0] <= jax.__version_info__ < dispatch.MOSAIC_JAX[1]:
    pytest.skip("needs the jax of Mosaic's interpreter", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # what the detector found is nowhere public

from pallas_kernels import decode_layers_mosaic, tuning
from pallas_kernels.codes import LAYER_CODE
from pallas_kernels.mosaic_layer_plan import Cut, Product
from pallas_kernels.mosaic_product_plan import Plan
from pallas_kernels.rows import permute_columns
from tests.pallas_kernels.oracles import relative_error
from tests.pallas_kernels.random_layers import (
    EPS,
    LAYERS,
    Layers,
    expected,
    expected_of_all,
    last_two,
    random_layers,
    random_tokens,
)

INTERPRET = jax.default_backend() == "cpu"
PROGRAMS = 3 if INTERPRET else jax.devices()[0].core_count
TOLERANCE = 8e-3
SCALE = 0.2


@pytest.mark.parametrize(
    ("m", "width", "heads", "ffn", "qkv", "splits", "activation"),
    [
        (5, 256, 256, 384, 384, (1, 2, 1, 3), "silu"),
        (33, 256, 512, 512, 256, (2, 2, 1, 2), "gelu_tanh"),
        (64, 512, 256, 512, 768, (1, 1, 1, 2), "silu"),
        (17, 384, 128, 640, 512, (3, 1, 1, 5), "gelu_tanh"),
        (64, 256, 384, 384, 384, (2, 3, 1, 1), "silu"),
    ],
)
def test_layer(m, width, heads, ffn, qkv, splits, activation):
    """And the qkv in front of the first one."""
    layers = random_layers(np.random.default_rng(m), m, width, heads, ffn, qkv)
    config, how = _configs(layers, splits)[0], dict(programs=PROGRAMS, interpret=INTERPRET)
    parts = decode_layers_mosaic.first_qkv(permute_columns(layers.rows), layers.matrices.qkv, config=config, **how)
    want = np.asarray(layers.rows, np.float64) @ layers.weights[0]["qkv"].T
    assert relative_error(np.asarray(parts, np.float64).sum(0), want) < TOLERANCE
    _check_layer(layers, splits, activation, PROGRAMS)


def test_programs_without_work_keep_pace():
    """Seven programs: one has no tile of any product, and two no row to norm."""
    layers = random_layers(np.random.default_rng(0), 5, 256, 256, 384, 384)
    _check_layer(layers, (1, 2, 1, 3), "silu", 7 if INTERPRET else PROGRAMS)


@pytest.mark.parametrize(
    ("m", "width", "ffn", "programs", "left", "parts"),
    [
        (9, 256, 256, 3, 1, 2),  # of four tiles the last one; the third program adds up
        (33, 640, 256, 3, 1, 2),  # pieces of two and three blocks
        (64, 256, 384, 5, 1, 2),  # three programs add up
        (17, 768, 128, 5, 2, 2),  # no whole turn
        (5, 256, 384, 4, 2, None),  # pieces of two tiles would leave no program to add up
    ],
)
def test_cut_tiles(m, width, ffn, programs, left, parts):
    """Tiles of gate and up that whole turns of all programs leave."""
    if not INTERPRET:
        # As many parts as fit, at most one a block; and so many tiles that none does.
        programs, left = PROGRAMS, left * (4 if width < 640 else 24) if parts else PROGRAMS - 4
        ffn, parts = 64 * (PROGRAMS + left), min(width // 128, (PROGRAMS - PROGRAMS // 8) // left) if parts else None
    plan = Plan(tuning.layer_config(16, 1), width // 128, 64, LAYER_CODE, 0, False, INTERPRET)
    cut = Product(plan, ffn // 64, gated=True).cut(programs)
    assert cut == (Cut(ffn // 64 - left, left, parts) if parts else None)
    layers = random_layers(np.random.default_rng(m), m, width, 256, ffn, 384)
    splits = (1, 1, 1, min(2, ffn // 128))
    _check_layer(layers, splits, "silu" if m % 2 else "gelu_tanh", programs)


@pytest.mark.parametrize(
    ("questions", "group", "kv_heads", "share", "depth", "slots", "slot", "programs", "how"),
    [
        (2, 3, 2, 2, 64, (40, 80), 33, 3, {}),
        (1, 5, 2, 3, 128, (72, 136), 64, 5, dict(normed=False)),
        (2, 2, 1, 6, 128, (64, 64), 0, 5, dict(biased=False)),
        (1, 4, 1, 12, 64, (8, 200), 191, 3, {}),
    ],
)
def test_all_layers(questions, group, kv_heads, share, depth, slots, slot, programs, how):
    """In the interpreter: programs with two tiles; a new token that begins a block; no token but the prompt's, and a program without a tile;
    24 query heads, and the last slot of a block."""
    rng = np.random.default_rng(slot)
    tokens = random_tokens(rng, questions, group, kv_heads, share, depth, *slots, slot, **how)
    heads, qkv, programs = kv_heads * share * depth, kv_heads * (share + 2) * depth, programs if INTERPRET else PROGRAMS
    layers, tokens = last_two(random_layers(rng, questions * group, 256, heads, 256, qkv), tokens)
    how = dict(programs=programs, eps=EPS, activation="silu", scale=SCALE, interpret=INTERPRET)
    rows, caches = decode_layers_mosaic.decode_layers(
        tokens,
        layers.residual,
        permute_columns(layers.rows),
        layers.norms,
        layers.matrices,
        configs=_configs(layers, (2 if slot else 1, 1, 1, 2)),
        **how,
    )
    want, *want_caches = expected_of_all(layers, tokens, "silu", SCALE)
    assert relative_error(np.asarray(rows, np.float64), want) < TOLERANCE
    for cache, exact in zip(caches, want_caches, strict=True):
        cache = np.asarray(cache, np.float64)
        np.testing.assert_allclose(cache[0], exact[0], rtol=8e-3, atol=8e-3)
        np.testing.assert_array_equal(np.isnan(cache), np.isnan(exact))
        assert relative_error(np.nan_to_num(cache), np.nan_to_num(exact)) < TOLERANCE
    _check_races()


def _configs(layers: Layers, splits: tuple[int, ...]) -> tuple[tuning.Int4Config, ...]:
    return tuple(tuning.layer_config(max(16, tuning.power_of_two(len(layers.residual))), split) for split in splits)


def _check_layer(layers: Layers, splits: tuple[int, ...], activation: str, programs: int) -> None:
    """A chain of layers without attentions, the last one among them."""
    configs, how = _configs(layers, splits), dict(programs=programs, interpret=INTERPRET)
    qkv, *others = zip(layers.matrices, configs, strict=True)
    how |= dict(eps=EPS, activation=activation)
    counter = layer_counter()
    for number in [0, LAYERS - 1] if INTERPRET else range(LAYERS):
        last = number == LAYERS - 1
        matrices, blocks = zip(*others, *([] if last else [qkv]), strict=True)
        residual, result, counter = decode_layers_mosaic.decode_layer(
            permute_columns(layers.attended),
            layers.residual,
            layers.norms,
            number,
            counter,
            matrices,
            configs=blocks,
            **how,
        )
        want_residual, want = expected(layers, number, activation)
        assert relative_error(np.asarray(residual, np.float64), want_residual) < TOLERANCE
        result = np.asarray(result, np.float64)
        assert relative_error(result if last else result.sum(0), want) < TOLERANCE
    _check_races()


def _check_races() -> None:
    """Programs and warp groups never race for memory."""
    assert not INTERPRET or not gpu_callbacks.get_races().races_found
