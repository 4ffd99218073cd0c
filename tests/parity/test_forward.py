"""Forward passes against transformers, float32, on every family."""

import functools

import jax
import numpy as np
import torch

import pallas_kernels
from jgrpo.models import KVCache
from jgrpo.models.attention import QUERY_BLOCK

from .conftest import (
    assert_same_logits,
    build_case,
    hidden_states,
    make_tokens,
    our_logits,
    real,
    their_logits,
    to_logits,
)


def test_logits_of_padded_rows_equal_transformers_row_by_row(case):
    tokens, lengths = make_tokens()
    ours = our_logits(case.model(), case.base, {}, tokens, lengths)
    assert_same_logits(ours, their_logits(case.theirs, tokens, lengths))


def test_rows_longer_than_a_block_of_queries(tmp_path_factory):
    case = build_case("qwen2-mixed-windows", tmp_path_factory)
    tokens = np.random.default_rng(5).integers(0, 263, (2, QUERY_BLOCK + 44), dtype=np.int32)
    lengths = np.asarray([QUERY_BLOCK + 44, QUERY_BLOCK + 1], np.int32)
    ours = our_logits(case.model(), case.base, {}, tokens, lengths)
    assert_same_logits(ours, their_logits(case.theirs, tokens, lengths))


def test_padding_changes_nothing(case):
    tokens, lengths = make_tokens()
    other = np.where(real(tokens, lengths), tokens, 7)
    args = case.model(), case.base, {}
    np.testing.assert_array_equal(our_logits(*args, tokens, lengths), our_logits(*args, other, lengths))


def test_token_logprobs_equal_log_softmax_of_transformers(case):
    tokens, lengths = make_tokens(1)
    temperature = 0.7
    hidden = np.asarray(hidden_states(case.model(), case.base, {}, tokens, lengths))
    head = case.base["embed"] if case.config.tie_embeddings else case.base["head"]
    predicting = real(tokens[:, 1:], lengths - 1)
    ours, entropy = pallas_kernels.token_logprobs(
        hidden[:, :-1][predicting],
        head,
        tokens[:, 1:][predicting],
        temperature=temperature,
        softcap=case.config.logit_softcap,
        chunk=16,
    )
    logprobs, entropies = [], []
    for row, n in zip(tokens, lengths, strict=True):
        ids = torch.tensor(row[None, :n], dtype=torch.long)
        with torch.no_grad():
            table = torch.log_softmax(case.theirs(ids).logits[0, :-1] / temperature, -1)
        logprobs.append(table.gather(-1, ids[0, 1:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    np.testing.assert_allclose(ours, torch.cat(logprobs), rtol=0, atol=1e-4)
    np.testing.assert_allclose(entropy, torch.cat(entropies), rtol=0, atol=1e-4)


def test_prefill_and_cached_decode_equal_the_full_forward(case):
    prompt_lengths, generations, steps = np.asarray([19, 3, 11], np.int32), 2, 6
    rng = np.random.default_rng(2)
    prompts = rng.integers(0, 263, (3, 19), dtype=np.int32)
    completions = rng.integers(0, 263, (3, generations, steps), dtype=np.int32)
    model, variables = case.model(), {"params": case.base, "lora": {}}

    hidden, kv = jax.jit(functools.partial(model.apply, method="prefill"))(variables, prompts, prompt_lengths)
    cache = KVCache.create(kv, prompt_lengths, generations, steps)
    step = jax.jit(functools.partial(model.apply, method="decode"))
    first, cached = to_logits(model, case.base, hidden), []
    for c in range(steps):
        hidden, cache = step(variables, completions[:, :, c], cache)
        cached.append(to_logits(model, case.base, hidden))

    for q, n in enumerate(prompt_lengths):
        for g in range(generations):
            row = np.concatenate([prompts[q, :n], completions[q, g]])
            expected = their_logits(case.theirs, row[None], np.asarray([len(row)]))
            np.testing.assert_allclose(first[q], expected[n - 1], rtol=0, atol=1e-4)
            np.testing.assert_allclose([step[q, g] for step in cached], expected[n:], rtol=0, atol=1e-4)
