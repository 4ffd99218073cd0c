"""Rewards for a right final answer: Countdown, GSM8K, exact match, integer answer."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from jgrpo.rewards.arithmetic import ExpressionError, evaluate
from jgrpo.rewards.text import answer_or_all, last_answer, texts

TOLERANCE = Fraction(1, 100_000)
FINAL_NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def countdown_score(text: str, numbers: Sequence[int], target: int) -> float:
    """TinyZero's score (Pan et al. 2025) of one completion.

    1.0 if the last `<answer>` uses every given number exactly once and evaluates to the target (|Δ| < 1e-5), 0.1 if there
    is an answer but a wrong one, else 0. Deviation: TinyZero calls `eval` behind a regular expression, this walks a
    whitelisted syntax tree in exact arithmetic, so `**`, `//` and names are wrong answers.
    """
    answer = last_answer(text)
    if answer is None:
        return 0.0
    try:
        value, used = evaluate(answer)
    except ExpressionError:
        return 0.1
    right = sorted(used) == sorted(map(Fraction, numbers)) and abs(value - target) < TOLERANCE
    return 1.0 if right else 0.1


def countdown(completions: Sequence[Any], nums: Sequence, target: Sequence, **kwargs: Any) -> list[float]:
    """`countdown_score` with the columns nums (list of numbers) and target."""
    return [countdown_score(*row) for row in zip(texts(completions), nums, target, strict=True)]


def final_number(text: str) -> str | None:
    """The number after the last `####`, commas stripped; None without one."""
    found = FINAL_NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def gsm8k(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1.0 where the last `#### number` equals the column answer (itself a number or a worked GSM8K answer)."""
    return [
        float(_same_number(final_number(text), final_number(str(gold)) or str(gold).replace(",", "")))
        for text, gold in zip(texts(completions), answer, strict=True)
    ]


def _same_number(given: str | None, gold: str) -> bool:
    # As numbers, so that 72.0 is 72.
    return given is not None and Fraction(given) == Fraction(gold)


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 where the tagged answer (without tags: the whole completion) is the column answer, up to outer space."""
    pairs = zip(texts(completions), answer, strict=True)
    return [float(answer_or_all(text) == str(gold).strip()) for text, gold in pairs]


def integer_answer(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """0.5 where the tagged answer (without tags: the whole completion) is an integer, else 0 (Brown's GSM8K recipe)."""
    return [0.5 * bool(re.fullmatch(r"[+-]?\d+", answer_or_all(text))) for text in texts(completions)]
