"""GPTQ's column loop against the paper's algorithm, written out in float64 with an explicit inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.checkpoints.gptq_rounding import (
    Moments,
    correction_fit,
    damped_factor,
    inverse,
    round_columns,
    round_to_inputs,
    upper_factor,
)
from jgrpo.errors import UserError
from jgrpo.quantization import dequantize, quantize, unpack_nibbles

# (N, K, group): one block of 64, blocks of 32 (96 is no multiple of 128), two and three blocks of 128.
SIZES = [(5, 64, 32), (7, 96, 32), (8, 256, 64), (3, 384, 128)]


def problem(rows, width, tokens=500, seed=0):
    """(W, X, X̂): correlated inputs with a few large ones, and the same with errors, as rows of tokens."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width // 4, width)) * np.exp(rng.normal(size=width))
    inputs = rng.normal(size=(tokens, width // 4)) @ mixing + 0.1 * rng.normal(size=(tokens, width))
    rounded = inputs + 0.1 * inputs.std(0) * rng.normal(size=inputs.shape)
    return rng.normal(size=(rows, width)).astype(np.float32), inputs, rounded


def moments(inputs, rounded):
    return rounded.T @ rounded, (inputs - rounded).T @ rounded


def halves(inputs, rounded):
    """Of every other token, as jgrpo takes them."""
    first, second = (Moments(*map(jnp.asarray, moments(inputs[i::2], rounded[i::2]))) for i in range(2))
    return first, second


def fit(weight, inputs, rounded):
    """The α with the least error over both halves, each with the other's correction, searched on a grid."""
    errors = []
    for i in range(2):
        hessian, drift = moments(inputs[i::2], rounded[i::2])
        width = len(hessian)
        fitted = weight @ drift @ np.linalg.inv(hessian + 0.01 * np.trace(hessian) / width * np.eye(width))
        wanted, seen = inputs[1 - i :: 2] @ weight.T - rounded[1 - i :: 2] @ weight.T, rounded[1 - i :: 2] @ fitted.T
        errors.append([np.square(wanted - alpha * seen).sum() for alpha in np.linspace(0, 1, 1001)])
    return np.argmin(np.sum(errors, 0)) / 1000


def paper(weight, hessian, drift, scales, alpha):
    """Algorithm 1 of arXiv:2210.17323 with a block of one column, on the target that makes up for the drift."""
    weight, width = weight.astype(np.float64), weight.shape[1]
    inverse = np.linalg.inv(hessian + 0.01 * np.trace(hessian) / width * np.eye(width))
    weight = weight + alpha * weight @ drift @ inverse
    upper = np.linalg.cholesky(inverse).T
    levels = np.empty(weight.shape, np.int64)
    for k in range(width):
        scale = scales[:, k * scales.shape[1] // width].astype(np.float64)
        levels[:, k] = np.clip(np.round(weight[:, k] / scale), -8, 7)
        error = (weight[:, k] - levels[:, k] * scale) / upper[k, k]
        weight[:, k:] -= np.outer(error, upper[k, k:])
    return levels + 8


@pytest.mark.parametrize("drifts", [False, True])
@pytest.mark.parametrize(("rows", "width", "group"), SIZES)
def test_levels_are_the_papers(rows, width, group, drifts):
    weight, inputs, rounded = problem(rows, width)
    rounded = rounded if drifts else inputs
    both = halves(inputs, rounded)
    found = round_to_inputs(jnp.asarray(weight), both, group)
    np.testing.assert_array_equal(found.scales, quantize(weight, group).scales)
    alpha = float(correction_fit(jnp.asarray(weight), both))
    expected = paper(weight, *moments(inputs, rounded), np.asarray(found.scales), alpha)
    np.testing.assert_array_equal(unpack_nibbles(np.asarray(found.packed), group), expected)
    assert (expected != unpack_nibbles(quantize(weight, group).packed, group)).mean() > 0.1


@pytest.mark.parametrize(("rows", "width", "group"), SIZES)
def test_outputs_are_closer_than_those_of_the_nearest_levels(rows, width, group):
    weight, inputs, rounded = problem(rows, width)

    def error(found, seen):
        return np.linalg.norm(inputs @ weight.T - seen @ dequantize(found, np.float32).T)

    same = round_to_inputs(jnp.asarray(weight), halves(inputs, inputs), group)
    assert error(same, inputs) < 0.5 * error(quantize(weight, group), inputs)
    # Inputs that are wrong already: the target makes up for it, which the plain algorithm does not try.
    made_up = round_to_inputs(jnp.asarray(weight), halves(inputs, rounded), group)
    plain = round_to_inputs(jnp.asarray(weight), halves(rounded, rounded), group)
    assert error(made_up, rounded) < error(plain, rounded) < error(quantize(weight, group), rounded)


@pytest.mark.parametrize(("tokens", "low", "high"), [(120, 0.01, 0.5), (5000, 0.9, 1.0)])
def test_a_correction_counts_as_far_as_it_fits_other_tokens(tokens, low, high):
    # 64 inputs: from 60 tokens to the other 60 little carries over, from 2500 nearly all.
    weight, inputs, rounded = problem(6, 64, tokens)
    alpha = float(correction_fit(jnp.asarray(weight), halves(inputs, rounded)))
    assert low < alpha <= high
    assert abs(alpha - fit(weight, inputs, rounded)) < 2e-3


def test_there_is_no_correction_without_drift_or_without_a_second_half():
    weight, inputs, rounded = problem(6, 64)
    assert correction_fit(jnp.asarray(weight), halves(inputs, inputs)) == 0
    alone = Moments(*map(jnp.asarray, moments(inputs, rounded)))
    nothing = jax.tree.map(jnp.zeros_like, alone)
    assert correction_fit(jnp.asarray(weight), (alone, nothing)) == 0


def test_a_matrix_on_its_grid_keeps_its_levels():
    weight, inputs, _ = problem(8, 128)
    on_grid = quantize(weight, 32, jnp.dtype("bfloat16"))
    found = round_to_inputs(jnp.asarray(dequantize(on_grid)), halves(inputs, inputs), 32, jnp.bfloat16)
    np.testing.assert_array_equal(found.packed, on_grid.packed)
    np.testing.assert_array_equal(found.scales, on_grid.scales)


def test_a_group_of_zeros_stays_zero_and_inputs_that_never_occur_round_to_the_nearest():
    weight, inputs, _ = problem(8, 128)
    weight[:, 32:64] = 0
    inputs[:, 64:96] = 0
    found = round_to_inputs(jnp.asarray(weight), halves(inputs, inputs), 32)
    values, nearest = dequantize(found), dequantize(quantize(jnp.asarray(weight), 32))
    assert not np.asarray(values[:, 32:64]).any()
    np.testing.assert_array_equal(values[:, 64:96], nearest[:, 64:96])
    none = round_to_inputs(jnp.asarray(weight), halves(0 * inputs, 0 * inputs), 32)
    np.testing.assert_array_equal(dequantize(none), nearest)


def test_the_factor_is_that_of_the_inverse():
    _, inputs, _ = problem(1, 96)
    hessian = inputs.T @ inputs
    factor = upper_factor(jnp.asarray(hessian), 0.01)
    damped = hessian + 0.01 * np.trace(hessian) / 96 * np.eye(96)
    np.testing.assert_allclose(factor @ factor.T, damped, rtol=1e-4, atol=1e-6 * damped.max())
    upper = np.asarray(inverse(factor), np.float64)
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(96), atol=1e-3)


def test_damping_grows_where_a_hessian_has_no_factor():
    hessian = np.diag(np.r_[np.ones(63), -0.05]).astype(np.float32)
    assert not np.isfinite(upper_factor(jnp.asarray(hessian), 0.01)).all()
    np.testing.assert_array_equal(damped_factor(jnp.asarray(hessian)), upper_factor(jnp.asarray(hessian), 0.1))


def test_inputs_that_are_not_finite_are_refused():
    half = Moments(jnp.eye(64).at[3, 3].set(jnp.inf), jnp.zeros((64, 64)))
    with pytest.raises(UserError, match="inputs of a linear layer on the calibration text are not finite"):
        round_to_inputs(jnp.ones((2, 64)), (half, half), 32)


def test_levels_stay_between_0_and_15():
    levels = np.asarray(round_columns(jnp.full((2, 64), 100.0), jnp.ones((2, 2)), jnp.eye(64)))
    assert levels.dtype == np.uint8
    assert (levels == 15).all()
