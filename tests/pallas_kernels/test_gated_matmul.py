"""The product of gate and up with its gate, against float64: the jnp twin, the kernel's own code, and their rule."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch, gated_matmul, tuning
from pallas_kernels.tuning import GatedConfig
from tests.pallas_kernels.oracles import relative_error
from tests.pallas_kernels.test_gated_activation import oracle as gate

H200 = dispatch.Device("gpu", (9, 0), True, "NVIDIA H200")
LAYER = 1
TWIN_TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}  # the twin rounds three times


def case(m: int, f: int, k: int, biased: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x, a stack of weights whose products have a deviation of 2, and one of biases, of values that bfloat16 holds."""
    rng = np.random.default_rng(m + f + k)
    draw = lambda *shape, scale=1.0: np.asarray(jnp.asarray(scale * rng.normal(size=shape), jnp.bfloat16), np.float32)  # noqa: E731
    return draw(m, k), draw(3, 2 * f, k, scale=2 * k**-0.5), draw(3, 2 * f) if biased else None


def oracle(x, weight, bias, activation: str) -> np.ndarray:
    """float64, from the definitions."""
    return gate((x.astype(np.float64) @ weight[LAYER].astype(np.float64).T)[None], bias, activation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", pallas_kernels.ACTIVATIONS)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("stacked", "biased"), [(False, True), (True, False), (True, True)])
def test_twin(stacked: bool, biased: bool, traced: bool, activation: str, dtype: str) -> None:
    x, weight, bias = case(5, 70, 896, biased)
    x, stack = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)

    def run(layer):
        biases = None if bias is None else jnp.asarray(bias)
        return gated_matmul(x, stack if stacked else stack[LAYER], activation=activation, layer=layer, bias=biases)

    out = jax.jit(run)(LAYER) if traced else run(LAYER)
    assert out.dtype == jnp.dtype(dtype)
    assert relative_error(out, oracle(np.asarray(x, np.float32), weight, bias, activation)) < TWIN_TOLERANCE[dtype]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize("activation", pallas_kernels.ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "f", "k", "biased", "blocks"),
    [
        (1, 7, 64, True, (16, 64, 0, 64, True)),
        (1, 150, 896, False, (16, 64, 0, 128, False)),
        (5, 130, 896, True, (16, 128, 0, 128, True)),
        (33, 150, 1536, True, (64, 64, 8, 64, False)),
        (33, 70, 3584, False, (64, 64, 0, 128, True)),
        (70, 24, 1536, True, (64, 64, 16, 64, False)),
        (200, 136, 3584, False, (128, 128, 0, 64, False)),
        (200, 100, 1536, True, (256, 64, 32, 64, False)),
        (200, 72, 896, True, (128, 64, 0, 64, True)),
    ],
)
def test_kernel(m: int, f: int, k: int, biased: bool, blocks: tuple, activation: str, pointer: bool) -> None:
    """Tiles that rows and columns do not fill, alone and side by side; every element is written, and none of another layer's."""
    from tests.pallas_kernels.launch import DTYPES, TOLERANCE, rounded
    from tests.pallas_kernels.launch import gated_matmul as launch

    x, weight, bias = case(m, f, k, biased)
    dtype, config = DTYPES[-1], GatedConfig(*blocks, warps=8 if blocks[0] > 64 else 4, stages=3)
    biases = None if bias is None else rounded(bias, dtype)
    out = launch(rounded(x, dtype), rounded(weight, dtype), biases, LAYER, activation, config, pointer)
    assert relative_error(out, oracle(x, weight, bias, activation)) < TOLERANCE[dtype]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
def test_kernel_of_one_matrix() -> None:
    """A weight that is one layer's, beside a stack of biases."""
    from tests.pallas_kernels.launch import DTYPES, TOLERANCE, rounded
    from tests.pallas_kernels.launch import gated_matmul as launch

    x, weight, bias = case(5, 40, 128, biased=True)
    dtype, config = DTYPES[-1], GatedConfig(16, 64, 0, 64, False, warps=4, stages=3)
    operands = rounded(x, dtype), rounded(weight[LAYER], dtype), rounded(bias, dtype)
    out = launch(*operands, LAYER, "silu", config, pointer=True)
    assert relative_error(out, oracle(x, weight, bias, "silu")) < TOLERANCE[dtype]


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize(("n", "k"), [(17920, 1536), (16384, 3072), (28672, 4096), (9728, 896), (37888, 3584)])
@pytest.mark.parametrize("m", [1, 16, 33, 64, 200, 512])
def test_heuristic_fits_every_shape(m: int, n: int, k: int, hopper: bool) -> None:
    config = tuning.gated_heuristic(m, n, hopper=hopper)
    assert config.fits(k)
    # Without asynchronous products one stage less is kept.
    stages = config.stages - (not hopper)
    columns = 2 * (config.block_n + config.extra_n)
    assert 2 * stages * config.block_k * (config.block_m + columns) <= (227 if hopper else 163) * 1024


def test_columns_beside_a_tile_save_a_round() -> None:
    assert tuning.gated_rounds(256, 17920, 256, 64) == 2
    assert tuning.gated_heuristic(256, 17920, hopper=True).extra_n == 8
    assert tuning.gated_rounds(256, 17920, 256, 72) == 1
    assert tuning.gated_heuristic(256, 16384, hopper=True).extra_n == 0


def test_a_measurement_decides_for_its_shape_and_fewer_rows(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "current_device", lambda: H200)
    config = vars(GatedConfig(128, 64, 8, 64, False, warps=8, stages=4))
    entries = [dict(n=17920, k=1536, m=m, us=us, library_us=26.0, config=config) for m, us in ((64, 30.0), (256, 25.0))]
    monkeypatch.setattr(tuning, "tuned", lambda name: {"gated_matmul": entries})

    def rule(m: int, n: int = 17920, weight_dtype=jnp.bfloat16) -> str:
        measured = tuning.gated_measurement(m, n, 1536)
        return dispatch.gated_matmul_rule(H200, jnp.bfloat16, weight_dtype, m, 1536, measured)

    assert [rule(m) for m in (1, 64, 65, 256, 257)] == ["reference"] * 2 + ["triton"] * 2 + ["reference"]
    assert [rule(m, n=28672) for m in (64, 65)] == ["triton", "reference"]  # by the rows
    assert rule(256, weight_dtype=jnp.float32) == "reference"
    assert tuning.gated_config(100, 17920, 1536) == GatedConfig(**config)
    assert tuning.gated_config(100, 28672, 1536) == tuning.gated_heuristic(100, 28672, hopper=True)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight = jnp.ones((2, 64)), jnp.ones((3, 8, 64))
    for arguments, message in [
        (dict(activation="relu"), "unknown"),
        (dict(x=x[0]), r"wants x \[M, K\]"),
        (dict(weight=weight[:, 1:]), r"\[L, 2F, K\]"),
        (dict(weight=weight[..., 1:]), "wants x"),
        (dict(bias=jnp.ones(8)), "bias must be"),
        (dict(implementation="triton"), "cannot run"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_matmul(**{"x": x, "weight": weight, "activation": "silu", "layer": 0, **arguments})
