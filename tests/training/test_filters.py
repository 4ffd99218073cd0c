"""Dynamic sampling: which rollouts are drawn, which groups are kept, and that whole groups travel together."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.rewards import RewardResult
from jgrpo.training.experience import Experience
from jgrpo.training.filters import Judged, choose, judged, sample_until_informative, sampling_effort

QUESTIONS, GENERATIONS = 3, 2


def drawn(number, informative):
    """Batch `number`, in which everything that belongs to question q holds 10 · number + q."""
    ids = 10.0 * number + np.arange(QUESTIONS)
    grid = np.repeat(ids[:, None], GENERATIONS, 1)
    rewards = grid[None] + np.where(np.asarray(informative)[:, None], [[0.0, 0.5]], 0.0)
    result = RewardResult(
        rewards.reshape(1, -1), [f"problem {number}"], {"id": grid.reshape(-1).tolist()}, {"m": number}
    )
    experience = Experience(ids.tolist(), grid.reshape(-1).astype(str).tolist(), rewards, grid, grid, result)
    rollout = {"tokens": jnp.asarray(ids), "mask": jnp.asarray(grid)}
    return judged(rollout, experience, np.ones(1, np.float32))


def test_groups_of_equal_rewards_are_uninformative():
    np.testing.assert_array_equal(drawn(0, [True, False, True]).informative, [True, False, True])


@pytest.mark.parametrize(
    ("pattern", "bound", "expected"),
    [([3], 4, 1), ([1, 1, 1, 1], 4, 3), ([0, 0, 0, 0], 2, 2), ([1, 2], 1, 1)],
)
def test_sampling_stops_when_there_are_enough_or_at_the_bound(pattern, bound, expected):
    calls = []

    def sample(number):
        calls.append(number)
        informative = np.arange(QUESTIONS) < pattern[number]
        return Judged(None, SimpleNamespace(), informative)

    assert len(sample_until_informative(sample, bound)) == expected
    assert calls == list(range(expected))


def test_informative_groups_come_first_and_the_rest_fills_up():
    batches = [drawn(0, [False, True, False]), drawn(1, [True, False, False])]
    rollout, experience = choose(batches)
    expected = [1.0, 10.0, 0.0]
    np.testing.assert_array_equal(rollout["tokens"], expected)
    np.testing.assert_array_equal(rollout["mask"], np.repeat(np.array(expected)[:, None], GENERATIONS, 1))
    assert experience.examples == expected
    assert experience.texts == [str(e) for e in expected for _ in range(GENERATIONS)]
    np.testing.assert_array_equal(experience.rewards_per_function[0, :, 0], expected)
    np.testing.assert_array_equal(experience.lengths[:, 0], expected)
    assert experience.result.extra_columns["id"] == [e for e in expected for _ in range(GENERATIONS)]
    assert experience.result.problems == ["problem 0", "problem 1"]
    assert experience.result.metrics == {"m": 0.5}
    effort = sampling_effort(batches)
    assert effort == {"dynamic_sampling/batches": 2.0, "dynamic_sampling/frac_informative": pytest.approx(1 / 3)}


def test_one_batch_is_left_as_it_is():
    batch = drawn(0, [True, True, True])
    assert choose([batch]) == (batch.rollout, batch.experience)
