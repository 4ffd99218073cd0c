"""Worked Countdown solutions that the shipped demo model is trained on (supervised).

A worked solution tries expressions one after the other and says of each whether it hits the target. Two things
are imperfect on purpose, because they are what reinforcement learning has to improve:

- most writers are impatient: after a wrong try they tend to give up and answer with it;
- the order of the tries is a blend of insight (a right expression, drawn with a fixed probability) and chance.

A patient writer, a minority, goes on until the target is found. So the model can search, but seldom does.
"""

from dataclasses import dataclass

import numpy as np

from jgrpo.data.countdown import Expression, expressions


@dataclass(frozen=True)
class Writer:
    """How a worked solution is drawn."""

    patient: float = 0.2
    """Share of solutions that never give up."""
    give_up: float = 0.8
    """Chance that an impatient writer gives up after a wrong try."""
    insight: float = 0.2
    """Chance that a try is a right expression on purpose."""
    max_tries: int = 10
    """Tries after which even a patient writer gives up (the completion has to end)."""


def _next_try(untried: list[Expression], target: int, writer: Writer, rng: np.random.Generator) -> Expression:
    right = [expression for expression in untried if expression.value == target]
    pool = right if right and rng.random() < writer.insight else untried
    return pool[rng.integers(len(pool))]


def draw_tries(numbers: tuple[int, ...], target: int, writer: Writer, rng: np.random.Generator) -> list[Expression]:
    """The tries of one solution, the last of which is the answer; no value is tried twice."""
    untried = expressions(numbers)
    give_up = 0.0 if rng.random() < writer.patient else writer.give_up
    tries = []
    while True:
        tries.append(_next_try(untried, target, writer, rng))
        untried = [expression for expression in untried if expression.value != tries[-1].value]
        done = tries[-1].value == target or not untried or len(tries) == writer.max_tries
        if done or rng.random() < give_up:
            return tries


def solution_text(tries: list[Expression], target: int) -> str:
    """The completion: one line for each try, then the last one as the answer."""
    lines = "".join(f"{t.worked} = {t.value} {'yes' if t.value == target else 'no'}\n" for t in tries)
    return f"<think>\n{lines}</think>\n<answer>{tries[-1].text}</answer>"
