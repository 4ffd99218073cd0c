"""Ratio levels and per-token losses against float64 loops, their gradients against finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import losses
from jgrpo.algorithms.ratios import RATIO_LEVELS, clamped_log_ratio
from tests.algorithms import oracle

SETTINGS = {
    "clipped": {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 1.5},
    "cispo": {"cap": 1.3},
    "sapo": {"temperature_pos": 1.0, "temperature_neg": 1.05},
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    "gmpo": {"epsilon_low": 0.3, "epsilon_high": 0.4},
}
FUNCTIONS = {kind: getattr(losses, f"{kind}_loss") for kind in SETTINGS}
COMBINATIONS = [*itertools.product(("clipped", "cispo", "sapo"), RATIO_LEVELS), ("vespo", "token"), ("gmpo", "token")]


def loss_of(kind, level, settings, ell, batch):
    log_ratio = RATIO_LEVELS[level](clamped_log_ratio(ell, jnp.asarray(batch.old)), jnp.asarray(batch.mask))
    return FUNCTIONS[kind](ell, log_ratio, jnp.asarray(batch.advantages), jnp.asarray(batch.mask), **settings)


def oracle_of(kind, level, settings, ell, batch):
    rows = [
        oracle.row_loss(kind, level, settings, ell[i], batch.ell[i], batch.old[i], a, batch.mask[i], np.zeros(99))
        for i, a in np.ndenumerate(batch.advantages)
    ]
    return np.array(rows).reshape(ell.shape)


@pytest.mark.parametrize(("kind", "level"), COMBINATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_equal_the_formula(kind, level, seed):
    batch = oracle.random_batch(seed)
    actual = np.asarray(loss_of(kind, level, SETTINGS[kind], jnp.asarray(batch.ell), batch))
    expected = oracle_of(kind, level, SETTINGS[kind], batch.ell, batch)
    np.testing.assert_allclose(actual[batch.mask], expected[batch.mask], rtol=1e-10)
    assert np.isfinite(actual).all()


@pytest.mark.parametrize(("kind", "level"), COMBINATIONS)
def test_gradients_equal_finite_differences_of_the_formula(kind, level):
    batch = oracle.random_batch(2, questions=2, generations=3, length=4)
    weights = np.random.default_rng(3).random(batch.mask.shape) * batch.mask

    def formula(ell):
        return float((weights * oracle_of(kind, level, SETTINGS[kind], ell, batch)).sum())

    def function(ell):
        return jnp.sum(weights * loss_of(kind, level, SETTINGS[kind], ell, batch))

    actual = np.asarray(jax.grad(function)(jnp.asarray(batch.ell)))
    np.testing.assert_allclose(actual, oracle.finite_difference(formula, batch.ell), rtol=1e-5, atol=1e-8)
    assert np.abs(actual).max() > 1e-3


def test_no_delta_is_delta_infinite():
    batch = oracle.random_batch(4)
    without, infinite = (
        loss_of("clipped", "token", SETTINGS["clipped"] | {"delta": delta}, jnp.asarray(batch.ell), batch)
        for delta in (None, float("inf"))
    )
    np.testing.assert_array_equal(without, infinite)


def test_delta_bounds_the_loss_of_a_negative_advantage():
    ell, old = jnp.zeros((1, 1)), jnp.full((1, 1), -3.0)
    mask, advantages = jnp.ones((1, 1), bool), jnp.asarray([-1.0])
    settings = SETTINGS["clipped"]
    loss = losses.clipped_loss(ell, ell - old, advantages, mask, **settings)
    np.testing.assert_allclose(loss, settings["delta"])
    unbounded = losses.clipped_loss(ell, ell - old, advantages, mask, **(settings | {"delta": None}))
    np.testing.assert_allclose(unbounded, np.exp(3.0))


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_on_policy_the_clip_is_inactive_and_every_level_is_the_policy_gradient(level):
    batch = oracle.random_batch(5)
    batch.old = batch.ell
    weights = batch.mask / batch.mask.sum(-1, keepdims=True).clip(1)

    def function(ell):
        return jnp.sum(weights * loss_of("clipped", level, SETTINGS["clipped"], ell, batch))

    gradient = jax.grad(function)(jnp.asarray(batch.ell))
    np.testing.assert_allclose(gradient, -weights * batch.advantages[..., None], atol=1e-12)
    ratio = jnp.zeros(batch.mask.shape)
    low, high = losses.clip_indicators(ratio, jnp.asarray(batch.advantages), (0.8, 1.2))
    assert not low.any()
    assert not high.any()


@pytest.mark.parametrize("kind", SETTINGS)
def test_on_policy_every_loss_has_the_policy_gradient(kind):
    batch = oracle.random_batch(6)
    batch.old = batch.ell
    row_mean = batch.mask / batch.mask.sum(-1, keepdims=True).clip(1)

    def function(ell):
        return jnp.sum(row_mean * loss_of(kind, "token", SETTINGS[kind], ell, batch))

    gradient = jax.grad(function)(jnp.asarray(batch.ell))
    np.testing.assert_allclose(gradient, -row_mean * batch.advantages[..., None], atol=1e-10)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_rows_of_one_token_have_the_token_ratio(level):
    rng = np.random.default_rng(7)
    log_ratio = jnp.asarray(rng.normal(size=(6, 4)))
    mask = jnp.asarray(np.eye(4, dtype=bool)[rng.integers(0, 4, 6)])
    actual = RATIO_LEVELS[level](log_ratio, mask)
    np.testing.assert_allclose(np.asarray(actual)[mask], np.asarray(log_ratio)[mask], atol=1e-12)


def test_sequence_and_sequence_token_agree_in_value_and_in_gradient_for_one_advantage_per_row():
    batch = oracle.random_batch(8)
    weights = batch.mask / batch.mask.sum(-1, keepdims=True).clip(1)

    def function(level, ell):
        return jnp.sum(weights * loss_of("clipped", level, SETTINGS["clipped"], ell, batch))

    (a, grad_a), (b, grad_b) = (
        jax.value_and_grad(lambda ell, level=level: function(level, ell))(jnp.asarray(batch.ell))
        for level in ("sequence", "sequence_token")
    )
    np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(grad_a, grad_b, atol=1e-12)


def test_log_ratio_is_clamped_and_has_no_gradient_beyond():
    ell = jnp.asarray([-1.0, -1.0, -1.0])
    old = jnp.asarray([-100.0, 99.0, -1.5])
    np.testing.assert_array_equal(clamped_log_ratio(ell, old), [20.0, -20.0, 0.5])
    np.testing.assert_array_equal(jax.grad(lambda x: clamped_log_ratio(x, old).sum())(ell), [0.0, 0.0, 1.0])


@pytest.mark.parametrize("kind", SETTINGS)
def test_per_token_advantages_equal_per_row_ones_when_constant(kind):
    batch = oracle.random_batch(9)
    per_row = loss_of(kind, "token", SETTINGS[kind], jnp.asarray(batch.ell), batch)
    batch.advantages = np.repeat(batch.advantages[..., None], batch.ell.shape[-1], axis=-1)
    np.testing.assert_array_equal(per_row, loss_of(kind, "token", SETTINGS[kind], jnp.asarray(batch.ell), batch))


@pytest.mark.parametrize("kind", SETTINGS)
def test_leading_axes_do_not_matter(kind):
    batch = oracle.random_batch(10)
    nested = loss_of(kind, "token", SETTINGS[kind], jnp.asarray(batch.ell), batch)
    flat = oracle.random_batch(10)
    for name in ("ell", "old", "mask"):
        setattr(flat, name, getattr(flat, name).reshape(-1, batch.ell.shape[-1]))
    flat.advantages = flat.advantages.reshape(-1)
    rows = loss_of(kind, "token", SETTINGS[kind], jnp.asarray(flat.ell), flat)
    np.testing.assert_array_equal(np.asarray(nested).reshape(rows.shape), rows)


@pytest.mark.parametrize("shape", [(12,), (4, 3), (3, 1), (3, 4, 1)])
def test_advantages_of_another_shape_are_refused(shape):
    batch = oracle.random_batch(11)
    batch.advantages = np.zeros(shape)
    with pytest.raises(ValueError, match="fit neither the rows"):
        loss_of("clipped", "token", SETTINGS["clipped"], jnp.asarray(batch.ell), batch)


def test_clip_indicators_need_the_sign_that_loses_its_gradient():
    log_ratio = jnp.log(jnp.asarray([[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]]))
    low, high = losses.clip_indicators(log_ratio, jnp.asarray([1.0, -1.0]), (0.8, 1.2))
    assert low.tolist() == [[False, False, False], [True, False, False]]
    assert high.tolist() == [[False, False, True], [False, False, False]]
