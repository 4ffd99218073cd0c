"""Controllers of beta and of the entropy bonus: direction, bounds, and that nothing else is adapted."""

import jax.numpy as jnp
import pytest

from jgrpo.config import AlgorithmConfig
from jgrpo.training.controllers import coefficient_metrics, initial_coefficients, next_coefficients

ENTROPY = AlgorithmConfig(entropy_target=1.0, entropy_coef=0.01, entropy_coef_step=0.02, entropy_coef_max=0.04)


def following(config, coefficients, **metrics):
    arrays = {name: jnp.asarray(value) for name, value in metrics.items()}
    return {k: float(v) for k, v in next_coefficients(coefficients, arrays, config, completions=100).items()}


def test_nothing_is_adapted_by_default():
    assert initial_coefficients(AlgorithmConfig()) == {}
    assert following(AlgorithmConfig(), {}, kl=1.0, entropy=1.0) == {}


@pytest.mark.parametrize(("kl", "factor"), [(0.2, 1.02), (0.11, 1.01), (0.0, 0.98)])
def test_beta_follows_the_kl(kl, factor):
    """β (1 + clip(KL / target − 1, ±0.2) n / horizon) with n / horizon = 0.1."""
    config = AlgorithmConfig(beta=0.5, kl_target=0.1, kl_horizon=1000)
    start = initial_coefficients(config)
    assert float(start["beta"]) == 0.5
    assert following(config, start, kl=kl)["beta"] == pytest.approx(0.5 * factor)


def test_entropy_bonus_is_off_until_the_entropy_is_known_to_be_low():
    start = initial_coefficients(ENTROPY)
    assert float(start["entropy_coef"]) == 0
    low = following(ENTROPY, start, entropy=0.5)
    assert low["entropy_coef"] == pytest.approx(0.03)
    assert following(ENTROPY, low, entropy=0.5)["entropy_coef"] == pytest.approx(0.04)
    high = following(ENTROPY, low, entropy=1.5)
    assert high == pytest.approx({"entropy_coef": 0.0, "entropy_reserve": 0.01})
    assert set(coefficient_metrics(start)) == {"coefficients/entropy_coef"}
