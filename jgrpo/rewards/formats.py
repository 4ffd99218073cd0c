"""Rewards for the form of a completion: tags for reasoning and answer.

The three XML rewards are those of Will Brown's GSM8K recipe (2025), which most notebooks copy; `think_format` is TRL's.
"""

import re
from collections.abc import Sequence
from typing import Any

from jgrpo.rewards.text import texts

STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?", re.DOTALL)
SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
TAG_LINES = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")


def xml_format_strict(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """0.5 where the whole completion is <reasoning> and <answer>, each tag on a line of its own.

    Deviation from the recipe: `.` matches line breaks, without which no reasoning of two lines ever scored.
    """
    return [0.5 * bool(STRICT.fullmatch(text)) for text in texts(completions)]


def xml_format_soft(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """0.5 where the completion begins with <reasoning> and goes on to <answer>, with any spacing."""
    return [0.5 * bool(SOFT.match(text)) for text in texts(completions)]


def xml_count_score(text: str) -> float:
    """1/8 for each of the four tag lines that occurs exactly once, minus 1/1000 for each character behind the end."""
    score = sum(0.125 for tag in TAG_LINES if text.count(tag) == 1)
    _, closed, rest = text.rpartition("\n</answer>")
    return score - 0.001 * len(rest.removeprefix("\n")) if closed else score


def xml_count(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """`xml_count_score` of each completion."""
    return [xml_count_score(text) for text in texts(completions)]


def think_format(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 where the completion begins with one `<think>` block that is closed, else 0.

    Same verdicts as TRL's `think_format_reward`, by string search instead of a backtracking pattern.
    """
    return [float(_thinks(text)) for text in texts(completions)]


def _thinks(text: str) -> bool:
    return text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text
