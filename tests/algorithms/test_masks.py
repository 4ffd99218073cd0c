"""Masks, the sampler correction and the off-policy rule on hand-made cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms.corrections import SAMPLER_CORRECTIONS
from jgrpo.algorithms.masks import drop_groups, drop_truncated, off_policy_sequence_mask, top_entropy_mask
from tests.algorithms import oracle


def test_truncated_rows_and_dropped_groups_leave_the_mask():
    mask = jnp.ones((2, 2, 3), bool)
    terminated = jnp.asarray([[True, False], [True, True]])
    assert drop_truncated(mask, terminated).any(-1).tolist() == terminated.tolist()
    assert drop_groups(mask, jnp.asarray([True, False])).any(-1).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_top_entropy_mask_keeps_the_quantile_of_the_masked_tokens(fraction):
    batch = oracle.random_batch(0)
    batch.entropy[~batch.mask] = 1e9
    chosen = np.asarray(top_entropy_mask(jnp.asarray(batch.entropy), jnp.asarray(batch.mask), fraction=fraction))
    threshold = np.quantile(batch.entropy[batch.mask], 1 - fraction)
    np.testing.assert_array_equal(chosen, batch.mask & (batch.entropy >= threshold))
    assert abs(chosen.sum() - fraction * batch.mask.sum()) <= 1


def test_top_entropy_mask_of_nothing_is_nothing():
    assert not top_entropy_mask(jnp.ones((2, 3)), jnp.zeros((2, 3), bool), fraction=0.2).any()


def test_off_policy_mask_drops_rows_that_are_bad_and_stale():
    ell = jnp.zeros((4, 3))
    sampler = jnp.asarray([[1.0, 1.0, 99.0]] * 2 + [[0.1, 0.3, 99.0]] * 2)
    mask = jnp.asarray([[True, True, False]] * 4)
    keep = off_policy_sequence_mask(ell, sampler, jnp.asarray([-1.0, 1.0, -1.0, 0.0]), mask, threshold=0.5)
    assert keep.all(-1).tolist() == [False, True, True, True]
    assert keep.shape == mask.shape


@pytest.mark.parametrize("mode", SAMPLER_CORRECTIONS)
def test_corrections_equal_the_formula(mode):
    batch = oracle.random_batch(1)
    log_rho = jnp.asarray(batch.old - batch.sampler)
    actual = np.asarray(SAMPLER_CORRECTIONS[mode](log_rho, jnp.asarray(batch.mask), low=0.7, high=1.3))
    for i in np.ndindex(batch.advantages.shape):
        m = batch.mask[i]
        expected = oracle.sampler_weights(mode, batch.old[i], batch.sampler[i], m, 0.7, 1.3)
        np.testing.assert_allclose(actual[i][m], expected[m], rtol=1e-12)


@pytest.mark.parametrize("mode", SAMPLER_CORRECTIONS)
def test_equal_policies_need_no_correction_and_corrections_carry_no_gradient(mode):
    correction, mask = SAMPLER_CORRECTIONS[mode], jnp.ones((2, 3), bool)
    assert (np.asarray(correction(jnp.zeros((2, 3)), mask, low=0.5, high=2.0)) == 1).all()
    gradient = jax.grad(lambda x: correction(x, mask, low=0.5, high=2.0).sum())(jnp.full((2, 3), 0.1))
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_token_and_sequence_corrections_agree_on_rows_of_one_token(kind):
    log_rho = jnp.asarray(np.random.default_rng(2).normal(size=(5, 1)))
    mask = jnp.ones((5, 1), bool)
    token, sequence = (
        SAMPLER_CORRECTIONS[f"{level}_{kind}"](log_rho, mask, low=0.5, high=2.0) for level in ("token", "sequence")
    )
    np.testing.assert_array_equal(token, sequence)


def test_corrections_survive_any_gap():
    log_rho, mask = jnp.asarray([[1e4, -1e4]], jnp.float32), jnp.ones((1, 2), bool)
    assert SAMPLER_CORRECTIONS["token_truncate"](log_rho, mask, low=0.5, high=2.0).tolist() == [[2.0, 0.0]]
    assert SAMPLER_CORRECTIONS["token_mask"](log_rho, mask, low=0.5, high=2.0).tolist() == [[0.0, 0.0]]
