"""What a person sees, on a terminal and in a log file."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from jgrpo.config import TrainConfig
from jgrpo.reporting import CompletionRow, Reporter
from jgrpo.reporting.console import Clock, Console
from jgrpo.reporting.samples import notable
from jgrpo.reporting.text import duration, number, printable, size
from tests.reporting.conftest import HOSTILE, metrics_of


class FakeTime:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def reporter_on(file: StringIO, time: FakeTime, terminal: bool) -> Reporter:
    console = RichConsole(file=file, force_terminal=terminal, width=100, highlight=False, markup=False, emoji=False)
    return Reporter([Console(Path("runs/x"), console, Clock(time))])


def test_plain_lines_hold_the_progress(config: TrainConfig):
    file, time = StringIO(), FakeTime()
    reporter = reporter_on(file, time, terminal=False)
    reporter.start(config, ["base 0.4 MB"])
    for step, seconds in [(1, 30.0), (2, 2.0), (3, 4.0)]:
        time.now += seconds
        reporter.log(
            step,
            metrics_of(step, 10) | ({"eval_accuracy": 0.25 * step, "eval_accuracy_ci95": 0.041} if step != 2 else {}),
        )
    reporter.finish("3 steps")
    text = file.getvalue()
    assert "base 0.4 MB" in text
    third = next(line for line in text.splitlines() if line.startswith("step 3/10  reward"))
    for part in ("reward 0.6193 ± 0.3", "length 40", "kl 0.003", "tokens/s 4,000", "memory 3 GB", "0:36 elapsed"):
        assert part in third
    assert "0:21 left" in third  # 7 more at (2 + 4) / 2 seconds; the first step compiled
    assert "held-out, step 1: accuracy 0.25 ± 0.041   step 3: accuracy 0.75 ± 0.041" in text
    assert "runs/x/report.html" in text
    assert "\x1b" not in text


def test_an_evaluation_before_the_first_step_is_no_step(config: TrainConfig):
    file, time = StringIO(), FakeTime()
    reporter = reporter_on(file, time, terminal=False)
    reporter.start(config)
    time.now += 100
    reporter.log(0, {"eval_accuracy": 0.25})
    time.now += 2
    reporter.log(1, metrics_of(1, 10))
    assert "step 0/10  held-out: accuracy 0.25" in file.getvalue()
    assert "step 0/10  reward" not in file.getvalue()
    assert "0:18 left" in file.getvalue()


def test_a_terminal_gets_a_bar(config: TrainConfig):
    file, time = StringIO(), FakeTime()
    reporter = reporter_on(file, time, terminal=True)
    reporter.start(config)
    time.now += 3
    reporter.log(1, metrics_of(1, 10))
    reporter.finish()
    assert "step 1/10" in file.getvalue()
    assert "━" in file.getvalue()
    assert "0:27 left" in file.getvalue()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1  # the cursor comes back


@pytest.mark.parametrize("terminal", [False, True])
def test_model_output_has_no_effect_on_the_terminal(config: TrainConfig, terminal: bool):
    clean, hostile = StringIO(), StringIO()
    for file, text in ((clean, "plain"), (hostile, HOSTILE)):
        reporter = reporter_on(file, FakeTime(), terminal)
        reporter.start(config)
        reporter.completions(3, [CompletionRow(text, text, {"f": 1.0, "g": None}, 0.5)])
        reporter.warn(text)
        reporter.finish()
    shown = hostile.getvalue()
    assert shown.count("\x1b") == clean.getvalue().count("\x1b")
    assert not any(character in shown for character in "\x9b\u202e\ud800")
    flat = "".join(shown.split())
    assert "\\x1b[2J\\x9b1m[bold]" in flat
    assert "\\u202eevil" in flat
    assert "1f" in flat
    assert "noneg" in flat
    assert "+0.500" in flat


def test_long_output_is_cut_and_says_so():
    assert printable("x" * 700, max_chars=600) == "x" * 600 + " ... (+100 characters)"
    assert printable("a\nb\nc", max_lines=2) == "a\nb ... (+2 characters)"
    assert printable("a\nb\tc") == "a\nb\\tc"


def test_notable_rows_are_the_extremes_of_groups_with_a_spread_first():
    def row(prompt: str, advantage: float) -> CompletionRow:
        return CompletionRow(prompt, "", {}, advantage)

    rows = [row("same", 0), row("same", 0), row("a", 0), row("a", 1), row("a", -1), row("b", 2), row("b", -2)]
    picked = [(r.prompt, r.advantage) for r in notable(rows, 5)]
    assert picked == [("a", 1), ("a", -1), ("b", 2), ("b", -2), ("same", 0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.41294), "0.4129"),
        (number(1.234e-5), "1.23e-05"),
        (number(12345.6), "12,346"),
        (number(None), "none"),
        (number(float("nan")), "nan"),
        (size(999), "999 B"),
        (size(3.94e9), "3.94 GB"),
        (duration(42.4), "0:42"),
        (duration(7500), "2:05:00"),
        (duration(3 * 86400 + 4 * 3600), "3d 04:00"),
    ],
)
def test_numbers(text: str, expected: str):
    assert text == expected
