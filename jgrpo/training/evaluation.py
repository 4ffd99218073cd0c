"""Held-out performance of an adapter: reward and accuracy over completions of prompts that are not trained on.

A completion is correct if the first reward function gives it at least 1; put the function that decides correctness
first. Accuracy is the fraction of correct completions. pass@k is the unbiased estimator of Chen et al. 2021
(arXiv:2107.03374). Intervals are at 95 % over prompts, with a prompt's own mean as one observation: several samples of
one prompt do not count as independent. Rates get Wilson's interval, which stays honest at 0 and 1, where the normal
approximation has width 0; everything else gets the normal approximation.

maj@k (self-consistency, Wang et al. 2022, arXiv:2203.11171): of k samples the answer given most often counts, and a tie for
most often counts as the fraction of the tied samples that are right, which is what drawing one of them gives on average. It is
averaged over the G // k disjoint blocks of samples. Two answers are the same if their text is, up to space.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb, sqrt
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from jgrpo.config import RewardConfig, RolloutConfig
from jgrpo.data import Example
from jgrpo.rewards import NamedReward
from jgrpo.rewards.answers import final_number
from jgrpo.rewards.text import answer_or_all, last_answer
from jgrpo.rollout import FINISH_STOP
from jgrpo.training.experience import judge
from jgrpo.training.policy import Policy

CORRECT = 1.0 - 1e-6
"""A reward from here on counts as correct."""


class Interval(NamedTuple):
    """A mean over prompts and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class Scores:
    """Rewards and lengths of G completions of each of N prompts."""

    rewards_per_function: Float[np.ndarray, "K N G"]
    """NaN: the function gave none."""
    weights: Float[np.ndarray, " K"]
    lengths: Int[np.ndarray, "N G"]
    terminated: Bool[np.ndarray, "N G"]
    problems: tuple[str, ...] = ()
    answers: tuple[tuple[str, ...], ...] = ()
    """`final_answer` of each completion, [N][G]; maj@k needs it."""

    @property
    def rewards(self) -> Float[np.ndarray, "N G"]:
        """The weighted sum over the functions that gave a reward; NaN where none did."""
        given = ~np.isnan(self.rewards_per_function)
        total = np.einsum("k,kng->ng", self.weights, np.where(given, self.rewards_per_function, 0.0))
        return np.where(given.any(axis=0), total, np.nan)

    @property
    def correct(self) -> Bool[np.ndarray, "N G"]:
        """Completions to which the first reward function gives at least 1."""
        return np.nan_to_num(self.rewards_per_function[0], nan=0.0) >= CORRECT

    def reward(self) -> Interval:
        """Mean reward."""
        given = ~np.isnan(self.rewards)
        counts = given.sum(axis=1)
        means = np.where(given, self.rewards, 0.0).sum(axis=1)[counts > 0] / counts[counts > 0]
        return interval(means)

    def accuracy(self) -> Interval:
        """Fraction of correct completions."""
        return rate_interval(self.correct.mean(axis=1))

    def pass_at(self, k: int) -> Interval:
        """Probability that at least one of k completions of a prompt is correct; k at most G."""
        return rate_interval(np.array([pass_at_k(self.correct.shape[1], int(c), k) for c in self.correct.sum(axis=1)]))

    def majority_at(self, k: int) -> Interval:
        """maj@k: accuracy of the answer that k completions of a prompt give most often; k at most G.

        Raises:
            ValueError: there are no answers, or fewer than k completions.
        """
        generations = self.correct.shape[1]
        if not self.answers or not 0 < k <= generations:
            raise ValueError(f"maj@{k} of {generations} samples: expected answers, and 0 < k <= samples")
        blocks = [slice(start, start + k) for start in range(0, generations - k + 1, k)]
        rows = list(zip(self.answers, self.correct, strict=True))
        return rate_interval(np.array([np.mean([majority(a[b], c[b]) for b in blocks]) for a, c in rows]))


BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_answer(text: str) -> str:
    """What a completion answers: in `<answer>` tags, a `\\boxed{}`, after `####`, else all of it; runs of space are one."""
    if last_answer(text) is not None:
        found = answer_or_all(text)
    elif boxed := BOXED.findall(text):
        found = boxed[-1]
    else:
        found = final_number(text) or text
    return " ".join(found.split())


def majority(answers: Sequence[str], correct: Bool[np.ndarray, " k"]) -> float:
    """Fraction of right ones among the samples whose answer is the most frequent, or as frequent as it."""
    counts = Counter(answers)
    most = max(counts.values())
    return float(np.mean([right for answer, right in zip(answers, correct, strict=True) if counts[answer] == most]))


def interval(values: Float[np.ndarray, " N"]) -> Interval:
    """Mean and 1.96 standard errors; NaN without values, width 0 with one."""
    if len(values) == 0:
        return Interval(float("nan"), float("nan"))
    error = values.std(ddof=1) / sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(float(values.mean()), float(1.96 * error))


def rate_interval(values: Float[np.ndarray, " N"]) -> Interval:
    """Mean of values in [0, 1] and the larger distance of it to the bounds of Wilson's interval.

    The number of trials is the one that would give a binomial rate the variance seen, p (1 − p) / Var(mean), at least N.
    """
    count, z2 = len(values), 1.96**2
    if count == 0:
        return Interval(float("nan"), float("nan"))
    p = float(values.mean())
    variance = values.var(ddof=1) / count if count > 1 else 0.0
    trials = max(p * (1 - p) / variance, count) if variance > 0 else count
    # (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = sqrt(z2 * (p * (1 - p) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return Interval(p, abs(centre - p) + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k) for n samples of which c are correct."""
    if not 0 < k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: expected 0 < k <= samples")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def evaluate_policy(
    policy: Policy,
    lora: Mapping[str, Any],
    examples: Sequence[Example],
    rewards: Sequence[NamedReward],
    key: PRNGKeyArray,
    *,
    sampling: RolloutConfig,
    reward_config: RewardConfig,
    prompt_width: int,
    batch_size: int,
) -> Scores:
    """Sample `sampling.num_generations` completions of every example and score them.

    Args:
        lora: adapter; `{}` evaluates the base model.
        prompt_width: tokens that prompts are padded to.
        key: batch b draws from `fold_in(key, b)`.
        batch_size: prompts in one rollout; the batches are evened out, so that one shape is compiled.
    """
    batches = -(-len(examples) // batch_size)
    size = -(-len(examples) // batches)
    parts = []
    for number in range(batches):
        chosen = examples[number * size : (number + 1) * size]
        # The last batch is filled up to the one compiled shape; what fills it is left out of the scores.
        filled = [*chosen, *[chosen[-1]] * (size - len(chosen))]
        rollout = policy.sample(lora, filled, jax.random.fold_in(key, number), sampling, prompt_width)
        rollout = jax.tree.map(partial(_first_rows, len(chosen)), rollout)
        parts.append(judge(policy, rollout, chosen, rewards, reward_config))
    return Scores(
        np.concatenate([part.rewards_per_function for part in parts], axis=1),
        np.asarray([reward.weight for reward in rewards], np.float32),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.finish for part in parts]) == FINISH_STOP,
        tuple(problem for part in parts for problem in part.result.problems),
        tuple(answers for part in parts for answers in _answers(part.texts, sampling.num_generations)),
    )


def _answers(texts: Sequence[str], generations: int) -> list[tuple[str, ...]]:
    found = [final_answer(text) for text in texts]
    return [tuple(found[start : start + generations]) for start in range(0, len(found), generations)]


def _first_rows(count: int, array: jax.Array) -> np.ndarray:
    return np.asarray(array)[:count]


def evaluation_metrics(scores: Scores, names: Sequence[str]) -> dict[str, float]:
    """`eval_reward`, `eval_accuracy` (each with `_ci95`, half the interval), every function's mean, and lengths.

    With k > 1 completions of a prompt also `eval_pass@k` and `eval_maj@k`.
    """
    reward, accuracy = scores.reward(), scores.accuracy()
    metrics = {
        "eval_reward": reward.mean,
        "eval_reward_ci95": reward.half_width,
        "eval_accuracy": accuracy.mean,
        "eval_accuracy_ci95": accuracy.half_width,
        "eval_completions/mean_length": float(scores.lengths.mean()),
        "eval_completions/clipped_ratio": float(1 - scores.terminated.mean()),
    }
    if (k := scores.correct.shape[1]) > 1:
        rates = {"pass": scores.pass_at(k), **({"maj": scores.majority_at(k)} if scores.answers else {})}
        for name, rate in rates.items():
            metrics |= {f"eval_{name}@{k}": rate.mean, f"eval_{name}@{k}_ci95": rate.half_width}
    for name, values in zip(names, scores.rewards_per_function, strict=True):
        given = values[~np.isnan(values)]
        metrics[f"eval_rewards/{name}/mean"] = float(given.mean()) if len(given) else float("nan")
    return metrics


def held_out_sampling(sampling: RolloutConfig, temperature: float, num_generations: int = 1) -> RolloutConfig:
    """The training rollout's settings, for evaluation."""
    return dataclasses.replace(sampling, temperature=temperature, num_generations=num_generations)


def evaluation_batch(prompts: int, sampling: RolloutConfig, prompt_width: int, num_generations: int = 1) -> int:
    """Prompts in one evaluation rollout whose KV cache is no larger than that of a training rollout of `prompts`.

    A training rollout caches Q · (P + G · C) positions; an evaluation with G' samples a prompt Q' · (P + G' · C).
    """
    completion = sampling.max_completion_length
    positions = prompts * (prompt_width + sampling.num_generations * completion)
    return max(1, positions // (prompt_width + num_generations * completion))
