"""Masked reductions: invalid entries have no influence whatever they hold, and nothing valid gives 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import masked
from tests.algorithms import oracle

REDUCTIONS = {
    masked.masked_sum: sum,
    masked.masked_mean: oracle.mean,
    masked.masked_std: oracle.std,
    masked.masked_min: lambda values: min(values, default=0.0),
    masked.masked_max: lambda values: max(values, default=0.0),
}


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_reductions_see_valid_entries_only(reduction, garbage):
    batch = oracle.random_batch(0)
    x = jnp.asarray(np.where(batch.mask, batch.ell, garbage))
    by_row = reduction(x, jnp.asarray(batch.mask), axis=-1)
    for i, m in enumerate(batch.mask.reshape(-1, x.shape[-1])):
        expected = REDUCTIONS[reduction](list(batch.ell.reshape(-1, m.size)[i][m]))
        np.testing.assert_allclose(np.asarray(by_row).ravel()[i], expected, rtol=1e-12)
    np.testing.assert_allclose(
        reduction(x, jnp.asarray(batch.mask)), REDUCTIONS[reduction](list(batch.ell[batch.mask])), rtol=1e-12
    )


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda f: f.__name__)
def test_nothing_valid_gives_zero(reduction):
    x, mask = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    assert (np.asarray(reduction(x, mask, axis=-1)) == 0).all()
    assert float(reduction(x, mask)) == 0


@pytest.mark.parametrize("reduction", [masked.masked_sum, masked.masked_mean], ids=lambda f: f.__name__)
def test_no_gradient_passes_through_invalid_entries(reduction):
    batch = oracle.random_batch(1)
    x = jnp.asarray(np.where(batch.mask, batch.ell, np.nan))
    gradient = np.asarray(jax.grad(lambda x: reduction(x, jnp.asarray(batch.mask)))(x))
    assert (gradient[~batch.mask] == 0).all()
    assert (gradient[batch.mask] > 0).all()


def test_equal_values_centre_to_exactly_zero():
    x = jnp.full((3, 7), 0.1, jnp.float32)
    assert (np.asarray(masked.masked_centre(x, jnp.ones((3, 7), bool), axis=-1)) == 0).all()
    assert float(masked.masked_std(x, jnp.ones((3, 7), bool))) == 0
