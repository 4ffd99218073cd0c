"""Products of 16-bit weights as partial sums, against float64: the jnp twin, and the kernel's own code; and their rule."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_partial_sums, dispatch, tuning
from pallas_kernels.tuning import DenseConfig
from tests.pallas_kernels.oracles import relative_error

H200 = dispatch.Device("gpu", (9, 0), True, "NVIDIA H200")


def case(m: int, n: int, k: int, layers: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """x and a stack of weights, of values that bfloat16 holds."""
    rng = np.random.default_rng(m + n + k)
    draw = lambda *shape: np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float32)  # noqa: E731
    return draw(m, k), draw(layers, n, k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_twin(stacked: bool, traced: bool, dtype: str) -> None:
    x, weight = case(5, 70, 896)
    x, stack = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)

    def run(layer):
        return dense_partial_sums(x, stack, layer=layer) if stacked else dense_partial_sums(x, stack[1])

    parts = jax.jit(run)(1) if traced else run(1)
    assert parts.shape == (1, 5, 70)
    assert parts.dtype == jnp.dtype(dtype)
    error = relative_error(parts[0], np.asarray(x, np.float64) @ weight[1].astype(np.float64).T)
    assert error < (2e-6 if dtype == "float32" else 6e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "block_m", "block_k", "split_k"),
    [(1, 7, 64, 16, 64, 1), (5, 130, 896, 16, 128, 7), (33, 70, 1536, 64, 64, 5), (70, 24, 3584, 64, 128, 3)],
)
def test_kernel(m: int, n: int, k: int, block_m: int, block_k: int, split_k: int, pointer: bool, swapped: bool) -> None:
    from tests.pallas_kernels.launch import DTYPES, TOLERANCE, dense_matmul, rounded

    x, weight = case(m, n, k)
    dtype = DTYPES[-1]
    config = DenseConfig(block_m, 64, block_k, split_k, swapped, warps=4, stages=3)
    out = dense_matmul(rounded(x, dtype), rounded(weight, dtype), 2, config, pointer)
    assert relative_error(out, x.astype(np.float64) @ weight[2].astype(np.float64).T) < TOLERANCE[dtype]


@pytest.mark.parametrize(("n", "k"), [(2048, 1536), (1536, 8960), (7, 64), (28672, 4096), (896, 4864)])
@pytest.mark.parametrize("m", [1, 16, 33, 64, 200, 512])
def test_heuristic_fits_every_shape(m: int, n: int, k: int) -> None:
    config = tuning.dense_heuristic(m, n, k)
    assert config.fits(k)
    assert 2 * config.stages * config.block_k * (config.block_m + config.block_n) <= 227 * 1024


def test_a_measurement_decides_for_its_shape_and_fewer_rows(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "current_device", lambda: H200)
    config = vars(DenseConfig(64, 64, 128, 4, True, warps=4, stages=4))
    entries = [dict(n=2048, k=1536, m=m, us=us, library_us=9.0, config=config) for m, us in ((64, 4.0), (256, 12.0))]
    monkeypatch.setattr(tuning, "tuned", lambda name: {"dense_matmul": entries})

    def rule(m: int, n: int = 2048, weight_dtype=jnp.bfloat16) -> str:
        measured = tuning.dense_measurement(m, n, 1536)
        return dispatch.dense_matmul_rule(H200, jnp.bfloat16, weight_dtype, m, n, 1536, measured)

    assert [rule(m) for m in (1, 64, 65, 256, 257)] == [
        "triton",
        "triton",
        "reference",
        "reference",
        "reference",
    ]  # the last one by its size
    assert [rule(64, n=n) for n in (96, 1536, 17920)] == ["triton", "triton", "reference"]
    assert [rule(256, n=n) for n in (96, 1536)] == ["triton", "reference"]
    assert rule(64, weight_dtype=jnp.float32) == "reference"
    assert tuning.dense_config(50, 2048, 1536) == DenseConfig(**config)


@pytest.mark.parametrize("n", [2048, 17920])
@pytest.mark.parametrize(("measured", "want"), [((5.6, 5.4), "reference"), ((5.3, 5.4), "triton")])
def test_the_rule_takes_what_was_measured_to_be_faster(n, measured, want) -> None:
    assert dispatch.dense_matmul_rule(H200, jnp.bfloat16, jnp.bfloat16, 64, n, 1536, measured) == want


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight = jnp.ones((2, 64)), jnp.ones((3, 8, 64))
    for arguments, message in [
        (dict(weight=weight), r"\[N, K\]"),
        (dict(weight=weight[0], layer=0), r"\[L, N, K\]"),
        (dict(weight=weight[..., 1:], layer=0), "wants x"),
        (dict(weight=weight, layer=0, implementation="triton"), "cannot run"),
    ]:
        with pytest.raises(ValueError, match=message):
            dense_partial_sums(x, **arguments)
    assert "divide by 64" in str(dispatch.dense_matmul_problem(H200, jnp.bfloat16, jnp.bfloat16, 96))
