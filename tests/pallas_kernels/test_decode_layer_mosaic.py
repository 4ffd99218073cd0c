"""The kernel of a decode layer against float64: in Mosaic's interpreter on a CPU, compiled on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch

if not dispatch.MOSAIC_JAX[0] <= jax.__version_info__ < dispatch.MOSAIC_JAX[1]:
    pytest.skip("needs the jax of Mosaic's interpreter", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # what the detector found is nowhere public

from pallas_kernels import decode_layer_mosaic, tuning
from pallas_kernels.rows import permute_columns
from tests.pallas_kernels.decode_layers import EPS, expected, random_layer
from tests.pallas_kernels.oracles import relative_error

INTERPRET = jax.default_backend() == "cpu"
PROGRAMS = 3 if INTERPRET else jax.devices()[0].core_count
TOLERANCE = 8e-3


@pytest.mark.parametrize(
    ("m", "width", "heads", "ffn", "qkv", "depth", "splits", "activation"),
    [
        (5, 256, 256, 384, 384, 64, (2, 1, 3, 1), "silu"),
        (5, 256, 256, 384, None, 128, (2, 1, 3), "silu"),
        (33, 256, 512, 512, 256, 128, (2, 1, 2, 2), "gelu_tanh"),
        (33, 256, 512, 512, None, 256, (1, 1, 4), "silu"),
        (64, 512, 256, 512, 768, 64, (1, 1, 2, 1), "silu"),
        (17, 384, 128, 640, 512, 128, (1, 1, 5, 3), "gelu_tanh"),
        (64, 256, 384, 384, 384, None, (3, 1, 1, 2), "silu"),
        (9, 256, 256, 384, None, None, (1, 1, 3), "silu"),
    ],
)
def test_layer(m, width, heads, ffn, qkv, depth, splits, activation):
    """depth: of the heads of an attention in parts; None: its rows are merged."""
    _check(m, width, heads, ffn, qkv, depth, splits, activation, PROGRAMS)


@pytest.mark.parametrize("qkv", [384, None])
def test_programs_without_work_keep_pace(qkv):
    """Seven programs: one has no tile of any product, and two no row to norm."""
    _check(5, 256, 256, 384, qkv, 64, (2, 1, 3, 1)[: 4 if qkv else 3], "silu", 7 if INTERPRET else PROGRAMS)


@pytest.mark.parametrize(
    ("m", "width", "ffn", "depth", "splits", "programs"),
    [
        (9, 512, 256, None, (1, 1, 2, 1), 3),
        (64, 256, 256, 64, (2, 1, 1, 1), 3),
        (33, 768, 128, None, (1, 1, 1, 2), 5),
    ],
)
def test_half_tiles(m, width, ffn, depth, splits, programs):
    """Four tiles of gate and up for three programs: in a second turn two of them take half of the last one; or two tiles, all as halves."""
    if not INTERPRET:
        programs, ffn = PROGRAMS, 64 * (PROGRAMS + 4) if programs == 3 else ffn
    _check(m, width, 256, ffn, 384, depth, splits, "silu", programs)


def _check(m, width, heads, ffn, qkv, depth, splits, activation, programs):
    """Two in a chain, as far as one follows; the second has other norms. Programs and warp groups never race for memory."""
    layer = random_layer(np.random.default_rng(m), m, width, heads, ffn, qkv, depth)
    configs = tuple(tuning.layer_config(max(16, tuning.power_of_two(m)), split) for split in splits)
    counter = jnp.zeros((1,), jnp.int32)
    for number in range(2 if qkv else 1):
        residual, result, counter = decode_layer_mosaic.decode_layer(
            permute_columns(layer.attended) if layer.parts is None else layer.parts,
            layer.residual,
            layer.norms,
            number,
            counter,
            layer.matrices,
            configs=configs,
            programs=programs,
            eps=EPS,
            activation=activation,
            interpret=INTERPRET,
        )
        want_residual, want = expected(layer, number, activation)
        assert relative_error(np.asarray(residual, np.float64), want_residual) < TOLERANCE
        result = np.asarray(result, np.float64)
        assert relative_error(result.sum(0) if qkv else result, want) < TOLERANCE
    assert not INTERPRET or not gpu_callbacks.get_races().races_found
