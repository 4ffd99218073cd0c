"""The MLP's gate against float64: the jnp twin, and the kernel's own code in Triton's interpreter or on a GPU."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from tests.pallas_kernels.oracles import relative_error
from tests.pallas_kernels.test_add_rms_norm import permuted

LAYER = 1
TOLERANCE = {"float16": 3e-3, "float32": 2e-6, "bfloat16": 2e-2}
_erf = np.vectorize(math.erf)


def case(m: int, width: int, parts: int, biased: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Partial sums and a stack of biases."""
    rng = np.random.default_rng(m * width + parts)
    sums = rng.normal(size=(parts, m, 2 * width)).astype(np.float32) * 2
    return sums, np.asarray(jnp.asarray(rng.normal(size=(3, 2 * width)), jnp.bfloat16), np.float32) if biased else None


def oracle(parts, bias, activation: str) -> np.ndarray:
    """float64, from the definitions."""
    both = parts.astype(np.float64).sum(0) + (0 if bias is None else bias[LAYER].astype(np.float64))
    gate, up = np.split(both, 2, axis=-1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def test_the_oracle_of_gelu_is_near_the_exact_one() -> None:
    x = np.linspace(-4, 4, 101)
    approximate = oracle(np.stack([x, np.ones_like(x)], -1)[None], None, "gelu_tanh")[:, 0]
    assert np.abs(approximate - x / 2 * (1 + _erf(x / np.sqrt(2)))).max() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", pallas_kernels.ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_twin(traced: bool, biased: bool, activation: str, dtype: str) -> None:
    parts, bias = case(5, 48, 3, biased)

    def run(layer):
        stack = None if bias is None else jnp.asarray(bias)
        return pallas_kernels.gated_activation(
            jnp.asarray(parts), activation=activation, dtype=dtype, layer=layer, bias=stack, permuted=True
        )

    rows = jax.jit(run)(LAYER) if traced else run(LAYER)
    assert rows.plain.dtype == jnp.dtype(dtype)
    assert relative_error(rows.plain, oracle(parts, bias, activation)) < TOLERANCE[dtype]
    np.testing.assert_array_equal(rows.permuted, permuted(np.asarray(rows.plain)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize("activation", pallas_kernels.ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "width", "parts", "biased"), [(1, 16, 1, False), (5, 4864, 1, True), (3, 1040, 4, True), (33, 48, 2, False)]
)
def test_kernel(m: int, width: int, parts: int, biased: bool, activation: str, pointer: bool) -> None:
    from tests.pallas_kernels.launch import DTYPES, gated_activation

    sums, bias = case(m, width, parts, biased)
    dtype = DTYPES[-1]
    rows, reordered = gated_activation(sums, bias, LAYER, activation, dtype, pointer)
    assert relative_error(rows, oracle(sums, bias, activation)) < TOLERANCE[dtype]
    np.testing.assert_array_equal(reordered, permuted(rows))


def test_bad_arguments_are_refused() -> None:
    parts = jnp.ones((1, 2, 24))
    for arguments, message in [
        (dict(activation="relu"), "unknown"),
        (dict(parts=parts[0]), "must be"),
        (dict(parts=parts[..., 1:]), "two halves"),
        (dict(permuted=True), "sixteens"),
        (dict(bias=jnp.ones(24)), "bias must be"),
        (dict(implementation="triton"), "cannot run"),
    ]:
        with pytest.raises(ValueError, match=message):
            pallas_kernels.gated_activation(
                **{"parts": parts, "activation": "silu", "dtype": jnp.float32, "layer": 0, **arguments}
            )


def test_rule() -> None:
    assert dispatch.gated_activation_problem(dispatch.Device("gpu", (8, 0), True), jnp.bfloat16) is None
    assert "7.5" in str(dispatch.gated_activation_problem(dispatch.Device("gpu", (7, 5), True), jnp.float16))
