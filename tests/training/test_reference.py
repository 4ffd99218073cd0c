"""The reference policy, shaped rewards and the choice of tokens: identities on a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import objective_from_config
from jgrpo.algorithms.rewards import soft_overlong_penalty
from jgrpo.checkpoints.adapter import export_adapter
from jgrpo.config import LoraConfig
from jgrpo.training import grpo_step
from jgrpo.training.experience import advantages_of
from jgrpo.training.forward import rows_of
from jgrpo.training.reference import completion_kl, describe_reference, initial_reference, rescaled, synced
from tests.training.setup import (
    COMPLETION,
    GENERATIONS,
    LORA,
    MODEL,
    QUESTIONS,
    assert_trees_equal,
    batch,
    rollout,
    settings,
    state,
    tiny_base,
    token_logprobs,
    trained_lora,
)


def test_kl_to_itself_is_zero_and_to_the_base_is_the_sum_of_its_tokens():
    config = settings(microbatch_size=4)

    def kl(reference):
        given = (trained_lora(), reference, tiny_base(), rollout())
        return completion_kl(*given, model=MODEL, config=config)

    same, mean = kl(trained_lora())
    assert float(jnp.abs(same).max()) == 0 == float(mean)
    to_base, mean = kl({})
    assert to_base.shape == (QUESTIONS, GENERATIONS)
    assert float(to_base.sum() / rollout().policy_mask.sum()) == pytest.approx(float(mean), rel=1e-5)
    assert float(mean) > 0


def test_an_adapter_of_another_scale_is_the_same_policy_after_rescaling():
    own = LoraConfig(lora_rank=4, lora_alpha=4.0 * LORA.lora_alpha)
    quarter = {name: {**module, "b": module["b"] / 4} for name, module in trained_lora().items()}
    for name, module in rescaled(quarter, own, LORA).items():
        np.testing.assert_allclose(module["b"], trained_lora()[name]["b"], rtol=1e-6)


def test_sync_copies_the_adapter_when_its_step_comes():
    before = state(trained_lora(), settings())[0]
    assert synced(before, 0).reference == {}
    for number, is_due in ((2, True), (3, False), (4, True)):
        after = synced(before.replace(step=jnp.asarray(number)), 2)
        assert bool(after.reference) == is_due
    assert_trees_equal(after.reference, before.lora)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((after.reference, after.lora))]
    assert len(set(pointers)) == len(pointers)


def test_the_kl_term_is_against_the_reference_of_the_state():
    """Policy and reference the same adapter: KL 0, though both are far from the base; beta comes from the state."""
    config = settings(beta=0.1)
    before, optimizer = state(trained_lora(), config)
    how = dict(model=MODEL, optimizer=optimizer, config=config)
    before = before.replace(reference=jax.tree.map(jnp.copy, trained_lora()), coefficients={"beta": jnp.asarray(0.5)})
    _, metrics = grpo_step(before, tiny_base(), batch(), **how)
    assert float(metrics["kl"]) == 0
    losses = []
    for beta in (0.1, 0.5):
        start = state(trained_lora(), config)[0].replace(coefficients={"beta": jnp.asarray(beta)}, reference={})
        _, metrics = grpo_step(start, tiny_base(), batch(), **how)
        losses.append(float(metrics["loss"]))
    assert losses[1] - losses[0] == pytest.approx(0.4 * float(metrics["kl"]), rel=1e-3)


def test_only_tokens_of_high_entropy_are_in_the_policy_term():
    """Loss of the fraction = −A over its tokens and 0 elsewhere, at ratio 1, with the denominator of all tokens."""
    config = settings(top_entropy_quantile=0.25, aggregation="bnpo")
    before, optimizer = state(trained_lora(), config)
    _, metrics = grpo_step(before, tiny_base(), batch(), model=MODEL, optimizer=optimizer, config=config)
    entropy = np.asarray(token_logprobs(MODEL, tiny_base(), trained_lora(), rows_of(rollout()))[1])
    mask = np.asarray(rollout().completion_mask).reshape(entropy.shape)
    kept = mask & (entropy >= np.quantile(entropy[mask], 0.75))
    advantages = np.broadcast_to(np.asarray(batch().advantages).reshape(-1, 1), mask.shape)
    assert float(metrics["loss"]) == pytest.approx(-advantages[kept].sum() / mask.sum(), rel=1e-4)


def test_penalty_and_overlong_reach_the_advantages_and_only_the_latter_the_rewards():
    algorithm = settings(algorithm="rloo", beta=0.1, overlong_buffer=4).algorithm
    objective = objective_from_config(algorithm)
    given = jax.random.normal(jax.random.key(0), (1, QUESTIONS, GENERATIONS))
    penalty = jax.random.normal(jax.random.key(1), (QUESTIONS, GENERATIONS))
    made, metrics = advantages_of(given, jnp.ones(1), rollout(), objective=objective, names=("f",), penalty=penalty)
    overlong = soft_overlong_penalty(rollout().completion_lengths, max_length=COMPLETION, cache=4)
    assert float(overlong.min()) < 0
    np.testing.assert_allclose(made.rewards, given[0] + overlong, rtol=1e-5)
    shaped = np.asarray(given[0] + overlong - penalty, np.float64)
    baseline = (shaped.sum(1, keepdims=True) - shaped) / (GENERATIONS - 1)
    np.testing.assert_allclose(made.advantages, shaped - baseline, atol=1e-5)
    assert float(metrics["reward"]) == pytest.approx(float(made.rewards.mean()), rel=1e-5)


def test_resolution_of_the_reference(tmp_path):
    path = export_adapter(tmp_path / "adapter", trained_lora(), LORA, MODEL.config, "tiny")
    config = settings(reference_adapter=str(path), lora_alpha=2 * LORA.lora_alpha)
    loaded = initial_reference(config, MODEL.config, trained_lora())
    for name, module in loaded.items():
        np.testing.assert_allclose(module["b"], trained_lora()[name]["b"] / 2, rtol=1e-6)
    assert str(path) in describe_reference(config.algorithm)
    assert initial_reference(settings(), MODEL.config, trained_lora()) == {}
    moving = dataclasses.replace(settings(), algorithm=settings(reference_sync_steps=3).algorithm)
    assert_trees_equal(initial_reference(moving, MODEL.config, trained_lora()), trained_lora())
