"""The adaptive entropy coefficient."""

import jax.numpy as jnp
import pytest

from jgrpo.algorithms.entropy import active_entropy_coef, next_entropy_coef


@pytest.mark.parametrize(
    ("coefficient", "entropy", "expected"), [(0.1, 0.2, 0.15), (0.1, 0.9, 0.05), (0.02, 0.9, 0.0), (0.98, 0.2, 1.0)]
)
def test_the_coefficient_grows_while_entropy_is_below_target_and_stays_in_range(coefficient, entropy, expected):
    actual = next_entropy_coef(jnp.asarray(coefficient), jnp.asarray(entropy), target=0.5, increment=0.05, maximum=1.0)
    assert float(actual) == pytest.approx(expected)


def test_the_bonus_is_off_above_the_target():
    coefficients = [float(active_entropy_coef(jnp.asarray(0.1), jnp.asarray(h), target=0.5)) for h in (0.4, 0.5, 0.6)]
    assert coefficients == [0.1, 0.1, 0.0]
