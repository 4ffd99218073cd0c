"""Countdown: combine the given numbers into an expression that equals the target.

The task of TinyZero (Pan et al. 2025), small enough for the shipped demo model: three numbers, and a target
that + - * reach with every intermediate value a non-negative integer below 100. All problems are enumerated,
so that the split can be exact: a set of numbers belongs to the held-out split or to the training split by a
checksum of the numbers alone. No held-out number set is ever trained on, whatever the seeds are.

Deviation from TinyZero: the prompt is one short user message, and division is allowed but never needed.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "test"]

LARGEST_NUMBER = 20
LARGEST_VALUE = 99
TARGETS = range(5, 61)
HELD_OUT_FRACTION = 0.2

PROMPT = (
    "Combine {numbers} with + - * / to make {target}. Use each number once. "
    "Think in <think> tags, then give the expression in <answer> tags."
)


@dataclass(frozen=True)
class Expression:
    """Two operations over three numbers, with the value of the inner one and of the whole."""

    text: str
    inner: int
    value: int

    @property
    def worked(self) -> str:
        """The expression with the inner value written down: (3 + 5 = 8) * 7."""
        return self.text.replace(")", f" = {self.inner})")


def _combine(left: int, right: int) -> Iterator[tuple[int, str, int, int]]:
    """(first operand, operator, second operand, value) for + - *; the larger operand of - comes first."""
    yield left, "+", right, left + right
    yield left, "*", right, left * right
    high, low = max(left, right), min(left, right)
    yield high, "-", low, high - low


def expressions(numbers: tuple[int, ...]) -> list[Expression]:
    """Every way of combining three numbers whose values stay within 0..99; at most 27, without repeats."""
    found = {}
    for i, j in itertools.combinations(range(3), 2):
        third = numbers[3 - i - j]
        for first, operator, second, inner in _combine(numbers[i], numbers[j]):
            group = f"({first} {operator} {second})"
            for left, outer, _, value in _combine(inner, third):
                text = f"{group} {outer} {third}" if left == inner else f"{third} {outer} {group}"
                if max(inner, value) <= LARGEST_VALUE:
                    found[text] = Expression(text, inner, value)
    return list(found.values())


def is_held_out(numbers: tuple[int, ...]) -> bool:
    """Whether a set of numbers belongs to the held-out split; depends on nothing but the numbers."""
    checksum = zlib.crc32(" ".join(map(str, sorted(numbers))).encode())
    return checksum < HELD_OUT_FRACTION * 2**32


def problems(split: Split) -> list[tuple[tuple[int, ...], int]]:
    """Every (numbers, target) of a split, in a fixed order; numbers ascending, each target reachable."""
    sets = itertools.combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3)
    chosen = [numbers for numbers in sets if is_held_out(numbers) == (split == "test")]
    return [
        (numbers, target)
        for numbers in chosen
        for target in sorted({expression.value for expression in expressions(numbers)})
        if target in TARGETS
    ]


def prompt_text(numbers: tuple[int, ...], target: int) -> str:
    """The question as the model reads it."""
    return PROMPT.format(numbers=", ".join(map(str, numbers)), target=target)


def rows(split: Split, seed: int) -> list[dict]:
    """The problems of a split as table rows: prompt, nums, target. The seed orders problems and numbers."""
    rng = np.random.default_rng(seed)
    pool = problems(split)
    shuffled = [pool[index] for index in rng.permutation(len(pool))]
    table = []
    for numbers, target in shuffled:
        ordered = tuple(numbers[k] for k in rng.permutation(3))
        table.append({"prompt": prompt_text(ordered, target), "nums": list(ordered), "target": target})
    return table
