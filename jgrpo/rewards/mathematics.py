"""Equivalence of mathematical answers, by Hugging Face's `math-verify` (imported on use, an optional dependency)."""

from collections.abc import Sequence
from typing import Any

from jgrpo.errors import UserError
from jgrpo.rewards.text import texts


def math_verify(completions: Sequence[Any], solution: Sequence[str], **kwargs: Any) -> list[float | None]:
    r"""1.0 where the completion's answer equals the column solution, else 0.0; None where the gold cannot be parsed.

    Same settings as TRL's `accuracy_reward`: the answer has to be LaTeX (`\boxed{…}` first), the gold may be anything.
    The library's own alarms are off: they exist in the main thread only, and `reward_timeout` already bounds the call.
    """
    parse, verify, answer_config = _library()
    golds = {gold: parse(gold, parsing_timeout=None) for gold in set(map(str, solution))}
    rewards: list[float | None] = []
    for text, gold in zip(texts(completions), solution, strict=True):
        parsed = golds[str(gold)]
        if not parsed:
            rewards.append(None)
            continue
        answer = parse(text, answer_config, extraction_mode="first_match", parsing_timeout=None)
        rewards.append(float(verify(parsed, answer, timeout_seconds=None)))
    return rewards


def _library() -> tuple[Any, Any, Any]:
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise UserError(
            "the rewards math_verify and cosine need the package math-verify; install it with pip install "
            '"math-verify[antlr4_13_2]", or choose another reward'
        ) from error
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    return parse, verify, [config]
