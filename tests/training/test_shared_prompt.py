"""A prompt computed once for its group: the same log-probabilities, loss and gradient as separate rows."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.models import Transformer
from jgrpo.models.shared_prompt import SharedPrompt
from jgrpo.training import grpo_step
from jgrpo.training.forward import rows_of
from jgrpo.training.forward import token_logprobs as eager_token_logprobs
from tests.training.setup import (
    COMPLETION,
    GENERATIONS,
    MODEL,
    PROMPT,
    QUESTIONS,
    batch,
    rollout,
    settings,
    state,
    tiny_base,
    trained_lora,
)

token_logprobs = partial(jax.jit, static_argnames=("model", "remat", "offload", "chunk", "group"))(eager_token_logprobs)


def shared(lengths=(3, 6, 5, 4)):
    return SharedPrompt(jnp.array(lengths), PROMPT, GENERATIONS)


def test_rows_are_prompt_then_completion_and_come_back():
    layout, total = shared(), PROMPT + GENERATIONS * COMPLETION
    sequences = jnp.arange(QUESTIONS * total).reshape(QUESTIONS, total)
    rows = layout.rows(sequences)
    assert rows.shape == (QUESTIONS * GENERATIONS, PROMPT + COMPLETION)
    for row, (question, generation) in enumerate(np.ndindex(QUESTIONS, GENERATIONS)):
        prompt = sequences[question, : int(layout.prompt_lengths[question])]
        start = PROMPT + generation * COMPLETION
        expected = np.concatenate([prompt, sequences[question, start : start + COMPLETION]])
        np.testing.assert_array_equal(rows[row, : len(expected)], expected)
        assert len(set(rows[row].tolist())) == rows.shape[1]
    np.testing.assert_array_equal(layout.sequences(rows), sequences)


def test_positions_are_those_of_the_rows():
    layout, total = shared(), PROMPT + GENERATIONS * COMPLETION
    positions = layout.rows(layout.positions(total))
    np.testing.assert_array_equal(positions, np.broadcast_to(np.arange(PROMPT + COMPLETION), positions.shape))


def test_gradient_of_the_layout_is_that_of_plain_indexing():
    layout, total = shared(), PROMPT + GENERATIONS * COMPLETION
    x = jax.random.normal(jax.random.key(0), (QUESTIONS, total, 3))
    weights = jax.random.normal(jax.random.key(1), (QUESTIONS * GENERATIONS, PROMPT + COMPLETION, 3))
    index = layout.rows(jnp.broadcast_to(jnp.arange(total), (QUESTIONS, total)))
    owner = jnp.repeat(jnp.arange(QUESTIONS), GENERATIONS)[:, None]
    ours = jax.grad(lambda x: jnp.sum(layout.rows(x) * weights))(x)
    np.testing.assert_allclose(ours, jax.grad(lambda x: jnp.sum(x[owner, index] * weights))(x), atol=1e-5)
    flipped = jax.grad(lambda rows: jnp.sum(layout.sequences(rows) * x))(weights)
    plain = jax.grad(lambda rows: jnp.sum(jnp.zeros_like(x).at[owner[::GENERATIONS], index[::GENERATIONS]].set(rows[::GENERATIONS])[:, :PROMPT] * x[:, :PROMPT]))(weights)  # fmt: skip
    used = jnp.arange(PROMPT + COMPLETION) < jnp.repeat(layout.prompt_lengths, GENERATIONS)[:, None]
    np.testing.assert_allclose(flipped * used[..., None], plain * used[..., None], atol=1e-6)


@pytest.mark.parametrize("group", [GENERATIONS, GENERATIONS // 2])
def test_logprobs_and_gradient_are_those_of_separate_rows(group):
    base, lora, rows = tiny_base(1.0), trained_lora(), rows_of(rollout())

    def gradient(group):
        def loss(lora):
            logprobs, entropy = token_logprobs(MODEL, base, lora, rows, group=group)
            return (logprobs**2).mean() + entropy.mean(), (logprobs, entropy)

        return jax.jit(jax.grad(loss, has_aux=True))(lora)

    (alone, expected), (together, got) = gradient(1), gradient(group)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, alone, together))
    assert difference <= 1e-5 * optax.tree.norm(alone)


def test_a_step_has_the_same_loss_and_gradient():
    """The whole step, with a reference, in microbatches of half a group."""

    def moments(share):
        config = settings(share_prompt=share, microbatch_size=GENERATIONS // 2, beta=0.1, max_grad_norm=1e9)
        before, optimizer = state(trained_lora(), config)
        after, metrics = grpo_step(before, tiny_base(1.0), batch(), model=MODEL, optimizer=optimizer, config=config)
        return after.opt_state[1].inner_state[0].mu, metrics

    (alone, expected), (together, got) = moments(False), moments(True)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, alone, together))
    assert difference <= 1e-5 * optax.tree.norm(alone)
    for name in ("loss", "kl", "entropy", "grad_norm"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-7)


def test_rule_of_what_is_shared():
    for size, expected in ((16, 4), (4, 4), (2, 2), (1, 1), (6, 2)):
        rows = jax.tree.map(lambda array, size=size: array[:size], rows_of(rollout()))
        assert rows.prompt_group == expected


def test_fewer_positions_are_computed():
    """The residual stream is P + G·C long, in every array of the program."""
    rows = rows_of(rollout())

    def shapes(group):
        program = token_logprobs.lower(MODEL, tiny_base(), trained_lora(), rows, group=group).as_text()
        return f"tensor<{QUESTIONS * GENERATIONS}x{PROMPT + COMPLETION}x32xf32>" in program, (
            f"tensor<{QUESTIONS}x{PROMPT + GENERATIONS * COMPLETION}x32xf32>" in program
        )

    # Attention's own rows are [B, T, heads, 8]; 32 wide is the residual stream.
    assert shapes(1) == (True, False)
    assert shapes(GENERATIONS) == (False, True)


def test_dropout_is_drawn_once_for_the_shared_prompt():
    model = dataclasses.replace(MODEL, lora=dataclasses.replace(MODEL.lora, lora_dropout=0.5))
    rows, how = rows_of(rollout()), dict(group=GENERATIONS, dropout_key=jax.random.key(1))
    dropped, _ = token_logprobs(model, tiny_base(), trained_lora(), rows, **how)
    again, _ = token_logprobs(model, tiny_base(), trained_lora(), rows, **how)
    plain, _ = token_logprobs(model, tiny_base(), trained_lora(), rows, group=GENERATIONS)
    np.testing.assert_array_equal(dropped, again)
    assert jnp.any(dropped != plain)
    # The first token depends on the prompt alone: its distribution, so its entropy, is one for the whole group.
    _, entropy = token_logprobs(model, tiny_base(), trained_lora(), rows, **how)
    first = entropy[:, 0].reshape(QUESTIONS, GENERATIONS)
    np.testing.assert_allclose(first, jnp.broadcast_to(first[:, :1], first.shape), rtol=1e-6)


def test_layer_inputs_move_to_the_host():
    """In the program for a GPU, one stack of them, and with the same gradient (a CPU's memory is the host's)."""
    base, lora, rows = tiny_base(1.0), trained_lora(), rows_of(rollout())

    def gradient(offload):
        loss = lambda lora: (token_logprobs(MODEL, base, lora, rows, offload=offload)[0] ** 2).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))

    def on_gpu(offload):
        return gradient(offload).trace(lora).lower(lowering_platforms=("cuda",)).as_text()

    assert "pinned_host" not in on_gpu(False)
    moves = [line for line in on_gpu(True).splitlines() if "annotate_device_placement" in line]
    inputs = f"tensor<{len(rows.prompt_lengths)}x{PROMPT + COMPLETION}x32xf32>"
    assert any("pinned_host" in line and inputs in line for line in moves)
    kept, moved = gradient(False)(lora), gradient(True)(lora)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


def test_sliding_windows_see_rows_not_sequences():
    config = dataclasses.replace(MODEL.config, windows=(4, 4))
    model = Transformer(config, MODEL.lora)
    rows = rows_of(rollout())
    alone, together = (token_logprobs(model, tiny_base(), trained_lora(), rows, group=g)[0] for g in (1, GENERATIONS))
    full = token_logprobs(MODEL, tiny_base(), trained_lora(), rows)[0]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert jnp.abs(alone - full).max() > 1e-3
