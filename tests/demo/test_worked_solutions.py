"""Worked solutions are right about everything they say."""

import re

import numpy as np
import pytest

from jgrpo.data.countdown import problems
from jgrpo.demo.worked_solutions import Writer, draw_tries, solution_text
from jgrpo.rewards.answers import countdown_score
from jgrpo.rewards.arithmetic import evaluate

PROBLEMS = problems("train")[::97]


def solutions(writer):
    rng = np.random.default_rng(0)
    for numbers, target in PROBLEMS:
        tries = draw_tries(numbers, target, writer, rng)
        yield numbers, target, tries, solution_text(tries, target)


def test_every_line_is_true():
    for numbers, target, _, text in solutions(Writer()):
        lines = text.split("<think>\n")[1].split("</think>")[0].splitlines()
        for line in lines:
            inner, inner_value = re.search(r"\((.*) = (\d+)\)", line).groups()
            expression, value, verdict = re.fullmatch(r"(.*) = (\d+) (yes|no)", line).groups()
            assert evaluate(inner)[0] == int(inner_value)
            exact, used = evaluate(expression.replace(f" = {inner_value})", ")"))
            assert exact == int(value)
            assert sorted(used) == sorted(numbers)
            assert verdict == ("yes" if exact == target else "no")
        assert not any(line.endswith("yes") for line in lines[:-1])


def test_the_answer_is_the_last_try():
    for numbers, target, tries, text in solutions(Writer()):
        expected = 1.0 if tries[-1].value == target else 0.1
        assert countdown_score(text, numbers, target) == expected


def test_no_value_is_tried_twice_and_the_patient_find_the_target():
    for _, target, tries, _ in solutions(Writer(patient=1.0, max_tries=27)):
        values = [t.value for t in tries]
        assert len(set(values)) == len(values)
        assert values[-1] == target


@pytest.mark.parametrize(("writer", "tries"), [(Writer(patient=0, give_up=1), 1), (Writer(patient=1, max_tries=3), 3)])
def test_the_impatient_stop_early(writer, tries):
    assert max(len(drawn) for _, _, drawn, _ in solutions(writer)) == tries


def test_with_full_insight_the_first_try_is_right():
    assert all(len(drawn) == 1 for _, _, drawn, _ in solutions(Writer(insight=1.0)))
