"""From a rollout to a training batch: completions as text, rewards, advantages, and what is logged about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jgrpo.algorithms import Objective, Scored, reward_metrics
from jgrpo.algorithms.rewards import soft_overlong_penalty
from jgrpo.config import RewardConfig
from jgrpo.data import Example, repeat_columns
from jgrpo.reporting import CompletionRow
from jgrpo.rewards import NamedReward, RewardResult, score
from jgrpo.rollout import FINISH_STOP, Rollout
from jgrpo.training.policy import Policy
from jgrpo.training.state import Batch


@dataclass(frozen=True)
class Experience:
    """A rollout's completions on the host, with their rewards. Rows: the G completions of a question together."""

    examples: Sequence[Example]
    texts: Sequence[str]
    """Q · G completions, special tokens left out."""
    rewards_per_function: Float[np.ndarray, "K Q G"]
    """NaN: the function gave none."""
    finish: np.ndarray
    """Why each completion ended, [Q, G]."""
    lengths: np.ndarray
    """Tokens of each completion, [Q, G]."""
    result: RewardResult
    """As the functions gave it: problems, columns and metrics that they logged."""


def read_completions(policy: Policy, rollout: Rollout) -> tuple[list[str], list[list[int]]]:
    """Text and token ids of the Q · G completions, up to each one's end."""
    tokens = np.asarray(rollout.completion_tokens)
    lengths = np.asarray(rollout.completion_lengths).reshape(-1)
    rows = tokens.reshape(-1, tokens.shape[-1])
    ids = [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
    return policy.tokenizer.batch_decode(ids, skip_special_tokens=True), ids


def judge(
    policy: Policy,
    rollout: Rollout,
    examples: Sequence[Example],
    rewards: Sequence[NamedReward],
    config: RewardConfig,
    extras: Mapping[str, Any] | None = None,
) -> Experience:
    """Call every reward function on every completion; `extras` are further arguments that a function may name.

    Raises:
        UserError: a reward function failed and `reward_errors` is "abort".
    """
    texts, ids = read_completions(policy, rollout)
    questions, generations = rollout.completion_lengths.shape
    result = score(
        rewards,
        [example.prompt for example in examples for _ in range(generations)],
        texts,
        ids,
        repeat_columns(examples, generations),
        timeout=config.reward_timeout,
        on_error=config.reward_errors,
        extras={"max_completion_length": rollout.completion_tokens.shape[-1], **(extras or {})},
    )
    return Experience(
        examples,
        texts,
        np.asarray(result.per_function, np.float32).reshape(len(rewards), questions, generations),
        np.asarray(rollout.finish),
        np.asarray(rollout.completion_lengths),
        result,
    )


@partial(jax.jit, static_argnames=("objective", "names"))
def advantages_of(
    rewards_per_function: Float[Array, "K Q G"],
    weights: Float[Array, " K"],
    rollout: Rollout,
    *,
    objective: Objective,
    names: tuple[str, ...],
    penalty: Float[Array, "Q G"] | None = None,
    greedy_rewards: Float[Array, " Q"] | None = None,
) -> tuple[Batch, dict[str, Array]]:
    """The training batch, and the metrics of its rewards.

    `penalty` is taken off the rewards that advantages are made of, not off those in the batch and the metrics: a group of
    equal rewards is one, whatever its KL. `greedy_rewards` are for ReMax.
    """
    lengths, limit = rollout.completion_lengths, rollout.completion_tokens.shape[-1]
    overlong = jnp.zeros(lengths.shape)
    if objective.overlong_buffer:
        overlong = soft_overlong_penalty(lengths, max_length=limit, cache=objective.overlong_buffer)
    scored = Scored(rewards_per_function, weights, lengths, overlong, greedy_rewards)
    rewards = scored.rewards
    shaped = scored if penalty is None else scored._replace(shaping=overlong - penalty)
    batch = Batch(rollout=rollout, rewards=rewards, advantages=objective.advantages(shaped))
    return batch, reward_metrics(rewards, rewards_per_function, names)


def completion_rows(
    policy: Policy, experience: Experience, advantages: Float[Array, "Q G"], names: Sequence[str]
) -> list[CompletionRow]:
    """Every completion of the step, as it is logged."""
    generations = experience.finish.shape[1]
    prompts = [policy.tokenizer.decode(example.token_ids) for example in experience.examples]
    values = experience.rewards_per_function.reshape(len(names), -1)
    flat_advantages, finish = np.asarray(advantages).reshape(-1), experience.finish.reshape(-1)
    lengths = experience.lengths.reshape(-1)
    return [
        CompletionRow(
            prompt=prompts[row // generations],
            completion=text,
            rewards={name: _number(value) for name, value in zip(names, values[:, row], strict=True)},
            advantage=float(flat_advantages[row]),
            extra={
                "length": int(lengths[row]),
                "finish": "stop" if finish[row] == FINISH_STOP else "length",
                **{name: column[row] for name, column in experience.result.extra_columns.items()},
            },
        )
        for row, text in enumerate(experience.texts)
    ]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def weights_of(rewards: Sequence[NamedReward]) -> Float[np.ndarray, " K"]:
    """The functions' weights."""
    return np.asarray([reward.weight for reward in rewards], np.float32)


def host_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scalars on the host, in one transfer."""
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
