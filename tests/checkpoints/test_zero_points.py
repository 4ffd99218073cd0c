"""Products with asymmetric weights (GPTQ, AWQ): beside the adapter, or apart where there are too many groups for that."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from jgrpo.quantization import Int4Weight, dequantize, matmul, pack_nibbles
from jgrpo.quantization.linear import EPILOGUE_RANK


def random_weight(rng: np.random.Generator, rows: int, groups: int, group: int) -> Int4Weight:
    nibbles = rng.integers(0, 16, (2, rows, groups * group)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.0, (2, rows, groups)).astype(np.float32) / (groups * group) ** 0.5
    zeros = rng.integers(1, 16, (2, rows, groups)).astype(np.uint8)
    return Int4Weight(*map(jnp.asarray, (pack_nibbles(nibbles, group), scales, zeros)))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "own"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("groups", [4, EPILOGUE_RANK - 8, EPILOGUE_RANK - 7, EPILOGUE_RANK + 44])
def test_zero_points_at_every_width(groups, rank, stacked, monkeypatch):
    rng, ranks, original = np.random.default_rng(0), [], pallas_kernels.int4_matmul

    def spy(*args, xa, **more):
        ranks.append(0 if xa is None else xa.shape[-1])
        return original(*args, xa=xa, **more)

    monkeypatch.setattr(pallas_kernels, "int4_matmul", spy)
    weight = random_weight(rng, 16, groups, 32)
    x = rng.normal(size=(3, 5, groups * 32)).astype(np.float32)
    a = rng.normal(size=(2, rank, groups * 32)).astype(np.float32)
    b = rng.normal(size=(2, 16, rank)).astype(np.float32)
    adapter = None if rank == 0 else (a, b) if stacked else (a[1], b[1])
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64)[1].T
    if adapter is not None:
        expected += x.astype(np.float64) @ a[1].T @ b[1].T
    got = matmul(jnp.asarray(x), weight, 1, adapter)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * groups * np.abs(expected).max())
    assert ranks == [groups + rank if groups + rank <= EPILOGUE_RANK else 0]
    assert matmul(jnp.asarray(x, jnp.bfloat16), weight, 1, adapter).dtype == jnp.bfloat16
    assert matmul(jnp.asarray(x, jnp.bfloat16), weight, 1, adapter, jnp.float32).dtype == jnp.float32
