"""Completions packed without their padding: the same log-probabilities, loss and gradient, on fewer positions."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgrpo.models.packed_rows import PackedRows
from jgrpo.training import TrainState, forward
from jgrpo.training.algorithms import ALGORITHMS
from jgrpo.training.forward import at_length, rows_of
from jgrpo.training.reference import completion_kl
from jgrpo.training.step import length_buckets
from tests.training.setup import (
    COMPLETION,
    GENERATIONS,
    MODEL,
    PROMPT,
    QUESTIONS,
    batch,
    cached_optimizer,
    rollout,
    settings,
    tiny_base,
    token_logprobs,
    trained_lora,
)
from tests.training.test_ppo import critic

ROWS = QUESTIONS * GENERATIONS
BUCKETS = 2
"""Used by no other test: programs are cached by it, and not by what `small_steps` changes."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Buckets for shapes as small as the tests'."""
    monkeypatch.setattr(forward, "BUCKET_POSITIONS", 1)


LENGTHS = (3, 0, 10, 1, 5, 10, 0, 2)


def layout(capacity=40, group=4, lengths=LENGTHS):
    prompts = jnp.repeat(jnp.array([3, 6, 5, 4, 2, 1, 6, 3])[: len(lengths) // group], group)
    how = dict(width=PROMPT, limit=COMPLETION, group=group, capacity=capacity)
    return PackedRows.create(prompts, jnp.array(lengths), **how)


@pytest.mark.parametrize(("capacity", "group"), [(40, 4), (31, 4), (80, 1)], ids=["room", "full", "rows alone"])
def test_rows_are_prompt_then_completion_and_come_back(capacity, group):
    packed = layout(capacity, group)
    total = packed.prompts + capacity
    sequence = 1 + jnp.arange(total)[None]
    rows = np.asarray(packed.rows(sequence))
    used, start = np.zeros(total, bool), packed.prompts
    for row, length in enumerate(LENGTHS):
        prompt_length = int(packed.prompt_lengths[row])
        first = row // group * PROMPT
        prompt, completion = np.arange(first, first + prompt_length), np.arange(start, start + length)
        expected = 1 + np.concatenate([prompt, completion])
        np.testing.assert_array_equal(rows[row, : len(expected)], expected)
        used[expected - 1] = True
        start += length
    np.testing.assert_array_equal(packed.sequences(jnp.asarray(rows))[0][used], np.asarray(sequence)[0][used])
    positions = np.asarray(packed.rows(packed.positions(total)))
    for row, length in enumerate(LENGTHS):
        end = int(packed.prompt_lengths[row]) + length
        np.testing.assert_array_equal(positions[row, :end], np.arange(end))


def test_completions_are_packed_and_unpacked():
    packed, values = layout(), 1.0 + jnp.arange(len(LENGTHS) * COMPLETION).reshape(-1, COMPLETION)
    flat = packed.pack(values)
    expected = np.concatenate([values[row, :length] for row, length in enumerate(LENGTHS)])
    np.testing.assert_array_equal(flat[: sum(LENGTHS)], expected)
    assert not flat[sum(LENGTHS) :].any()
    mask = np.arange(COMPLETION) < np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(packed.unpack(flat), np.where(mask, values, 0))


def plain(packed, total):
    """The three ways of a layout as plain indexing, whose gradient JAX makes."""
    index, mask = packed.index, (packed.in_prompt | packed.in_completion)[..., None]
    owner, offset = packed.row, packed.offset
    places = packed.prompt_lengths[owner] + offset

    def rows(x):
        return jnp.where(mask, x[0][index], 0)

    def predicting(x):
        before = jnp.where(mask, jnp.roll(x[0][index], 1, axis=1), 0)
        return jnp.where(packed.used[:, None], before[owner, places], 0)

    return rows, predicting


@pytest.mark.parametrize("way", ["rows", "predicting", "sequences", "unpack"])
def test_gradients_of_the_layout_are_those_of_plain_indexing(way):
    packed, total = layout(), 2 * PROMPT + 40
    rows, predicting = plain(packed, total)
    x = jax.random.normal(jax.random.key(0), (1, total, 3))
    weights = jax.random.normal(jax.random.key(1), (len(LENGTHS), PROMPT + COMPLETION, 3))
    mask = jnp.arange(PROMPT + COMPLETION) < (packed.prompt_lengths + packed.completion_lengths)[:, None]
    weights = weights * mask[..., None]
    if way == "rows":
        pair = [lambda x: (packed.rows(x) * weights).sum(), lambda x: (rows(x) * weights).sum()]
    elif way == "predicting":
        kept = packed.used[:, None] * x[0, :40]
        pair = [lambda x: (packed.predicting(x) * kept).sum(), lambda x: (predicting(x) * kept).sum()]
    elif way == "sequences":
        # The transpose of `rows`, but that a prompt's copies count once: <sequences(w), x> = <w, rows(x) without copies>.
        wanted, expected = weight_of(packed, x), first_copies(packed, rows(x))
        pair = [lambda w: (packed.sequences(w) * wanted).sum(), lambda w: (w * expected).sum()]
        x = weights
    else:
        x = x[0, :40, 0]
        chosen = jax.random.normal(jax.random.key(2), (len(LENGTHS), COMPLETION))
        owner = packed.row * COMPLETION + packed.offset
        pair = [
            lambda x: (packed.unpack(x) * chosen).sum(),
            lambda x: (x * jnp.where(packed.used, chosen.reshape(-1)[owner], 0)).sum(),
        ]
    ours, expected = (jax.grad(function)(x) for function in pair)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def weight_of(packed, x):
    """x where the sequence holds a token, 0 in its padding."""
    prompts = jnp.arange(PROMPT) < packed.prompt_lengths[:: packed.group, None]
    return x * jnp.concatenate([prompts.reshape(-1), packed.used])[None, :, None]


def first_copies(packed, rows):
    first = (jnp.arange(rows.shape[0]) % packed.group == 0)[:, None]
    return jnp.where((packed.in_prompt & ~first)[..., None], 0, rows)


def assert_same(one, other, rel=1e-6):
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, one, other))
    assert difference <= rel * optax.tree.norm(other)


@pytest.mark.parametrize("group", [GENERATIONS, 1])
def test_logprobs_and_entropies_are_those_of_padded_rows(group):
    rows = rows_of(rollout())
    run = partial(jax.jit, static_argnames=("group",))(partial(forward.token_logprobs, MODEL))
    expected = token_logprobs(MODEL, tiny_base(), trained_lora(), rows)
    packed = rows.replace(capacity=int(rows.completion_mask.sum()) + 3)
    got = run(tiny_base(), trained_lora(), packed, group=group)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


def test_the_smallest_bucket_that_holds_the_rows_is_taken():
    rows = rows_of(rollout(), 5)
    assert rows.capacities == (32, 64, 96, 128, 160)
    taken = jax.jit(lambda rows: at_length(lambda rows: jnp.int32(rows.capacity), rows))
    for tokens, expected in ((0, 32), (32, 32), (33, 64), (160, 160)):
        mask = tokens > jnp.arange(ROWS * COMPLETION).reshape(COMPLETION, ROWS).T
        assert taken(rows.replace(completion_mask=mask)) == expected


CASES = {
    "grpo": {"beta": 0.1},
    "off policy": {"num_iterations": 2, "num_minibatches": 2, "microbatch_size": 4, "share_prompt": False},
    "ppo": {"algorithm": "ppo", "beta": 0.05, "num_iterations": 2},
    "online_dpo": {"algorithm": "online_dpo", "microbatch_size": 4},
}


@cache
def stepped(case, buckets):
    """First moments of Adam (a tenth of the gradient) after a step, and the metrics."""
    config = settings(**{"microbatch_size": 8, "max_grad_norm": 1e9, **CASES[case]}, length_buckets=buckets)
    algorithm, optimizer = ALGORITHMS[config.algorithm.algorithm], cached_optimizer(config.optimizer)
    lora, value = jax.tree.map(jnp.copy, (trained_lora(), critic() if algorithm.init_critic else {}))
    before = TrainState.create(lora, optimizer, jax.random.key(0), value)
    # At scale 1 the problem is well conditioned: what differs is the layout's doing, not amplified rounding.
    after, metrics = algorithm.step(
        before, tiny_base(1.0), batch(), model=MODEL, optimizer=optimizer, config=config, objective=None
    )
    return after.opt_state[1].inner_state[0].mu, {name: float(value) for name, value in metrics.items()}


def test_the_batch_takes_both_buckets():
    tokens = rollout().completion_lengths.reshape(-1, 8).sum(axis=1)
    assert {int(bucket) for bucket in tokens > 8 * COMPLETION / BUCKETS} == {0, 1}


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_same_loss_and_gradient(case):
    (padded, expected), (packed, got) = stepped(case, 1), stepped(case, BUCKETS)
    assert_same(packed, padded, 2e-6)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_the_kl_of_completions_is_the_same():
    """What rloo takes off the rewards."""
    lora, base = trained_lora(), tiny_base()
    padded, packed = (
        completion_kl(
            lora, {}, base, rollout(), model=MODEL, config=settings(microbatch_size=8, length_buckets=buckets)
        )
        for buckets in (1, BUCKETS)
    )
    for one, other in zip(packed, padded, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_padding_is_not_computed():
    """Rows that fill half of their room: half of the positions in the branch that is taken, and no array of padded width."""
    rows = rows_of(rollout(), BUCKETS)
    run = partial(jax.jit, static_argnames=("group",))(partial(forward.token_logprobs, MODEL))
    lowered = run.lower(tiny_base(), trained_lora(), rows.replace(capacity=80), group=GENERATIONS)
    flops = [
        run.lower(tiny_base(), trained_lora(), rows.replace(capacity=size), group=GENERATIONS).cost_analysis()["flops"]
        for size in (80, 160)
    ]
    assert f"tensor<1x{QUESTIONS * PROMPT + 80}x32xf32>" in lowered.as_text()
    assert flops[0] < 0.7 * flops[1]


def test_on_a_cpu_the_default_is_one_program():
    assert rows_of(rollout()).capacities == (ROWS * COMPLETION,)
    assert length_buckets(settings()) == 1
    assert length_buckets(settings(length_buckets=4)) == 4
