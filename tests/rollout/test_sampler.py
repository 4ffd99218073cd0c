"""The decode loop against the full forward, against itself in other batches, and against `transformers`."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.config import QuantizationConfig, RolloutConfig
from jgrpo.models import Transformer
from jgrpo.rollout import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout, generate, stream, truncate
from jgrpo.rollout.sampler import Setup, chunking
from tests.rollout.conftest import Policy
from tests.tiny_checkpoints import make_checkpoint

PAD = 0
CONFIG = RolloutConfig(num_generations=3, max_completion_length=41)
STOPS = tuple(range(5, 97, 24))
TRANSFORMS = [
    dict(),
    dict(top_p=0.7, temperature=1.3),
    dict(min_p=0.05, top_k=20, top_p=0.9),
    dict(temperature=0.0),
]


def sample(policy: Policy, prompts: Prompts, seed: int = 1, eos_ids: tuple[int, ...] = STOPS, **settings) -> Rollout:
    config = dataclasses.replace(CONFIG, **settings)
    return generate(*policy, prompts, jax.random.key(seed), config, eos_ids=eos_ids, pad_id=PAD)


@functools.partial(jax.jit, static_argnames="model")
def _forward(model: Transformer, variables: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.apply(variables, model.apply(variables, tokens, lengths), method="logits")


def full_logits(policy: Policy, rollout: Rollout) -> np.ndarray:
    """Logits [Q, G, C, V] that predict each completion token, from the forward without a cache."""
    variables = {"params": policy.base, "lora": policy.lora}
    _, group, limit = rollout.completion_tokens.shape
    starts = np.asarray(rollout.prompt_lengths)
    tokens = np.zeros((len(starts), group, rollout.prompt_tokens.shape[1] + limit), np.int32)
    for q, start in enumerate(starts):
        tokens[q, :, :start] = rollout.prompt_tokens[q, :start]
        tokens[q, :, start : start + limit] = rollout.completion_tokens[q]
    lengths = starts[:, None] + rollout.completion_lengths
    flat = _forward(policy.model, variables, tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1))
    logits = np.asarray(flat).reshape(*tokens.shape, -1)
    return np.stack([logits[q, :, start - 1 : start - 1 + limit] for q, start in enumerate(starts)])


@pytest.mark.parametrize("settings", TRANSFORMS, ids=str)
def test_logprobs_are_those_of_the_full_forward_under_the_same_transforms(
    policy: Policy, prompts: Prompts, settings: dict
) -> None:
    rollout = sample(policy, prompts, **settings)
    temperature = settings.get("temperature", 1.0) or 1.0
    logits = jnp.asarray(full_logits(policy, rollout)) / temperature
    cuts = {name: value for name, value in settings.items() if name != "temperature"}
    cuts = dict(top_k=1) if settings.get("temperature") == 0.0 else cuts
    mask = np.asarray(rollout.completion_mask)
    assert mask.sum() > 100

    def picked(values: jax.Array) -> np.ndarray:
        logp = jax.nn.log_softmax(values)
        return np.asarray(jnp.take_along_axis(logp, rollout.completion_tokens[..., None], axis=-1)[..., 0])[mask]

    np.testing.assert_allclose(np.asarray(rollout.logprobs)[mask], picked(truncate(logits, **cuts)), atol=1e-4)
    np.testing.assert_allclose(np.asarray(rollout.policy_logprobs)[mask], picked(logits), atol=1e-4)
    assert not np.asarray(rollout.logprobs)[~mask].any()
    assert not np.asarray(rollout.log_kept)[~mask].any()


def test_greedy_follows_the_argmax_of_the_full_forward(policy: Policy, prompts: Prompts) -> None:
    rollout = sample(policy, prompts, temperature=0.0)
    expected = full_logits(policy, rollout).argmax(-1)
    mask = np.asarray(rollout.completion_mask)
    np.testing.assert_array_equal(np.asarray(rollout.completion_tokens)[mask], expected[mask])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_is_the_greedy_of_transformers(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / family, family)
    config = load_model_config(path)
    base = load_base(path, config, QuantizationConfig(quantization="none"))
    prompts = Prompts(jax.random.randint(jax.random.key(0), (3, 9), 0, 256), jnp.asarray([9, 4, 6]))
    rollout = sample(Policy(Transformer(config), base, {}), prompts, temperature=0.0, eos_ids=(), num_generations=1)
    reference = AutoModelForCausalLM.from_pretrained(path)
    for q, length in enumerate(prompts.lengths.tolist()):
        ids = torch.tensor(np.asarray(prompts.tokens[q : q + 1, :length]))
        options = dict(
            do_sample=False, max_new_tokens=CONFIG.max_completion_length, eos_token_id=None, pad_token_id=PAD
        )
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, length:]
        np.testing.assert_array_equal(rollout.completion_tokens[q, 0], expected.numpy())


def test_top_k_one_is_greedy(policy: Policy, prompts: Prompts) -> None:
    greedy, top = sample(policy, prompts, temperature=0.0), sample(policy, prompts, top_k=1, temperature=2.0)
    np.testing.assert_array_equal(greedy.completion_tokens, top.completion_tokens)
    np.testing.assert_allclose(top.logprobs, 0.0, atol=1e-6)


def test_mask_ends_with_the_first_stop_token(policy: Policy, prompts: Prompts) -> None:
    rollout = jax.tree.map(np.asarray, sample(policy, prompts))
    limit = CONFIG.max_completion_length
    assert {FINISH_STOP, FINISH_LENGTH} == set(rollout.finish.ravel().tolist())
    for q, g in np.ndindex(rollout.finish.shape):
        tokens, length = rollout.completion_tokens[q, g], rollout.completion_lengths[q, g]
        stops = np.flatnonzero(np.isin(tokens[:length], STOPS))
        np.testing.assert_array_equal(rollout.completion_mask[q, g], np.arange(limit) < length)
        np.testing.assert_array_equal(tokens[length:], PAD)
        if rollout.finish[q, g] == FINISH_STOP:
            assert stops.tolist() == [length - 1]
        else:
            assert length == limit
            assert stops.size == 0


def test_pad_that_is_also_a_stop_id_stays_in_the_mask(policy: Policy, prompts: Prompts) -> None:
    """The mask is made while drawing: a drawn stop token counts although padding looks the same."""
    pad = STOPS[0]
    config = dataclasses.replace(CONFIG, num_generations=16)
    rollout = generate(*policy, prompts, jax.random.key(1), config, eos_ids=(pad,), pad_id=pad)
    tokens, lengths = np.asarray(rollout.completion_tokens), np.asarray(rollout.completion_lengths)
    stopped = np.asarray(rollout.finish) == FINISH_STOP
    assert stopped.any()
    last = np.take_along_axis(tokens, lengths[..., None] - 1, axis=-1)[..., 0]
    assert (last[stopped] == pad).all()


def test_stop_token_ids_of_the_config_stop_too(policy: Policy) -> None:
    config = dataclasses.replace(CONFIG, stop_token_ids=(9, 2))
    assert Setup.create(policy.model, config, (4, 9), PAD).stop_ids == (2, 4, 9)


def test_same_key_same_tokens_and_another_key_other_tokens(policy: Policy, prompts: Prompts) -> None:
    first, again, other = (sample(policy, prompts, seed).completion_tokens for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any(axis=-1).all()


def test_completions_of_a_group_differ(policy: Policy, prompts: Prompts) -> None:
    tokens = np.asarray(sample(policy, prompts, eos_ids=()).completion_tokens)
    for group in tokens:
        assert len({row.tobytes() for row in group}) == len(group)


def test_steps_and_rows_draw_independently(policy: Policy, prompts: Prompts) -> None:
    """With equal logits everywhere a token says which random number it was drawn with."""
    flat = policy._replace(base={**policy.base, "head": jnp.zeros_like(policy.base["head"])})
    tokens = np.asarray(sample(flat, prompts, eos_ids=()).completion_tokens).reshape(15, -1)
    vocab, (rows, steps) = 97, tokens.shape
    assert scipy.stats.chisquare(np.bincount(tokens.ravel(), minlength=vocab)).pvalue > 1e-3
    # Neighbours in time and rows beside each other are equal as often as chance has it, 1 in 97.
    assert (tokens[:, 1:] == tokens[:, :-1]).sum() < 4 * rows * steps / vocab
    assert (tokens[1:] == tokens[:-1]).sum() < 4 * rows * steps / vocab


def test_prompts_of_different_lengths_together_equal_each_alone(policy: Policy, prompts: Prompts) -> None:
    """Alone with the padding filled by other tokens, which nothing may read."""
    together = sample(policy, prompts, temperature=0.0)
    padding = jnp.arange(prompts.tokens.shape[1]) >= prompts.lengths[:, None]
    filled = Prompts(jnp.where(padding, 96 - prompts.tokens, prompts.tokens), prompts.lengths)
    for q in range(len(prompts.lengths)):
        alone = sample(policy, jax.tree.map(lambda x, q=q: x[q : q + 1], filled), temperature=0.0)
        np.testing.assert_array_equal(together.completion_tokens[q], alone.completion_tokens[0])
        np.testing.assert_allclose(together.policy_logprobs[q], alone.policy_logprobs[0], atol=1e-4)


def test_a_row_draws_the_same_whatever_batch_and_limit_it_is_in(policy: Policy, prompts: Prompts) -> None:
    large = sample(policy, prompts)
    small = sample(policy, jax.tree.map(lambda x: x[:2], prompts), max_completion_length=17)
    np.testing.assert_array_equal(large.completion_tokens[:2, :, :17], small.completion_tokens)


@pytest.mark.parametrize("chunk", [7, 64])
def test_early_exit_changes_nothing(policy: Policy, prompts: Prompts, chunk: int) -> None:
    """`generate` leaves when every row is done; chunks of other sizes leave elsewhere, or not at all (64)."""
    stops = tuple(range(0, 97, 4))
    rollout = sample(policy, prompts, eos_ids=stops)
    assert int(rollout.completion_lengths.max()) < 32 < CONFIG.max_completion_length
    pieces = list(stream(*policy, prompts, jax.random.key(1), CONFIG, eos_ids=stops, pad_id=PAD, chunk=chunk))
    streamed = jax.tree.map(lambda *parts: np.moveaxis(np.concatenate(parts), 0, -1), *pieces)
    steps = min(streamed.token.shape[-1], CONFIG.max_completion_length)
    assert (steps < CONFIG.max_completion_length) == (chunk < 64)
    np.testing.assert_array_equal(streamed.token[..., :steps], rollout.completion_tokens[..., :steps])
    np.testing.assert_array_equal(streamed.live[..., :steps], rollout.completion_mask[..., :steps])
    np.testing.assert_allclose(streamed.logprob[..., :steps], rollout.logprobs[..., :steps], atol=1e-5)
    assert not np.asarray(rollout.completion_mask[..., steps:]).any()


@pytest.mark.parametrize("limit", [1, 33])
def test_every_length_limit(policy: Policy, prompts: Prompts, limit: int) -> None:
    """A limit that chunks divide and one that they overshoot: exactly `limit` tokens, all of them counted."""
    rollout = sample(policy, prompts, eos_ids=(), max_completion_length=limit)
    assert rollout.completion_tokens.shape == (5, 3, limit)
    assert np.asarray(rollout.completion_mask).all()
    assert (np.asarray(rollout.finish) == FINISH_LENGTH).all()
    longer = sample(policy, prompts, eos_ids=())
    np.testing.assert_array_equal(rollout.completion_tokens, longer.completion_tokens[..., :limit])


def test_rows_with_limits_of_their_own(policy: Policy, prompts: Prompts) -> None:
    """Each row is what it is without a limit, cut off; the loop ends with the longest."""
    limits = jnp.arange(15, dtype=jnp.int32).reshape(5, 3) + 1
    call = dict(eos_ids=STOPS, pad_id=PAD)
    rollout = generate(*policy, prompts, jax.random.key(1), CONFIG, row_limits=limits, **call)
    free = sample(policy, prompts)
    np.testing.assert_array_equal(rollout.completion_lengths, np.minimum(free.completion_lengths, limits))
    mask = np.asarray(rollout.completion_mask)
    np.testing.assert_array_equal(np.asarray(rollout.completion_tokens)[mask], np.asarray(free.completion_tokens)[mask])
    stopped = (np.asarray(free.finish) == FINISH_STOP) & np.asarray(free.completion_lengths <= limits)
    np.testing.assert_array_equal(np.asarray(rollout.finish) == FINISH_STOP, stopped)


@pytest.mark.parametrize("limit", [1, 2, 32, 33, 34, 96, 100, 512, 1000])
def test_chunks_overshoot_by_less_than_their_number(limit: int) -> None:
    size, count = chunking(limit, 32)
    assert 1 <= size <= 32
    assert 0 <= size * count - limit < count


def test_the_adapter_changes_the_policy_and_an_empty_one_is_the_base(policy: Policy, prompts: Prompts) -> None:
    zero = jax.tree.map(jnp.zeros_like, policy.lora)
    with_zero = sample(policy._replace(lora=zero), prompts)
    without = sample(policy._replace(lora={}), prompts)
    np.testing.assert_array_equal(with_zero.completion_tokens, without.completion_tokens)
    assert (np.asarray(sample(policy, prompts).completion_tokens) != np.asarray(without.completion_tokens)).any()
