"""Built-in rewards against values worked out by hand, or against the implementation they have to agree with."""

import re
from fractions import Fraction

import pytest

from jgrpo.rewards import answers, formats, lengths, mathematics
from jgrpo.rewards.arithmetic import ExpressionError, evaluate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>(3 + 5) * 7</answer>", 1.0),
        ("<answer> 7*(5+3) </answer>", 1.0),
        ("<answer>\n(3 + 5) * 7\n</answer>", 1.0),
        ("<answer>1</answer> no, <answer>(3 + 5) * 7</answer>", 1.0),
        ("<answer>(3 + 5) * 7</answer> or <answer>1</answer>", 0.1),
        ("<answer>8 * 7</answer>", 0.1),
        ("<answer>(3 + 5) * 7 + 0</answer>", 0.1),
        ("<answer>(3 + 5) * 7 * 7 / 7</answer>", 0.1),
        ("<answer>3 + 5 + 7</answer>", 0.1),
        ("<answer>(3 + 5) * 7 = 56</answer>", 0.1),
        ("<answer></answer>", 0.1),
        ("<answer>7 / (5 - 5) + 3</answer>", 0.1),
        ("<answer>__import__('os').getcwd()</answer>", 0.1),
        ("(3 + 5) * 7", 0.0),
        ("<answer>(3 + 5) * 7", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(text, expected):
    assert answers.countdown_score(text, [3, 5, 7], 56) == expected


def test_countdown_divides_exactly_and_repeats_numbers():
    assert answers.countdown_score("<answer>(1 / 3) * 3 + 3</answer>", [1, 3, 3, 3], 4) == 1.0
    assert answers.countdown_score("<answer>5 + 5</answer>", [5, 5], 10) == 1.0
    assert answers.countdown_score("<answer>5 + 5</answer>", [5, 5, 5], 10) == 0.1


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("-3 + 5", 2, [3, 5]),
        ("0.1 + 0.2", Fraction(3, 10), [Fraction(1, 10), Fraction(1, 5)]),
        ("2 * (7 - 4)", 6, [2, 7, 4]),
    ],
)
def test_arithmetic(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text", ["2 ** 3", "9**9**9", "7 // 2", "7 % 2", "a + 1", "f(1)", "[1]", "True + 1", "1j", "1 if 2 else 3", "", "1 +",
             "1 / 0", "(" * 300 + "1" + ")" * 300, "1 + " * 200 + "1", "'a'", "1; 2", "\0"],
)  # fmt: skip
def test_everything_but_arithmetic_is_refused(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("so\n#### 72", "72", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 1234", "He has it.\n#### 1,234", 1.0),
        ("#### 5\n#### 72", "72", 1.0),
        ("#### 72.0", "72", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 72\n#### 5", "72", 0.0),
        ("the answer is 72", "72", 0.0),
    ],
)
def test_gsm8k(text, gold, expected):
    assert answers.gsm8k([text], answer=[gold]) == [expected]


def test_exact_match_reads_the_tag_or_everything():
    completions = ["<answer> 4 </answer>", " 4\n", "so <answer>5</answer>", [{"role": "assistant", "content": "4"}]]
    assert answers.exact_match(completions, answer=["4", "4", "4", 4]) == [1.0, 1.0, 0.0, 1.0]


def test_integer_answer():
    assert answers.integer_answer(["<answer>-12</answer>", "7", "<answer>1.5</answer>", "²"]) == [0.5, 0.5, 0.0, 0.0]


GOOD = "<reasoning>\na\nb\n</reasoning>\n<answer>\n4\n</answer>\n"


def test_xml_formats():
    loose = "<reasoning>a\nb</reasoning> <answer>4</answer>"
    assert formats.xml_format_strict([GOOD, GOOD + "x", loose]) == [0.5, 0.0, 0.0]
    assert formats.xml_format_soft([GOOD, loose, "x" + loose, "<reasoning>a</reasoning>"]) == [0.5, 0.5, 0.0, 0.0]


def test_xml_count():
    assert formats.xml_count_score(GOOD) == 0.5
    assert formats.xml_count_score(GOOD + "1234") == pytest.approx(0.5 - 0.004)
    assert formats.xml_count_score("<reasoning>\nx") == 0.125
    assert formats.xml_count_score("none") == 0.0
    assert formats.xml_count_score(GOOD + GOOD) < 0.125, "tags that occur twice do not count"


@pytest.mark.parametrize(
    "text",
    ["<think>a</think>b", "<think>\na\n</think>\nb", "<think></think>", "<think>a</think>b</think>", " <think>a</think>",
     "<think>a", "a</think>", "<think>a<think>b</think>", "<think>a</think><think>b</think>", "<think>a</think>\n<think>"],
)  # fmt: skip
def test_think_format_agrees_with_trl(text):
    # The pattern of trl.rewards.think_format_reward.
    trl = re.match(r"^<think>(?!.*<think>)(.*?)</think>.*$", text, re.DOTALL | re.MULTILINE)
    assert formats.think_format([[{"role": "assistant", "content": text}]]) == [float(bool(trl))]


def test_repetition_penalty_and_length():
    assert lengths.make_repetition_penalty(2)([[1, 2, 3, 4], [5, 5, 5, 5, 5], [1]]) == [0.0, -0.75, 0.0]
    assert lengths.length([[1, 2], []]) == [2.0, 0.0]


def test_soft_overlong():
    ids = [[1] * 80, [1] * 90, [1] * 100, [1] * 101]
    assert lengths.make_soft_overlong(100, 20)(ids) == [0.0, -0.5, -1.0, -1.0]
    assert lengths.soft_overlong(ids, max_completion_length=100) == [0.0, -0.5, -1.0, -1.0]


def test_cosine():
    reward = lengths.make_cosine(100)
    completions = [r"\boxed{\frac{1}{3}}"] * 4 + [r"\boxed{\frac{1}{2}}"] * 2
    ids = [[1] * n for n in (0, 50, 100, 300, 50, 0)]
    assert reward(completions, ids, [r"\frac{1}{3}"] * 6) == pytest.approx([1.0, 0.75, 0.5, 0.5, -0.75, -1.0])


def test_math_verify_judges_equivalence():
    completions = [r"It is \boxed{\frac{2}{6}}.", r"\boxed{0.5}", "nothing", r"\boxed{3}"]
    assert mathematics.math_verify(completions, [r"\frac{1}{3}", r"\frac{1}{3}", "1", ""]) == [1.0, 0.0, 0.0, None]
