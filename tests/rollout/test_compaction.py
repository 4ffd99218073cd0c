"""Dropping finished rows changes nothing but the shapes that the loop runs in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import RolloutConfig
from jgrpo.rollout import Prompts, Rollout, batch, compaction, generate
from jgrpo.rollout.compaction import Bucket, buckets, fits, regroup
from jgrpo.rollout.weights import HEAD_BLOCK
from tests.rollout.conftest import Policy, make_policy

CONFIG = RolloutConfig(num_generations=8, max_completion_length=128)
LONG_TAIL = np.asarray([[9, 128, 3, 60, 5, 31, 17, 2]] * 2 + [[7] * 8] * 2 + [[40, 40, 33, 1, 2, 3, 4, 128]])


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes in which the loop runs, in their order; buckets may be small."""
    seen: list[tuple[int, int]] = []

    def recorded(name: str) -> None:
        stage = getattr(batch, name)

        def run(*args):
            result = stage(*args)
            seen.append(result.rows.shape)
            return result

        monkeypatch.setattr(batch, name, run)

    recorded("_first_stage")
    recorded("_next_stage")
    monkeypatch.setattr(compaction, "MIN_ROWS", 2)
    return seen


def sample(policy: Policy, prompts: Prompts, limits: np.ndarray, compact: bool, **settings) -> Rollout:
    config = dataclasses.replace(CONFIG, compaction=compact, **settings)
    how = dict(eos_ids=(5,), pad_id=3, row_limits=jnp.asarray(limits, jnp.int32))
    return generate(*policy, prompts, jax.random.key(1), config, **how)


def assert_same(one: Rollout, other: Rollout, *, int8_cache: bool = False) -> None:
    """Equal but for the last bits of sums; where the cache rounds to 256 levels, such a bit can be a level, for the rest of a row.

    Which rows meet one depends on the processor, in whose order of sums they differ: of these 40 none on one machine, one on another.
    """
    for name in ("completion_tokens", "completion_mask", "completion_lengths", "finish"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("logprobs", "log_kept"):
        ours, theirs = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))
        np.testing.assert_allclose(ours, theirs, atol=5e-3 if int8_cache else 2e-5, err_msg=name)
        differing = np.any(np.abs(ours - theirs) > 2e-5 + 1e-7 * np.abs(theirs), axis=-1)
        assert differing.sum() <= (4 if int8_cache else 0), name


@pytest.mark.parametrize(
    ("settings", "vocab", "last"),
    [
        ({}, None, (5, 1)),
        (dict(kv_cache="int8"), None, (5, 1)),
        (dict(rollout_weights="bf16", top_p=0.8), None, (5, 1)),
        (dict(rollout_weights="int8"), HEAD_BLOCK, (10, 1)),
    ],
    ids=str,
)
def test_a_long_tail_runs_in_smaller_shapes_and_draws_the_same(
    policy: Policy, prompts: Prompts, shapes: list, settings: dict, vocab: int | None, last: tuple
) -> None:
    """A copy in 8 bits has a head that proposes tokens, so that a draw takes several random numbers. Fewer of its rows draw a stop token."""
    policy = policy if vocab is None else make_policy(vocab=vocab)
    whole = sample(policy, prompts, LONG_TAIL, False, **settings)
    assert shapes == []
    assert_same(sample(policy, prompts, LONG_TAIL, True, **settings), whole, int8_cache="kv_cache" in settings)
    assert shapes[0] == (5, 8)
    assert shapes[-1] == last
    assert len(shapes) >= 2


def test_rows_that_end_together_stay_in_one_program(policy: Policy, prompts: Prompts, shapes: list) -> None:
    limits = np.full((5, 8), 128)
    assert_same(sample(policy, prompts, limits, True), sample(policy, prompts, limits, False))
    assert shapes == [(5, 8)]


def test_buckets_are_few_and_shrink() -> None:
    assert buckets(64, 8) == (Bucket(128, 2), Bucket(128, 1), Bucket(64, 1))
    assert buckets(8, 8) == (Bucket(16, 2),)
    assert buckets(8, 2) == ()
    assert buckets(64, 16) == (Bucket(128, 4), Bucket(128, 2), Bucket(128, 1))


@pytest.mark.parametrize("bucket", [Bucket(6, 2), Bucket(12, 1), Bucket(3, 4), Bucket(1, 12)])
def test_device_and_host_agree_on_what_fits(bucket: Bucket) -> None:
    """Over random rows that are live, in the batch's own shape and after rows were dropped once."""
    rng = np.random.default_rng(0)
    shape, outcomes = (4, 6), set()
    for _ in range(60):
        live = rng.random(shape) < rng.random()
        rows = rng.permutation(24).reshape(shape)
        rows[rng.random(shape) < 0.2] = 24
        live &= rows < 24
        taken = regroup(live, rows, bucket, shape[1])
        on_device = fits(jnp.asarray(live, jnp.int32), jnp.asarray(rows, jnp.int32), bucket, shape)
        assert bool(on_device) == (taken is not None)
        outcomes.add(taken is not None)
        if taken is not None:
            kept = taken[taken >= 0]
            assert sorted(kept.tolist()) == np.flatnonzero(live).tolist()
            for group in taken:
                assert len(set((rows.reshape(-1)[group[group >= 0]] // shape[1]).tolist())) <= 1
    assert outcomes == {True, False}
