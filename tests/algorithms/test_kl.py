"""KL estimators against the exact divergence of a small distribution, and the β controller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms.kl import KL_ESTIMATORS, adaptive_beta
from tests.algorithms import oracle

LOGITS, REF_LOGITS = np.random.default_rng(0).normal(size=(2, 7))


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_values_and_gradients_equal_the_formula(kind):
    batch = oracle.random_batch(0)
    estimator = KL_ESTIMATORS[kind]
    expected = np.vectorize(lambda ell, ref: oracle.kl(kind, ell, ref))(batch.ell, batch.ref)
    np.testing.assert_allclose(estimator(jnp.asarray(batch.ell), jnp.asarray(batch.ref)), expected, rtol=1e-9)
    ell, ref = jnp.asarray(batch.ell[1, 1]), jnp.asarray(batch.ref[1, 1])
    gradient = jax.grad(lambda x: estimator(x, ref).sum())(ell)
    formula = oracle.finite_difference(
        lambda x: sum(oracle.kl(kind, a, b) for a, b in zip(x, batch.ref[1, 1], strict=True)), batch.ell[1, 1]
    )
    np.testing.assert_allclose(gradient, formula, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expectation_is_the_kl_divergence(kind):
    log_p, log_q = jax.nn.log_softmax(jnp.asarray(LOGITS)), jax.nn.log_softmax(jnp.asarray(REF_LOGITS))
    exact = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_p) * KL_ESTIMATORS[kind](log_p, log_q)), exact, rtol=1e-10)


def test_k1_as_a_loss_term_has_no_expected_gradient_and_k2_has_the_exact_one():
    log_q = jax.nn.log_softmax(jnp.asarray(REF_LOGITS))
    probabilities = jax.nn.softmax(jnp.asarray(LOGITS))

    def sampled(kind, logits):
        return jnp.sum(probabilities * KL_ESTIMATORS[kind](jax.nn.log_softmax(logits), log_q))

    def exact(logits):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    gradient = {kind: jax.grad(lambda z, kind=kind: sampled(kind, z))(jnp.asarray(LOGITS)) for kind in ("k1", "k2")}
    np.testing.assert_allclose(gradient["k1"], 0.0, atol=1e-12)
    np.testing.assert_allclose(gradient["k2"], jax.grad(exact)(jnp.asarray(LOGITS)), atol=1e-12)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_equal_policies_have_exactly_zero_kl(kind):
    ell = jnp.asarray(np.random.default_rng(1).normal(size=9), jnp.float32)
    assert (np.asarray(KL_ESTIMATORS[kind](ell, ell)) == 0).all()


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_far_policies_stay_finite_and_not_negative(kind):
    ell, ref = jnp.asarray([-1e4, 0.0], jnp.float32), jnp.asarray([0.0, -1e4], jnp.float32)
    values = np.asarray(KL_ESTIMATORS[kind](ell, ref))
    assert np.isfinite(values).all()
    assert (values > 0).all()


@pytest.mark.parametrize(
    ("kl", "expected"), [(0.1, 0.5), (0.11, 0.5 * (1 + 0.1 * 0.64)), (9.0, 0.5 * (1 + 0.2 * 0.64)), (0.0, 0.5 * 0.872)]
)
def test_adaptive_beta_moves_towards_the_target_by_at_most_a_fifth_of_the_horizon(kl, expected):
    actual = adaptive_beta(jnp.asarray(0.5), jnp.asarray(kl), target=0.1, horizon=100.0, samples=64)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
