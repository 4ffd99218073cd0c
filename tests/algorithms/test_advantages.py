"""Advantages against float64 loops, and the identities between estimators."""

import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import advantages as adv
from tests.algorithms import oracle

NAN = float("nan")
# Distinct, tied, partly missing with one left, wholly missing, mixed.
REWARDS = np.array([[1.0, 0.0, 0.5, 2.0], [0.3, 0.3, 0.3, 0.3], [NAN, NAN, 1.5, NAN], [NAN] * 4, [NAN, 1.0, -1.0, 1.0]])
LENGTHS = np.array([[3, 1, 7, 2], [4, 4, 1, 2], [5, 6, 7, 8], [1, 2, 3, 4], [9, 0, 2, 5]])
PER_FUNCTION = np.stack([REWARDS, 10 * REWARDS[::-1], REWARDS**2 - 3])
WEIGHTS = np.array([1.0, 0.5, 2.0])

GOLDEN = {
    "group": (lambda r: adv.group_advantages(r, scale="group"), lambda r: oracle.group_advantages(r, "group")),
    "batch": (lambda r: adv.group_advantages(r, scale="batch"), lambda r: oracle.group_advantages(r, "batch")),
    "none": (lambda r: adv.group_advantages(r, scale="none"), lambda r: oracle.group_advantages(r, "none")),
    "rloo": (adv.rloo_advantages, oracle.rloo),
    "reinforce_plus_plus": (adv.reinforce_plus_plus_advantages, oracle.whiten),
    "reinforce_plus_plus_baseline": (
        adv.reinforce_plus_plus_baseline_advantages,
        oracle.reinforce_plus_plus_baseline,
    ),
    "opo": (lambda r: adv.opo_advantages(r, jnp.asarray(LENGTHS)), lambda r: oracle.opo(r, LENGTHS)),
    "pass_at_k": (adv.pass_at_k_advantages, oracle.pass_at_k),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_advantages_equal_the_formula(name):
    function, formula = GOLDEN[name]
    for rewards in (REWARDS, np.random.default_rng(0).normal(size=REWARDS.shape)):
        actual = np.asarray(function(jnp.asarray(rewards)))
        np.testing.assert_allclose(actual, formula(rewards), rtol=1e-12, atol=1e-12)
        assert np.abs(actual).max() > 0.1


@pytest.mark.parametrize("name", GOLDEN)
def test_missing_rewards_get_no_advantage_and_no_say(name):
    function, _ = GOLDEN[name]
    missing = np.isnan(REWARDS)
    actual = np.asarray(function(jnp.asarray(REWARDS)))
    assert np.isfinite(actual).all()
    assert (actual[missing] == 0).all()
    nothing = np.asarray(function(jnp.full(REWARDS.shape, NAN)))
    assert (nothing == 0).all()


def test_gdpo_equals_the_formula():
    actual = adv.gdpo_advantages(jnp.asarray(PER_FUNCTION), jnp.asarray(WEIGHTS))
    np.testing.assert_allclose(actual, oracle.gdpo(PER_FUNCTION, WEIGHTS), rtol=1e-12, atol=1e-12)


def test_gdpo_does_not_depend_on_the_scale_of_a_function():
    rewards = np.random.default_rng(1).normal(size=(2, 4, 6))
    scaled = rewards * np.array([1.0, 1e3])[:, None, None]
    a, b = (adv.gdpo_advantages(jnp.asarray(r), jnp.ones(2)) for r in (rewards, scaled))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_remax_subtracts_the_greedy_reward():
    greedy = np.array([0.5, 0.3, NAN, 1.0, 0.0])
    expected = np.array([[0.5, -0.5, 0.0, 1.5], [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.0, 1.0, -1.0, 1.0]])
    np.testing.assert_allclose(adv.remax_advantages(jnp.asarray(REWARDS), jnp.asarray(greedy)), expected, atol=1e-12)


@pytest.mark.parametrize("generations", [2, 5])
def test_rloo_is_grpo_without_std_up_to_a_factor(generations):
    rewards = jnp.asarray(np.random.default_rng(2).normal(size=(3, generations)))
    centred = adv.group_advantages(rewards, scale="none")
    factor = generations / (generations - 1)
    np.testing.assert_allclose(adv.rloo_advantages(rewards), factor * centred, rtol=1e-12)


def test_opo_with_equal_lengths_is_grpo_without_std():
    rewards = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)))
    actual = adv.opo_advantages(rewards, jnp.full((3, 4), 7))
    np.testing.assert_allclose(actual, adv.group_advantages(rewards, scale="none"), atol=1e-12)


def test_group_advantages_do_not_see_shift_or_order():
    rewards = np.random.default_rng(4).normal(size=(3, 4))
    order = np.array([2, 0, 3, 1])
    a = np.asarray(adv.group_advantages(jnp.asarray(rewards), scale="group"))
    b = np.asarray(adv.group_advantages(jnp.asarray(rewards[:, order] + 5), scale="group"))
    np.testing.assert_allclose(a[:, order], b, atol=1e-10)


@pytest.mark.parametrize("value", [0.1, 100.3, -7e4])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_equal_rewards_give_exactly_zero_in_single_precision(value, scale):
    rewards = jnp.full((2, 7), value, jnp.float32)
    assert (np.asarray(adv.group_advantages(rewards, scale=scale)) == 0).all()


def test_pass_at_k_ignores_ties_at_the_top():
    rewards = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    actual = np.asarray(adv.pass_at_k_advantages(rewards))
    assert (actual[0] == 0).all()
    assert (actual[1] > 0).tolist() == [False, True, False]
