"""Rewards for programs: the code of a completion is run in the sandbox (`jgrpo.rewards.sandbox`) against a row's tests.

The code is the last fenced block, if any is fenced as Python the last of those; without a fence, the whole completion.
A batch takes up to N · tests · 3 s / processors if everything hangs: `reward_timeout` has to allow for that.
"""

import re
from collections.abc import Sequence
from typing import Any

from jgrpo.rewards.sandbox import Program, run_programs
from jgrpo.rewards.text import texts

FENCE = re.compile(r"```([A-Za-z0-9_+-]*)[ \t]*\n(.*?)```", re.DOTALL)
PYTHON = ("python", "py", "python3")


def extract_code(text: str) -> str:
    """The program in a completion."""
    blocks = FENCE.findall(text)
    if not blocks:
        return text
    python = [code for language, code in blocks if language.lower() in PYTHON]
    return python[-1] if python else blocks[-1][1]


def code_tests(completions: Sequence[Any], tests: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1.0 where the code, and then every test, runs without an exception; else 0.

    The column tests holds Python source, or a list of it (MBPP's test_list: assert statements). A row without tests gets None.
    A program that ends itself early (`sys.exit`) has not passed.
    """
    sources = ["\n".join(test) if isinstance(test, list) else test or "" for test in tests]
    rows = [row for row, source in enumerate(sources) if source.strip()]
    programs = [
        Program((extract_code(text), source), name="solution")
        for text, source in zip(texts(completions), sources, strict=True)
    ]
    outcomes = run_programs([programs[row] for row in rows])
    passed = {row: float(outcome.finished) for row, outcome in zip(rows, outcomes, strict=True)}
    return [passed.get(row) for row in range(len(sources))]


def code_io(
    completions: Sequence[Any], inputs: Sequence[Sequence[str]], outputs: Sequence[Sequence[str]], **kwargs: Any
) -> list[float | None]:
    """1.0 where the program prints the right output for every input; else 0.

    The columns inputs and outputs hold lists of the same length: standard input, and what has to be on standard output, up
    to white space at the ends of lines and of the whole. The right outputs never enter the sandbox. A row without gets None.
    """
    codes = [extract_code(text) for text in texts(completions)]
    cases = [
        (row, Program((codes[row],), stdin=given), expected)
        for row, pairs in enumerate(zip(inputs, outputs, strict=True))
        for given, expected in zip(*(column or () for column in pairs), strict=True)
    ]
    outcomes = run_programs([program for _, program, _ in cases])
    verdicts: dict[int, bool] = {}
    for (row, _, expected), outcome in zip(cases, outcomes, strict=True):
        right = outcome.returncode == 0 and _lines(outcome.stdout) == _lines(expected)
        verdicts[row] = verdicts.get(row, True) and right
    return [float(verdicts[row]) if row in verdicts else None for row in range(len(codes))]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
