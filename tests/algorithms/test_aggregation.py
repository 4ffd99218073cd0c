"""Aggregation weights against the definition, on masks with empty, single-token and full rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import aggregation_weights
from jgrpo.algorithms.aggregation import AGGREGATIONS
from tests.algorithms import oracle

LENGTH = 5


def random_mask(seed: int, density: float) -> np.ndarray:
    mask = np.random.default_rng(seed).random((3, 4, LENGTH)) < density
    mask[0, 0], mask[1, 1] = False, np.arange(LENGTH) == 2
    return mask


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize(("seed", "density"), [(0, 0.1), (1, 0.5), (2, 0.9), (3, 1.0)])
def test_weights_equal_the_formula(kind, seed, density):
    mask = random_mask(seed, density)
    actual = np.asarray(aggregation_weights(jnp.asarray(mask), kind, 9))
    np.testing.assert_allclose(actual, oracle.weights(kind, mask, 9), rtol=1e-12)
    assert ((actual > 0) == mask).all()


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_nothing_in_the_loss_weighs_nothing(kind):
    weights = aggregation_weights(jnp.zeros((3, 4, LENGTH), bool), kind, 9)
    assert (np.asarray(weights) == 0).all()


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "prompt"])
def test_means_weigh_one_in_all(kind):
    weights = aggregation_weights(jnp.asarray(np.random.default_rng(4).random((3, 4, LENGTH)) < 0.9), kind, 9)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-12)


def test_all_agree_on_a_full_batch_up_to_the_row_length():
    full = jnp.ones((2, 3, LENGTH), bool)
    expected = np.full(full.shape, 1 / full.size)
    for kind in ("grpo", "bnpo", "dapo", "prompt"):
        np.testing.assert_allclose(aggregation_weights(full, kind, LENGTH), expected, rtol=1e-12)
    np.testing.assert_allclose(aggregation_weights(full, "dr_grpo", LENGTH), expected, rtol=1e-12)
    np.testing.assert_allclose(aggregation_weights(full, "luspo", LENGTH), LENGTH * expected, rtol=1e-12)


def test_dapo_minibatches_add_up_to_the_generation_batch_and_bnpo_ones_do_not():
    mask = jnp.asarray(random_mask(5, 0.6))
    tokens = mask.sum()
    parts = [aggregation_weights(part, "dapo", 9, generation_tokens=tokens) for part in (mask[:1], mask[1:])]
    np.testing.assert_allclose(np.concatenate(parts), aggregation_weights(mask, "dapo", 9), rtol=1e-12)
    parts = [aggregation_weights(part, "bnpo", 9, generation_tokens=tokens) for part in (mask[:1], mask[1:])]
    np.testing.assert_allclose([float(part.sum()) for part in parts], [1.0, 1.0], rtol=1e-12)


def test_luspo_is_the_row_loss_times_its_length():
    mask = random_mask(6, 0.6)
    row_loss = np.random.default_rng(7).normal(size=(3, 4))
    weights = np.asarray(aggregation_weights(jnp.asarray(mask), "luspo", 9))
    expected = (row_loss * mask.sum(-1)).mean()
    np.testing.assert_allclose((weights * row_loss[..., None]).sum(), expected, rtol=1e-12)


def test_unknown_kind():
    with pytest.raises(KeyError, match="mean"):
        aggregation_weights(jnp.ones((1, 2, 3), bool), "mean", 3)
