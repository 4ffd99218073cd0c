"""Accuracy, pass@k and intervals against their definitions."""

import dataclasses
from itertools import combinations
from math import sqrt

import numpy as np
import pytest

from jgrpo.config import RolloutConfig
from jgrpo.training.evaluation import (
    Scores,
    evaluation_batch,
    evaluation_metrics,
    final_answer,
    interval,
    majority,
    pass_at_k,
    rate_interval,
)

NAN = float("nan")


def scores(rewards, weights=(1.0,)):
    rewards = np.asarray(rewards, float)
    shape = rewards.shape[1:]
    return Scores(rewards, np.asarray(weights), np.full(shape, 3), np.ones(shape, bool))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (5, 2, 3), (3, 0, 2), (3, 3, 1), (6, 4, 6)])
def test_pass_at_k_counts_subsets(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)


def test_interval_is_the_standard_error_of_prompts():
    values = np.array([0.0, 1.0, 3.0, 4.0])
    mean, half = interval(values)
    assert mean == 2
    assert half == pytest.approx(1.96 * values.std(ddof=1) / 2)


def test_rate_interval_is_wilsons_for_single_samples():
    values = np.array([1.0] * 30 + [0.0] * 70)
    n, p, z2 = 100, 0.3, 1.96**2
    centre, half = (p + z2 / (2 * n)) / (1 + z2 / n), sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    assert rate_interval(values).half_width == pytest.approx(centre + half - p, rel=0.01)


def test_rate_interval_has_width_at_zero():
    mean, half = rate_interval(np.zeros(10))
    assert mean == 0
    assert half == pytest.approx(1.96**2 / (10 + 1.96**2))


def test_many_samples_of_one_prompt_do_not_narrow_it_like_many_prompts():
    agreeing = scores([[[1, 1, 1, 1], [0, 0, 0, 0]] * 10])
    assert agreeing.accuracy().half_width > 0.2
    assert scores([[[1, 1, 1, 0], [0, 0, 0, 1]] * 10]).accuracy().half_width < agreeing.accuracy().half_width


def test_missing_rewards_are_left_out():
    given = scores([[[1.0, NAN], [NAN, NAN]], [[2.0, 4.0], [NAN, NAN]]], weights=(1.0, 0.5))
    np.testing.assert_array_equal(given.rewards[0], [2.0, 2.0])
    assert np.isnan(given.rewards[1]).all()
    assert given.reward().mean == 2.0
    assert given.accuracy().mean == 0.25  # the first function alone decides, and None is not correct
    metrics = evaluation_metrics(given, ("one", "two"))
    assert metrics["eval_rewards/one/mean"] == 1.0
    assert metrics["eval_rewards/two/mean"] == 3.0


def test_accuracy_and_pass():
    judged = scores([[[1, 0], [0, 0], [1, 1], [0.1, 1]]])
    assert judged.accuracy().mean == pytest.approx(4 / 8)
    assert judged.pass_at(2).mean == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> no: <answer> 2 +  3 </answer>", "2 + 3"),
        (r"so \boxed{\frac{1}{2}} it is, not #### 4", r"\frac{1}{2}"),
        ("2 + 2\n#### 1,000", "1000"),
        (" Paris\n", "Paris"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [("aab", [0, 0, 1], 0.0), ("aab", [1, 1, 0], 1.0), ("aabb", [1, 1, 0, 0], 0.5), ("abc", [1, 0, 0], 1 / 3)],
)
def test_majority_shares_ties(answers, correct, expected):
    assert majority(list(answers), np.array(correct, bool)) == pytest.approx(expected)


def test_majority_at_k_is_the_mean_over_disjoint_blocks():
    rewards = [[[1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]]]
    answers = (("a", "a", "b", "b", "b", "a"), ("c", "c", "c", "d", "d", "d"))
    voted = dataclasses.replace(scores(rewards), answers=answers)
    assert voted.majority_at(3).mean == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert voted.majority_at(1).mean == voted.accuracy().mean
    assert voted.majority_at(6).mean == pytest.approx(0.5)
    assert voted.majority_at(3).half_width > 0
    with pytest.raises(ValueError, match="maj@7 of 6"):
        voted.majority_at(7)
    with pytest.raises(ValueError, match="expected answers"):
        scores(rewards).majority_at(3)


def test_metrics_of_several_samples_have_pass_and_maj_at_k():
    judged = dataclasses.replace(scores([[[1, 0, 0], [1, 1, 0]]]), answers=(("a", "b", "b"), ("a", "a", "b")))
    metrics = evaluation_metrics(judged, ["one"])
    assert metrics["eval_pass@3"] == 1.0
    assert metrics["eval_maj@3"] == 0.5
    assert metrics["eval_maj@3_ci95"] > 0
    assert not [name for name in evaluation_metrics(scores([[[1], [0]]]), ["one"]) if "@" in name]


def test_evaluation_needs_no_more_cache_than_training():
    sampling = RolloutConfig(num_generations=8, max_completion_length=512)
    training_positions = 8 * (256 + 8 * 512)
    for generations in (1, 4):
        batch = evaluation_batch(8, sampling, 256, generations)
        assert batch * (256 + generations * 512) <= training_positions < (batch + 1) * (256 + generations * 512)
