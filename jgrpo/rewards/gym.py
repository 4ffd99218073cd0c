"""The scorers of reasoning-gym's tasks as a reward (see `jgrpo.data.gym`)."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from jgrpo.data.gym import gym
from jgrpo.rewards.text import last_answer, texts


def reasoning_gym(
    completions: Sequence[Any], gym_task: Sequence[str], gym_entry: Sequence[Mapping[str, Any]], **kwargs: Any
) -> list[float]:
    """The task's own score of the tagged answer, 0 to 1; without an answer tag 0.

    Many scorers give a few hundredths for an answer of the right form; each is what the package defines.
    """
    return [
        0.0 if (answer := last_answer(text)) is None else float(_scorer(task)(answer=answer, entry=entry))
        for text, task, entry in zip(texts(completions), gym_task, gym_entry, strict=True)
    ]


@cache
def _scorer(task: str) -> Callable[..., float]:
    return gym(task).get_score_answer_fn(task)
