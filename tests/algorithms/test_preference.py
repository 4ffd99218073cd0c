"""Pair selection, margins and the two preference losses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms.preference import dpo_loss, ipo_loss, pair_margins, select_pairs
from tests.algorithms import oracle

NAN = float("nan")


def test_pairs_are_best_and_worst_and_ties_are_skipped():
    rewards = [[0.0, 2.0, -1.0], [1.0, 1.0, 1.0], [NAN, 3.0, 1.0], [NAN, NAN, 2.0], [NAN] * 3, [1.0, 1.0, 0.0]]
    pairs = select_pairs(jnp.asarray(rewards))
    assert pairs.valid.tolist() == [True, False, True, False, False, True]
    valid = np.asarray(pairs.valid)
    assert np.asarray(pairs.chosen)[valid].tolist() == [1, 1, 0]
    assert np.asarray(pairs.rejected)[valid].tolist() == [2, 2, 2]
    np.testing.assert_allclose(pairs.weights, valid / 3)
    assert float(select_pairs(jnp.ones((2, 3))).weights.sum()) == 0


def test_margins_are_sums_over_the_mask():
    batch = oracle.random_batch(0)
    pairs = select_pairs(jnp.asarray(batch.advantages))
    actual = pair_margins(*map(jnp.asarray, (batch.ell, batch.ref, batch.mask)), pairs)
    for q in range(len(batch.advantages)):
        gains = [sum(batch.ell[q, g][m] - batch.ref[q, g][m]) for g, m in enumerate(batch.mask[q])]
        expected = gains[batch.advantages[q].argmax()] - gains[batch.advantages[q].argmin()]
        np.testing.assert_allclose(actual[q], expected, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_equal_the_formulas(beta):
    z = np.array([-3.0, 0.0, 0.7, 8.0])
    sigmoid = [-math.log(1 / (1 + math.exp(-beta * x))) for x in z]
    np.testing.assert_allclose(dpo_loss(jnp.asarray(z), beta=beta), sigmoid, rtol=1e-12)
    np.testing.assert_allclose(ipo_loss(jnp.asarray(z), beta=beta), [(x - 1 / (2 * beta)) ** 2 for x in z], rtol=1e-12)


def test_dpo_pushes_the_chosen_up_and_the_rejected_down_by_the_same_amount():
    batch = oracle.random_batch(1, questions=1, generations=2, length=3)
    batch.mask[:] = True
    pairs = select_pairs(jnp.asarray([[1.0, 0.0]]))
    ref, mask = jnp.asarray(batch.ref), jnp.asarray(batch.mask)
    gradient = jax.grad(lambda ell: dpo_loss(pair_margins(ell, ref, mask, pairs)).sum())(jnp.asarray(batch.ell))
    z = (batch.ell - batch.ref)[0].sum(-1) @ [1, -1]
    size = 0.1 / (1 + math.exp(0.1 * z))
    np.testing.assert_allclose(gradient[0], [[-size] * 3, [size] * 3], rtol=1e-10)


def test_large_margins_stay_finite():
    z = jnp.asarray([-1e4, 1e4], jnp.float32)
    np.testing.assert_allclose(dpo_loss(z), [1e3, 0.0], atol=1e-6)
