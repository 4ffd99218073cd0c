"""PPO's critic side against the recursion written out, and its limiting cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import objective_from_config, policy_loss
from jgrpo.algorithms.ppo import clipped_value_loss, gae, token_rewards, whiten
from jgrpo.config import AlgorithmConfig
from tests.algorithms import oracle


def gae_by_sums(rewards, values, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k} of one row without masked positions."""
    following = np.append(values[1:], 0.0)
    delta = rewards + gamma * following - values
    return np.array([sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_the_sum_over_the_tokens_in_the_mask(gamma, lam):
    batch = oracle.random_batch(0)
    rewards, values = batch.ell, batch.ref
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, batch.mask)), gamma=gamma, lam=lam)
    for i in np.ndindex(batch.advantages.shape):
        m = batch.mask[i]
        expected = gae_by_sums(rewards[i][m], values[i][m], gamma, lam)
        np.testing.assert_allclose(advantages[i][m], expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(returns[i][m], expected + values[i][m], rtol=1e-10, atol=1e-12)
        assert (np.asarray(advantages[i])[~m] == 0).all()
        assert (np.asarray(returns[i])[~m] == 0).all()


def test_lambda_one_gives_monte_carlo_returns_and_lambda_zero_one_step_ones():
    rng = np.random.default_rng(1)
    rewards, values, mask = rng.normal(size=(2, 4)), rng.normal(size=(2, 4)), np.ones((2, 4), bool)
    _, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], atol=1e-12)
    _, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=1.0, lam=0.0)
    np.testing.assert_allclose(returns, rewards + np.append(values[:, 1:], np.zeros((2, 1)), axis=1), atol=1e-12)


def test_masked_positions_may_hold_anything():
    batch = oracle.random_batch(2)
    rewards, values = np.where(batch.mask, batch.ell, np.nan), np.where(batch.mask, batch.ref, np.nan)
    dirty = gae(*map(jnp.asarray, (rewards, values, batch.mask)))
    clean = gae(*map(jnp.asarray, (batch.ell, batch.ref, batch.mask)))
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])


def test_the_score_is_paid_at_the_last_token_and_kl_at_each():
    mask = jnp.asarray([[True, False, True, False], [False] * 4, [True] * 4])
    kl = jnp.asarray([[1.0, 9.0, 2.0, 9.0]] * 3)
    actual = token_rewards(jnp.asarray([5.0, 5.0, float("nan")]), kl, mask, 0.1)
    expected = [[-0.1, 0.0, 4.8, 0.0], [0.0] * 4, [-0.1, -0.9, -0.2, -0.9]]
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_whitened_tokens_have_mean_zero_and_variance_one_inside_the_mask():
    batch = oracle.random_batch(3)
    actual = np.asarray(whiten(jnp.asarray(batch.ell * 7 + 3), jnp.asarray(batch.mask)))
    np.testing.assert_allclose(actual[batch.mask].mean(), 0.0, atol=1e-12)
    np.testing.assert_allclose(actual[batch.mask].std(), 1.0, rtol=1e-6)
    assert (actual[~batch.mask] == 0).all()
    assert (np.asarray(whiten(jnp.ones((2, 3)), jnp.zeros((2, 3), bool))) == 0).all()


def test_value_loss_equals_the_formula_and_its_gradient_stops_at_the_clip():
    values, old, returns = np.array([0.0, 1.0, 1.0, -1.0]), np.zeros(4), np.array([0.5, 2.0, 0.0, 5.0])
    expected = [0.5 * 0.25, 0.5 * max(1.0, 1.8**2), 0.5 * max(1.0, 0.04), 0.5 * max(36.0, 5.2**2)]
    arrays = tuple(map(jnp.asarray, (values, old, returns)))
    np.testing.assert_allclose(clipped_value_loss(*arrays, clip=0.2), expected, rtol=1e-12)
    gradient = jax.grad(lambda v: clipped_value_loss(v, *arrays[1:], clip=0.2).sum())(arrays[0])
    np.testing.assert_allclose(gradient, [-0.5, 0.0, 1.0, -6.0], rtol=1e-12)


def test_the_policy_loss_takes_an_advantage_for_each_token():
    batch = oracle.random_batch(4)
    advantages, _ = gae(*map(jnp.asarray, (batch.ref, batch.entropy, batch.mask)))
    objective = objective_from_config(AlgorithmConfig(aggregation="bnpo"))
    mask = jnp.asarray(batch.mask)
    weights = objective.aggregation(mask, mask.shape[-1], None)
    ell = jnp.asarray(batch.ell)
    gradient = jax.grad(lambda x: policy_loss(x, ell, advantages, mask, weights, objective)[0])(ell)
    np.testing.assert_allclose(gradient, -weights * advantages, rtol=1e-12)
