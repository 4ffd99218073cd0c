"""Reward functions: text in, numbers out."""

from jgrpo.rewards.registry import REWARDS, NamedReward, RewardFn, named_rewards, resolve_rewards
from jgrpo.rewards.scoring import RewardResult, as_completions, score

__all__ = [
    "REWARDS",
    "NamedReward",
    "RewardFn",
    "RewardResult",
    "as_completions",
    "named_rewards",
    "resolve_rewards",
    "score",
]
