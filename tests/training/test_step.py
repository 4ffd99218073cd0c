"""Identities of the GRPO step."""

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.algorithms import objective_from_config
from jgrpo.training import grpo_step
from jgrpo.training.forward import rows_of, token_logprobs
from jgrpo.training.step import frozen, slice_batch
from tests.training.setup import (
    COMPLETION,
    GENERATIONS,
    MODEL,
    MODEL_CONFIG,
    PROMPT,
    QUESTIONS,
    assert_trees_equal,
    batch,
    fresh_lora,
    rollout,
    settings,
    state,
    tiny_base,
    trained_lora,
)

ROWS = QUESTIONS * GENERATIONS
OFF_POLICY = {"num_iterations": 2, "num_minibatches": 2, "microbatch_size": 4, "beta": 0.1}


def step(config, lora=None, data=None, base=None):
    """State before, state after and metrics of one step."""
    before, optimizer = state(trained_lora() if lora is None else lora, config)
    kept = jax.tree.map(np.asarray, (before.lora, before.opt_state))
    how = dict(model=MODEL, optimizer=optimizer, config=config)
    after, metrics = grpo_step(before, base or tiny_base(), data or batch(), **how)
    return kept, after, {name: float(value) for name, value in metrics.items()}


def test_first_update_moves_b():
    """A LoRA starts at B = 0; an adapter that is not wired in would stay there."""
    _, after, metrics = step(settings(), fresh_lora())
    assert all(jnp.any(module["b"] != 0) for module in after.lora.values())
    assert after.step == 1
    assert metrics["learning_rate"] == pytest.approx(1e-2)


def test_ratio_is_exactly_one_at_the_first_update():
    """Even for an old policy that is far off: the batch was drawn by another adapter than the one trained."""
    config = settings()
    objective = objective_from_config(config.algorithm)
    slices = slice_batch(batch(), objective, 1, ROWS)
    from jgrpo.training.step import _microbatch_loss  # the terms of a single microbatch

    part = jax.tree.map(lambda array: array[0, 0], slices)
    forward = lambda lora, rows, key: token_logprobs(MODEL, tiny_base(), lora, rows)  # noqa: E731
    stale = part.replace(old_logprobs=part.sampler_logprobs - 1.0)
    for what in (part, stale):
        loss = partial(_microbatch_loss, forward=forward, objective=objective, key=None)
        _, terms = loss(trained_lora(), what, jnp.array(0), is_first=jnp.array(True))
        assert jnp.all(jnp.where(what.mask, terms["ratio"], 1.0) == 1.0)
    _, terms = loss(trained_lora(), stale, jnp.array(0), is_first=jnp.array(False))
    np.testing.assert_allclose(terms["ratio"][stale.mask], np.e, rtol=1e-4)


def test_on_policy_nothing_is_clipped_and_off_policy_something_is():
    _, _, on = step(settings())
    assert on["clip_ratio/region_mean"] == 0
    _, _, off = step(settings(**OFF_POLICY, learning_rate=3e-2))
    assert off["clip_ratio/low_mean"] > 0
    assert off["clip_ratio/high_mean"] > 0


def test_kl_is_zero_at_step_zero_and_positive_after():
    config = settings(beta=0.1)
    _, after, metrics = step(config, fresh_lora())
    assert metrics["kl"] == 0
    _, _, later = step(config, after.lora)
    assert later["kl"] > 0


@cache
def gradient(microbatch_size):
    """First moment of Adam after one step, a tenth of the gradient; and the metrics."""
    config = settings(microbatch_size=microbatch_size, aggregation="dapo", max_grad_norm=1e9)
    # At scale 1 the problem is well conditioned: what differs is the split's doing, not amplified rounding.
    _, after, metrics = step(config, base=tiny_base(scale=1.0))
    return after.opt_state[1].inner_state[0].mu, metrics


@pytest.mark.parametrize("size", [4, 1])
def test_split_into_microbatches_does_not_matter(size):
    """1 × 16 rows and many smaller ones give one gradient, though lengths differ; to rounding in float32."""
    (whole, expected), (split, got) = gradient(ROWS), gradient(size)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, whole, split))
    assert difference <= 1e-6 * optax.tree.norm(whole)
    for name in ("loss", "grad_norm", "entropy"):
        assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-7)


def test_truncated_rows_alone_change_nothing():
    """All rows truncated and masked: parameters and optimizer state stay, also with momentum and weight decay."""
    config = settings(mask_truncated_completions=True, weight_decay=0.1)
    _, warm, _ = step(config)
    truncated = dataclasses.replace(batch(), rollout=rollout().replace(finish=jnp.ones((QUESTIONS, GENERATIONS), int)))
    before = jax.tree.map(np.asarray, (warm.lora, warm.opt_state))
    _, optimizer = state(trained_lora(), config)
    after, metrics = grpo_step(warm, tiny_base(), truncated, model=MODEL, optimizer=optimizer, config=config)
    assert_trees_equal(before, (after.lora, after.opt_state))
    assert metrics["updates/skipped"] == 1
    assert after.nonfinite == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_update_is_skipped_and_counted(bad):
    poisoned = batch().replace(advantages=batch().advantages.at[0, 0].set(bad))
    before, after, metrics = step(settings(), data=poisoned)
    assert_trees_equal(before, (after.lora, after.opt_state))
    assert metrics["updates/skipped"] == 1
    assert after.nonfinite == 1
    optimizer = state(trained_lora(), settings())[1]
    how = dict(model=MODEL, optimizer=optimizer, config=settings())
    again, _ = grpo_step(after, tiny_base(), poisoned, **how)
    assert again.nonfinite == 2
    good, metrics = grpo_step(again, tiny_base(), batch(), **how)
    assert good.nonfinite == 0
    assert metrics["updates/skipped"] == 0


def test_differentiating_the_base_raises():
    config = settings()
    float_base = {**tiny_base(), "layers": {}}
    with pytest.raises(TypeError, match="frozen"):
        jax.grad(lambda base: jnp.sum(frozen(base)["embed"]))(float_base)

    def loss(norm):
        before, optimizer = state(trained_lora(), config)
        base = {**tiny_base(), "final_norm": norm}
        return grpo_step(before, base, batch(), model=MODEL, optimizer=optimizer, config=config)[1]["loss"]

    with pytest.raises(TypeError, match="frozen"):
        jax.grad(loss)(tiny_base()["final_norm"])


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="do not divide"):
        step(settings(microbatch_size=5))
    with pytest.raises(ValueError, match="do not divide"):
        step(settings(num_minibatches=3))


def test_custom_objective():
    """A loss of one's own through the pure functions: without a gradient, B stays 0."""
    config = settings()
    silent = dataclasses.replace(
        objective_from_config(config.algorithm), loss=lambda logprobs, log_ratio, advantages, mask: 0.0 * logprobs
    )
    before, optimizer = state(fresh_lora(), config)
    how = dict(model=MODEL, optimizer=optimizer, config=config)
    after, _ = grpo_step(before, tiny_base(), batch(), **how, objective=silent)
    assert all(jnp.all(module["b"] == 0) for module in after.lora.values())


CHUNK = 8
WORKSPACE = CHUNK * MODEL_CONFIG.vocab_size * (4 + 4) / 1e6
"""MB of logits and their gradient in float32."""


@cache
def compiled(beta):
    """The step's program; with beta > 0 it has a reference."""
    config = settings(beta=beta, microbatch_size=4, logprob_workspace=WORKSPACE)
    before, optimizer = state(trained_lora(), config)
    return grpo_step.lower(before, tiny_base(), batch(), model=MODEL, optimizer=optimizer, config=config).compile()


def test_no_logits_of_whole_rows_and_no_copy_of_the_base():
    """In the compiled step with a reference: no [*, T, V] or [*, C, V] array, and no float matrix of all layers."""
    text = compiled(0.1).as_text()
    vocabulary, layers = MODEL_CONFIG.vocab_size, MODEL_CONFIG.num_layers
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    with_vocabulary = {shape for shape in shapes if vocabulary in shape}
    assert with_vocabulary, "the head must show up for this test to mean something"
    assert max(np.prod(shape) for shape in with_vocabulary) <= vocabulary * max(CHUNK, MODEL_CONFIG.hidden_size)
    matrices = {(layers, 64, 32), (layers, 32, 32), (layers, 128, 32), (layers, 32, 64)}
    assert not shapes & matrices


def test_reference_costs_no_second_model():
    """What a KL term adds to the step's memory is log-probabilities, not weights."""
    memory = [compiled(beta).memory_analysis().temp_size_in_bytes for beta in (0.0, 0.1)]
    base_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_base()))
    assert memory[1] - memory[0] < base_bytes / 4
    assert memory[1] - memory[0] <= 8 * ROWS * COMPLETION * 4 + 4096


def test_two_batches_have_fresh_completions():
    """Same prompts, same adapter, next key: other completions."""
    first, second = rollout(key=3), rollout(key=4)
    assert jnp.any(first.completion_tokens != second.completion_tokens)
    assert rows_of(first).prompt_tokens.shape == (ROWS, PROMPT)
