"""What stops a run that should not go on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import OptimizerConfig
from jgrpo.errors import UserError
from jgrpo.training import make_optimizer
from jgrpo.training.guards import CompileCounter, PolicyMismatch, check_finite, check_first_rollout, check_same_policy
from jgrpo.training.optimizer import learning_rate_schedule
from jgrpo.training.policy import Policy
from tests.training.setup import EOS, MODEL, fresh_lora, rollout, settings, tiny_base, trained_lora


def test_first_rollout_passes_for_one_policy_and_raises_for_two():
    """The rollout is the trained adapter's: it is its own policy, but not the base model, and not a fresh adapter."""
    policy = Policy(MODEL, tiny_base(), tokenizer=None, eos_ids=(EOS,))
    with pytest.raises(PolicyMismatch, match="base model's"):
        check_first_rollout(policy, trained_lora(), rollout(), settings())
    with pytest.raises(PolicyMismatch, match="sampler's"):
        check_first_rollout(policy, fresh_lora(), rollout(), settings())
    own = dataclasses.replace(rollout(), logprobs=_base_logprobs())
    check_first_rollout(policy, fresh_lora(), own, settings())


def _base_logprobs():
    from jgrpo.training import token_logprobs
    from jgrpo.training.forward import rows_of

    return token_logprobs(MODEL, tiny_base(), {}, rows_of(rollout()))[0].reshape(rollout().logprobs.shape)


@pytest.mark.parametrize("gap", [0.01, np.nan, np.inf])
def test_gap_above_the_tolerance(gap):
    with pytest.raises(PolicyMismatch):
        check_same_policy("float32", gap, 0.0)
    with pytest.raises(PolicyMismatch):
        check_same_policy("float32", 0.0, gap)
    check_same_policy("bfloat16", 0.01, 0.0)


def test_a_sampler_with_weights_in_eight_bits_may_be_further_from_the_trainer_but_not_from_the_base():
    check_same_policy("float32", 0.01, 0.0, int8_weights=True)
    for sampler, base in [(0.03, 0.0), (np.nan, 0.0), (0.0, 0.01)]:
        with pytest.raises(PolicyMismatch):
            check_same_policy("float32", sampler, base, int8_weights=True)


def test_too_many_nonfinite_updates_abort():
    check_finite(4, 5, step=9)
    with pytest.raises(UserError, match="5 updates in a row"):
        check_finite(5, 5, step=9)


def test_compile_counter_counts_compilations_only():
    counter = CompileCounter()
    function = jax.jit(lambda x: x * 3.25 + 1.75)
    function(jnp.ones(3))
    first = counter.count
    assert first >= 1
    function(jnp.zeros(3))
    assert counter.count == first
    function(jnp.zeros(5))
    assert counter.count > first
    counter.close()
    before = counter.count
    function(jnp.zeros(7))
    assert counter.count == before


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules(schedule, expected):
    config = OptimizerConfig(learning_rate=1.0, lr_schedule=schedule, warmup_steps=2)
    values = [float(learning_rate_schedule(config, updates=6)(step)) for step in range(6)]
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_gradient_is_clipped_by_its_global_norm():
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=0.5), updates=1)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    first_moment = state[1].inner_state[0].mu
    np.testing.assert_allclose(first_moment["a"] / 0.1, [0.3, 0.0], rtol=1e-5)
    np.testing.assert_allclose(first_moment["b"] / 0.1, [0.4], rtol=1e-5)
