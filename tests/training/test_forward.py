"""The training forward is the sampler's policy, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.models import ModelConfig, Transformer
from jgrpo.quantization import Int4Weight, NF4Weight, dequantize, quantize
from jgrpo.training import forward
from jgrpo.training.forward import logprob_chunk, packed_head_chunks, packed_tokens, rows_of
from tests.training.setup import (
    EOS,
    GENERATIONS,
    MODEL,
    PROMPT,
    fresh_lora,
    rollout,
    settings,
    tiny_base,
    token_logprobs,
    trained_lora,
)


def test_rows_are_contiguous():
    drawn = rollout()
    tokens, lengths = packed_tokens(rows_of(drawn))
    for row, (question, generation) in enumerate(np.ndindex(drawn.completion_lengths.shape)):
        prompt_length = int(drawn.prompt_lengths[question])
        completion_length = int(drawn.completion_lengths[question, generation])
        prompt = drawn.prompt_tokens[question, :prompt_length]
        completion = drawn.completion_tokens[question, generation, :completion_length]
        assert lengths[row] == prompt_length + completion_length
        np.testing.assert_array_equal(tokens[row, : lengths[row]], np.concatenate([prompt, completion]))


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02}]
)
def test_sampler_and_trainer_agree_on_every_token(sampling):
    lora, config = trained_lora(), settings(**sampling)
    drawn = rollout(config=config.rollout)
    logprobs, _ = token_logprobs(MODEL, tiny_base(), lora, rows_of(drawn), temperature=config.rollout.temperature)
    np.testing.assert_allclose(logprobs.reshape(drawn.logprobs.shape), drawn.policy_logprobs, atol=2e-5)


def test_logprobs_are_the_full_softmax():
    """Against logits of the whole row and a log-softmax, gathered by hand."""
    lora, base = trained_lora(), tiny_base()
    rows = rows_of(rollout())
    tokens, lengths = packed_tokens(rows)
    variables = {"params": base, "lora": lora}
    logits = MODEL.apply(variables, MODEL.apply(variables, tokens, lengths), method="logits")
    log_p = jax.nn.log_softmax(logits / 0.8)
    logprobs, entropy = token_logprobs(MODEL, base, lora, rows, temperature=0.8, chunk=7)
    for row in range(tokens.shape[0]):
        for c in range(int(rows.completion_mask[row].sum())):
            position = int(rows.prompt_lengths[row]) + c
            expected = log_p[row, position - 1]
            np.testing.assert_allclose(logprobs[row, c], expected[tokens[row, position]], atol=1e-5)
            np.testing.assert_allclose(entropy[row, c], -jnp.sum(jnp.exp(expected) * expected), atol=1e-5)


def test_nothing_outside_the_mask():
    rows = rows_of(rollout())
    logprobs, entropy = token_logprobs(MODEL, tiny_base(), trained_lora(), rows)
    assert not rows.completion_mask.all()
    assert jnp.all(jnp.where(rows.completion_mask, 0, logprobs) == 0)
    assert jnp.all(jnp.where(rows.completion_mask, 0, entropy) == 0)


def test_padding_does_not_matter():
    rows = rows_of(rollout())
    garbage = dataclasses.replace(
        rows,
        prompt_tokens=jnp.where(jnp.arange(PROMPT) < rows.prompt_lengths[:, None], rows.prompt_tokens, 17),
        completion_tokens=jnp.where(rows.completion_mask, rows.completion_tokens, 33),
    )
    one, other = (token_logprobs(MODEL, tiny_base(), trained_lora(), r)[0] for r in (rows, garbage))
    np.testing.assert_array_equal(one, other)


def test_eos_gets_gradient():
    """The end-of-sequence token is in the mask and its log-probability can be trained."""
    lora, base = trained_lora(), tiny_base()
    # Every id ends a completion: each row is one token long, and that token is its EOS.
    drawn = rollout(eos=tuple(range(EOS + 1)))
    assert drawn.completion_mask.sum() == drawn.completion_lengths.size
    grads = jax.grad(lambda lora: token_logprobs(MODEL, base, lora, rows_of(drawn))[0].sum())(lora)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_adapter_off_is_the_reference():
    """At B = 0 the policy is the base model, and with B ≠ 0 it is not."""
    rows, base = rows_of(rollout()), tiny_base()
    reference, _ = token_logprobs(MODEL, base, {}, rows)
    np.testing.assert_array_equal(token_logprobs(MODEL, base, fresh_lora(), rows)[0], reference)
    assert jnp.abs(token_logprobs(MODEL, base, trained_lora(), rows)[0] - reference).max() > 1e-2


def test_remat_and_chunks_change_nothing():
    lora, base = trained_lora(), tiny_base()
    rows = rows_of(rollout())

    def gradient(**how):
        return jax.grad(lambda lora: (token_logprobs(MODEL, base, lora, rows, **how)[0] ** 2).mean())(lora)

    plain, thrifty = gradient(remat=False, chunk=10_000), gradient(remat=True, chunk=GENERATIONS)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(thrifty), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bytes_each"), [(jnp.float32, 8), (jnp.bfloat16, 6)])
def test_workspace_bounds_the_bytes_of_a_chunk(dtype, bytes_each):
    model = dataclasses.replace(MODEL, dtype=dtype)
    for workspace in (0.003, 0.1, 1.0, 256.0):
        chunk = logprob_chunk(model, workspace)
        assert chunk * model.config.vocab_size * bytes_each <= workspace * 1e6
        # Nothing is left over but the rounding to whole tiles.
        assert (chunk + (64 if chunk >= 64 else 1)) * model.config.vocab_size * bytes_each > workspace * 1e6
    assert logprob_chunk(model, 1e-9) == 1


def test_a_packed_head_is_read_in_slices(monkeypatch):
    """Log-probabilities, entropy and gradient of an int4 embedding are those of its values, whatever the slices."""
    base, rows, lora = tiny_base(), rows_of(rollout()), trained_lora()
    packed = quantize(base["embed"], 32)

    def run(embed, chunk):
        def loss(lora):
            logprobs, entropy = token_logprobs(MODEL, {**base, "embed": embed}, lora, rows, chunk=chunk)
            return (logprobs**2 + 0.3 * entropy).mean(), (logprobs, entropy)

        return jax.grad(loss, has_aux=True)(lora)

    wanted = run(dequantize(packed), 1000)
    monkeypatch.setattr(forward, "VOCABULARY_MULTIPLE", 8)
    for chunk, blocks in ((10, (12, 8)), (40, (30, 32))):
        assert packed_head_chunks(MODEL.config, 4, chunk) == blocks
        for got, want in zip(jax.tree.leaves(run(packed, chunk)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["zero-points", "nf4"])
def test_a_head_that_came_quantized_is_its_own_values(kind):
    """With zero-points or in NF4, as GPTQ, AWQ and bitsandbytes may store it: the log-probabilities of the dequantized head."""
    rng = np.random.default_rng(3)
    shape = ModelConfig("qwen2", 96, 64, 64, 1, 2, 1, 32, tie_embeddings=True)
    packed, scales = rng.integers(0, 256, (96, 32), np.uint8), rng.uniform(0.02, 0.1, (96, 2)).astype(np.float32)
    zeros = jnp.asarray(rng.integers(0, 16, (96, 2), np.uint8))
    pair = jnp.asarray(packed), jnp.asarray(scales)
    head = Int4Weight(*pair, zeros) if kind == "zero-points" else NF4Weight(*pair)
    hidden = jnp.asarray(rng.normal(size=(1, 5, 64)), jnp.float32)
    targets, mask = jnp.asarray(rng.integers(0, 96, (1, 5))), jnp.ones((1, 5), bool)
    how = dict(temperature=1.0, chunk=2)
    got, entropy = forward.head_logprobs(Transformer(shape), {"params": {"embed": head}}, hidden, targets, mask, **how)
    log_p = jax.nn.log_softmax(hidden @ dequantize(head, jnp.float32).T)
    np.testing.assert_allclose(got, jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(entropy, -(jnp.exp(log_p) * log_p).sum(-1), atol=1e-5)


@pytest.mark.parametrize("name", ["llama-3.3-70b", "llama-3.1-8b", "qwen2.5-1.5b"])
@pytest.mark.parametrize("workspace", [64, 256, 1024])
def test_workspace_bounds_a_packed_head(name, workspace):
    """Its slice, the slice's logits and their gradient, and the hidden states' gradient in float32, twice."""
    shape = {"llama-3.3-70b": (128_256, 8192), "llama-3.1-8b": (128_256, 4096), "qwen2.5-1.5b": (151_936, 1536)}[name]
    model = Transformer(ModelConfig("llama", *shape, 64, 1, 1, 1, 8), dtype=jnp.bfloat16)
    chunk = logprob_chunk(model, workspace)
    positions, entries = packed_head_chunks(model.config, 2, chunk)
    used = entries * shape[1] * 2 + positions * (entries * (4 + 2) + 8 * shape[1])
    assert 0.6 * workspace * 1e6 < used <= workspace * 1e6
    assert positions % 64 == entries % 128 == 0


def test_dropout_is_drawn_from_its_key():
    model = dataclasses.replace(MODEL, lora=dataclasses.replace(MODEL.lora, lora_dropout=0.5))
    rows, base, lora = rows_of(rollout()), tiny_base(), trained_lora()
    off, one, same, other = (
        token_logprobs(model, base, lora, rows, dropout_key=None if seed is None else jax.random.key(seed))[0]
        for seed in (None, 1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert jnp.any(one != other)
    assert jnp.any(one != off)
