"""The record in the run directory: strict JSON, flushed, and cut back when a run resumes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jgrpo.config import TrainConfig
from jgrpo.reporting import FRESH, CompletionRow, Reporter, is_due, make_reporter
from jgrpo.reporting.files import RunFiles, completions_path, logged_steps, read_lines, read_metrics
from tests.reporting.conftest import HOSTILE, metrics_of, rows_of


def strict(line: str) -> dict[str, object]:
    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(line, parse_constant=refuse)


def test_one_line_a_step_readable_at_once(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    reporter = Reporter([RunFiles(run_dir)])
    reporter.start(config)
    for step in (1, 2):
        reporter.log(step, {"loss": np.float32(0.5), "num_tokens": 7 * step})
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step
        assert lines[-1] == f'{{"step": {step}, "loss": 0.5, "num_tokens": {7 * step}}}'


def test_non_finite_values_are_null(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    reporter = Reporter([RunFiles(run_dir)])
    reporter.start(config)
    reporter.log(1, {"loss": float("nan"), "grad_norm": np.float32("inf"), "kl": 0.0})
    line = strict((run_dir / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": None, "grad_norm": None, "kl": 0.0}


def test_resume_drops_what_will_be_repeated(config: TrainConfig, run: Callable[[int], Path]):
    run_dir = run(10)
    before = (run_dir / "metrics.jsonl").read_text().splitlines()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "los')  # killed half-way through a line
    (run_dir / "warnings.jsonl").write_text('{"step": 3, "text": "a"}\n{"step": 9, "text": "b"}\n')
    reporter = Reporter([RunFiles(run_dir)])
    reporter.start(config, first_step=6)
    assert (run_dir / "metrics.jsonl").read_text().splitlines() == before[:6]
    assert read_lines(run_dir / "warnings.jsonl") == [{"step": 3, "text": "a"}]
    assert logged_steps(run_dir) == [1]
    for step in range(7, 11):
        reporter.log(step, metrics_of(step, 10) | ({"eval_accuracy": 0.5} if step == 10 else {}))
    reporter.finish()
    assert (run_dir / "metrics.jsonl").read_text().splitlines() == before


def test_a_fresh_run_keeps_nothing_of_another(config: TrainConfig, run: Callable[[int], Path]):
    run_dir = run(2)
    before = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": 0.1}\n' + before)
    Reporter([RunFiles(run_dir)]).start(config, first_step=FRESH)
    assert (run_dir / "metrics.jsonl").read_text() == ""
    assert logged_steps(run_dir) == []


def test_finish_without_start_touches_nothing(config: TrainConfig):
    make_reporter(config).finish("stopped by an error")
    assert [path.name for path in Path(config.run.output_dir).iterdir()] == ["config.yaml"]


def test_completions_keep_everything_as_it_was(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    reporter = Reporter([RunFiles(run_dir)])
    reporter.start(config)
    row = CompletionRow("p\n\u2028", HOSTILE, {"f": None, "g": 0.5}, float("nan"), {"length": 3, "answer": "x"})
    reporter.completions(12, [row])
    path = run_dir / "completions" / "step_000012.jsonl"
    assert path == completions_path(run_dir, 12)
    (line,) = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rewards = {"f": None, "g": 0.5}
    expected = {"prompt": "p\n\u2028", "completion": HOSTILE, "rewards": rewards, "advantage": None}
    assert strict(line) == expected | {"length": 3, "answer": "x"}


def test_warnings_carry_the_last_step(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    reporter = Reporter([RunFiles(run_dir)])
    reporter.start(config)
    reporter.log(1, metrics_of(1, 10))
    reporter.warn("reward function f raised ValueError")
    assert read_lines(run_dir / "warnings.jsonl") == [{"step": 1, "text": "reward function f raised ValueError"}]


def test_problems_in_the_metrics_become_warnings_once(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    reporter = Reporter([RunFiles(run_dir)])
    reporter.start(config)
    for step in range(1, 7):
        reporter.log(step, metrics_of(step, 10) | {"completions/clipped_ratio": 1.0})
    (warning,) = read_lines(run_dir / "warnings.jsonl")
    assert warning["step"] == 3
    assert "Every completion" in warning["text"]


def test_rows_are_read_back(run: Callable[[int], Path]):
    run_dir = run(2)
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2]
    assert len(read_lines(completions_path(run_dir, 2))) == len(rows_of(2))


@pytest.mark.parametrize(
    ("every", "first", "due"),
    [(4, 1, [1, 4, 8, 10]), (4, 0, [0, 4, 8, 10]), (0, 1, []), (100, 1, [1, 10]), (1, 1, range(1, 11))],
)
def test_what_is_done_every_n_steps(every: int, first: int, due: list[int]):
    assert [step for step in range(11) if is_due(step, every, 10, first)] == list(due)
