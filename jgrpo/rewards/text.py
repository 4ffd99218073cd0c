"""What every built-in reward does first: get at the text of a completion, and at the answer inside it."""

import re
from collections.abc import Sequence
from typing import Any

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the contents of its chat messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def texts(completions: Sequence[Any]) -> list[str]:
    """`completion_text` of each."""
    return [completion_text(completion) for completion in completions]


def last_answer(text: str) -> str | None:
    """What the last `<answer> … </answer>` holds, stripped; None without one."""
    found = ANSWER.findall(text)
    return found[-1].strip() if found else None


def answer_or_all(text: str) -> str:
    """The last tagged answer, or, where nothing is tagged, the whole text without surrounding space."""
    answer = last_answer(text)
    return text.strip() if answer is None else answer
