"""Full fine-tuning: the gradient of all weights against PyTorch's, and the identities of a step."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import AutoModelForCausalLM

from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.checkpoints.names import placements
from jgrpo.config import LoraConfig, QuantizationConfig
from jgrpo.lora import WEIGHTS
from jgrpo.models import Transformer, init_base
from jgrpo.rollout import compaction, generate
from jgrpo.rollout.ahead import compile_all, lower_rollout
from jgrpo.rollout.weights import decoded
from jgrpo.training import Batch, TrainState, grpo_step, token_logprobs
from jgrpo.training.forward import Rows, rows_of
from jgrpo.training.guards import CompileCounter
from jgrpo.training.policy import Policy
from jgrpo.training.preference import online_dpo_step
from jgrpo.training.trained import keeps_start, starting_point
from tests.tiny_checkpoints import make_checkpoint
from tests.training.setup import (
    GENERATIONS,
    MANY_EOS,
    MODEL_CONFIG,
    PAD,
    QUESTIONS,
    assert_trees_equal,
    cached_optimizer,
    prompts,
    settings,
)

FULL = LoraConfig(lora=None)
MODEL = Transformer(MODEL_CONFIG, FULL)
ROWS = QUESTIONS * GENERATIONS


@cache
def weights():
    base = init_base(jax.random.key(0), MODEL_CONFIG)
    return {WEIGHTS: jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, base)}


@cache
def batch():
    how = dict(eos_ids=MANY_EOS, pad_id=PAD)
    drawn = generate(MODEL, {}, weights(), prompts(), jax.random.key(3), settings().rollout, **how)
    rewards = jax.random.normal(jax.random.key(103), (QUESTIONS, GENERATIONS))
    return Batch(rollout=drawn, rewards=rewards, advantages=rewards - rewards.mean(axis=1, keepdims=True))


def full(**values):
    return settings(lora=None, quantization="none", **values)


def start(config, base=None):
    optimizer = cached_optimizer(config.optimizer)
    fresh = TrainState.create(jax.tree.map(jnp.copy, weights()), optimizer, jax.random.key(0))
    return fresh, {} if base is None else base, optimizer


def step(config, base=None, function=grpo_step):
    before, base, optimizer = start(config, base)
    return function(before, base, batch(), model=MODEL, optimizer=optimizer, config=config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("gemma2", {})],
    ids=["tied", "untied with biases", "gemma2"],
)
@pytest.mark.parametrize(
    "how", [dict(group=1, remat=False), dict(group=2, remat=True, chunk=5)], ids=["plain", "shared"]
)
def test_gradient_of_every_weight_is_pytorchs(family, changes, how, tmp_path):
    path = make_checkpoint(tmp_path, family, **changes)
    shape = load_model_config(path)
    base = load_base(path, shape, QuantizationConfig(quantization="none"))
    random = np.random.default_rng(0)
    lengths, size = np.array([3, 3, 5, 5]), 7
    tokens = random.integers(0, 250, (4, 5 + size))
    tokens[1], tokens[3] = [np.concatenate([tokens[i][:n], tokens[i + 1][n:]]) for i, n in ((0, 3), (2, 5))]
    coefficients = random.standard_normal((4, size)).astype(np.float32)
    rows = Rows(
        prompt_tokens=jnp.asarray(tokens[:, :5]),
        prompt_lengths=jnp.asarray(lengths),
        completion_tokens=jnp.asarray([row[n : n + size] for row, n in zip(tokens, lengths, strict=True)]),
        completion_mask=jnp.ones((4, size), bool),
        num_generations=2,
    )

    def loss(policy):
        return jnp.sum(coefficients * token_logprobs(Transformer(shape, FULL), {}, policy, rows, **how)[0])

    ours = jax.jit(jax.grad(loss))({WEIGHTS: base})[WEIGHTS]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for row, n, weight in zip(tokens, lengths, coefficients, strict=True):
        ids = torch.tensor(row[None, : n + size])
        logprobs = theirs(ids).logits[0, n - 1 : -1].log_softmax(-1)
        (torch.tensor(weight) * logprobs.gather(1, ids[0, n:, None])[:, 0]).sum().backward()
    parameters = dict(theirs.named_parameters())
    seen = set()
    for leaf, placed in placements(shape).items():
        gradient = np.asarray(ours[leaf[0]] if len(leaf) == 1 else ours["layers"][leaf[1]])
        for place in placed:
            got = gradient if place.layer is None else gradient[place.layer]
            want = parameters[place.name].grad.numpy()
            assert np.linalg.norm(want) > 0
            error = np.linalg.norm(got[place.start : place.stop] - want) / np.linalg.norm(want)
            assert error <= 1e-4, place.name
            seen.add(place.name)
    assert seen == set(parameters)


def test_every_weight_moves_and_the_base_is_not_needed():
    after, metrics = step(full())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.lora, weights())
    assert all(jax.tree.leaves(moved))
    assert metrics["updates/skipped"] == 0


@cache
def gradient(size):
    """Ten times Adam's first moment after one step, and the metrics."""
    after, metrics = step(full(microbatch_size=size, max_grad_norm=1e9))
    return after.opt_state[1].inner_state[0].mu, metrics


@pytest.mark.parametrize("size", [4, 1])
def test_split_into_microbatches_does_not_matter(size):
    (whole, expected), (split, got) = gradient(ROWS), gradient(size)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, whole, split))
    assert difference <= 1e-5 * optax.tree.norm(whole)
    assert got["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5, abs=1e-6)


def test_skipped_update_leaves_the_weights():
    config = full(optimizer_bits=8)
    before, base, optimizer = start(config)
    bad = batch().replace(advantages=jnp.full_like(batch().advantages, jnp.nan))
    after, metrics = grpo_step(before, base, bad, model=MODEL, optimizer=optimizer, config=config)
    assert metrics["updates/skipped"] == 1
    assert_trees_equal(after.lora, weights())


def test_reference_is_the_start():
    config = full(beta=0.1)
    frozen = weights()[WEIGHTS]
    after, metrics = step(config, frozen)
    assert metrics["kl"] == 0
    _, base, optimizer = start(config, frozen)
    _, later = grpo_step(after, base, batch(), model=MODEL, optimizer=optimizer, config=config)
    assert later["kl"] > 0


def test_online_dpo_trains_the_weights():
    after, metrics = step(full(algorithm="online_dpo"), weights()[WEIGHTS], online_dpo_step)
    assert float(metrics["loss"]) == pytest.approx(np.log(2) * float(metrics["pairs/valid"] > 0), rel=1e-4)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), after.lora, weights())))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, False),
        ({"beta": 0.1}, True),
        ({"algorithm": "online_dpo"}, True),
        ({"beta": 0.1, "reference_sync_steps": 5}, False),
    ],
)
def test_a_copy_of_the_start_exists_only_where_it_is_compared_with(values, kept):
    assert keeps_start(full(**values).algorithm) == kept


def test_what_is_trained_and_what_stays():
    policy = Policy(MODEL.clone(dtype=jnp.bfloat16), weights()[WEIGHTS], None, ())
    for keep in (False, True):
        stays, trained = starting_point(jax.random.key(0), FULL, policy, keep)
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(stays.base)} == ({"bfloat16"} if keep else set())


def test_rollout_uses_the_weights_or_their_cast():
    own = weights()[WEIGHTS]
    assert decoded(MODEL, {}, weights(), settings().rollout, (4, 6)) == (own, {}, None)
    wide = decoded(MODEL.clone(dtype=jnp.bfloat16), {}, weights(), settings().rollout, (4, 6))
    assert {leaf.dtype.name for name, leaf in wide.base.items() if name != "layers"} == {"bfloat16"}
    assert wide.base["layers"]["qkv"] is own["layers"]["qkv"]
    for name, layers in wide.merged.items():
        for layer, matrix in enumerate(layers):
            np.testing.assert_array_equal(matrix, own["layers"][name][layer].astype(jnp.bfloat16))


@pytest.mark.parametrize("layers", ["loop", "unrolled"])
def test_sampler_and_trainer_agree_in_16_bits(layers):
    model = MODEL.clone(dtype=jnp.bfloat16)
    config = dataclasses.replace(settings().rollout, decode_layers=layers)
    drawn = generate(model, {}, weights(), prompts(), jax.random.key(5), config, eos_ids=MANY_EOS, pad_id=PAD)
    logprobs = token_logprobs(model, {}, weights(), rows_of(drawn))[0].reshape(drawn.logprobs.shape)
    gap = jnp.abs(logprobs - drawn.policy_logprobs)[drawn.policy_mask]
    assert 0 < float(gap.mean()) < 0.03


def test_programs_of_a_rollout_are_compiled_beforehand(monkeypatch):
    monkeypatch.setattr(compaction, "MIN_ROWS", 2)
    given = (MODEL.clone(dtype=jnp.bfloat16), {}, weights(), prompts(), jax.random.key(5), settings().rollout)
    first, rest = lower_rollout(*given, eos_ids=MANY_EOS, pad_id=PAD)
    assert len(compile_all([first, *rest()])) > 1
    jax.block_until_ready(generate(*given, eos_ids=MANY_EOS, pad_id=PAD))
    counter = CompileCounter()
    for number in range(3):
        key = jax.random.key(6 + number)
        jax.block_until_ready(generate(*given[:4], key, given[5], eos_ids=MANY_EOS, pad_id=PAD))
    counter.close()
    assert counter.count == 0
