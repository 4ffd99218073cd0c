"""Combination of reward functions, shaped rewards and the group filters."""

import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms.rewards import (
    combine_rewards,
    dynamic_sampling_order,
    kl_shaped_rewards,
    soft_overlong_penalty,
    zero_variance_groups,
)
from tests.algorithms import oracle

NAN = float("nan")


def test_combination_ignores_missing_rewards_until_all_are_missing():
    per_function = jnp.asarray([[[1.0, NAN, NAN]], [[2.0, 3.0, NAN]]])
    actual = combine_rewards(per_function, jnp.asarray([0.5, 2.0]))
    np.testing.assert_array_equal(actual, [[4.5, 6.0, NAN]])


def test_a_weight_of_zero_still_counts_as_a_reward():
    np.testing.assert_array_equal(combine_rewards(jnp.asarray([[[7.0]]]), jnp.zeros(1)), [[0.0]])


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (400, -1.0)]
)
def test_soft_overlong_penalty(length, penalty):
    assert float(soft_overlong_penalty(jnp.asarray([length]), max_length=100, cache=20)[0]) == penalty


def test_kl_shaped_rewards_subtract_the_row_sum():
    batch = oracle.random_batch(0)
    rewards = batch.advantages.copy()
    rewards[1, 1] = NAN
    arrays = map(jnp.asarray, (rewards, batch.old, batch.ref, batch.mask))
    actual = kl_shaped_rewards(*arrays, 0.3)
    expected = [
        r - 0.3 * sum(batch.old[i][t] - batch.ref[i][t] for t in np.flatnonzero(batch.mask[i]))
        for i, r in np.ndenumerate(rewards)
    ]
    np.testing.assert_allclose(actual, np.reshape(expected, rewards.shape), rtol=1e-12)


REWARDS = [[1.0, 1.0, 1.0], [0.0, 1.0, NAN], [NAN, NAN, NAN], [NAN, 2.0, 2.0], [0.1, 0.1, 0.1 + 1e-7], [3.0, NAN, NAN]]
CONSTANT = [True, False, True, True, False, True]


def test_zero_variance_is_exact_equality_of_the_given_rewards():
    assert zero_variance_groups(jnp.asarray(REWARDS)).tolist() == CONSTANT


def test_dynamic_sampling_puts_informative_groups_first_in_their_order():
    order, count = dynamic_sampling_order(jnp.asarray(REWARDS))
    assert order.tolist() == [1, 4, 0, 2, 3, 5]
    assert int(count) == 2
