"""Rewards for the length of a completion, in tokens, and for not repeating itself.

Each registry function has the defaults of its paper; `functools.partial`-like variants are made by the `make_…` functions,
whose results keep the name of the function (metrics go by it).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jgrpo.rewards.mathematics import math_verify

TokenIds = Sequence[Sequence[int]]


def length(completion_ids: TokenIds, **kwargs: Any) -> list[float]:
    """Tokens of the completion; meant with a small (or negative) weight."""
    return [float(len(ids)) for ids in completion_ids]


def make_repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """(1 - distinct n-grams / n-grams) · max_penalty (Yeo et al. 2025, arXiv:2502.03373, appendix C.2)."""

    def repetition_penalty(completion_ids: TokenIds, **kwargs: Any) -> list[float]:
        return [max_penalty * _repeated_share(ids, ngram_size) for ids in completion_ids]

    return repetition_penalty


def _repeated_share(ids: Sequence[int], ngram_size: int) -> float:
    ngrams = [tuple(ids[start : start + ngram_size]) for start in range(len(ids) - ngram_size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def make_cosine(
    max_length: int = 1024,
    wrong: tuple[float, float] = (-1.0, -0.5),
    correct: tuple[float, float] = (1.0, 0.5),
) -> Callable[..., list[float | None]]:
    """Correctness by math-verify, scaled by length along a cosine from (shortest, longest) (arXiv:2502.03373, C.1).

    A right answer earns more the shorter it is, a wrong one loses more. The column is solution; a row whose gold answer
    cannot be parsed gets None.
    """

    def cosine(
        completions: Sequence[Any], completion_ids: TokenIds, solution: Sequence[str], **kwargs: Any
    ) -> list[float | None]:
        verdicts = math_verify(completions, solution)
        return [
            None if right is None else _cosine(len(ids), max_length, *(correct if right else wrong))
            for right, ids in zip(verdicts, completion_ids, strict=True)
        ]

    return cosine


def _cosine(tokens: int, max_length: int, at_zero: float, at_max: float) -> float:
    # at_max + ½ (at_zero - at_max) (1 + cos(π |y| / L)), constant beyond L
    return at_max + 0.5 * (at_zero - at_max) * (1 + math.cos(math.pi * min(tokens / max_length, 1.0)))


def make_soft_overlong(max_length: int, buffer: int) -> Callable[..., list[float]]:
    """0 up to max_length - buffer tokens, then falling linearly to -1 at max_length (DAPO, arXiv:2503.14476, eq. 13)."""

    def soft_overlong(completion_ids: TokenIds, **kwargs: Any) -> list[float]:
        return [_overlong(len(ids), max_length, buffer) for ids in completion_ids]

    return soft_overlong


def _overlong(tokens: int, max_length: int, buffer: int) -> float:
    start = max_length - buffer
    if tokens <= start:
        return 0.0
    return -1.0 if tokens > max_length else (start - tokens) / buffer


repetition_penalty = make_repetition_penalty()
cosine = make_cosine()


def soft_overlong(completion_ids: TokenIds, max_completion_length: int, **kwargs: Any) -> list[float]:
    """`make_soft_overlong` with the run's max_completion_length, a fifth of it as the buffer (DAPO: 4096 of 20480)."""
    buffer = max(1, max_completion_length // 5)
    return [_overlong(len(ids), max_completion_length, buffer) for ids in completion_ids]
