"""The files of a run directory: metrics.jsonl, warnings.jsonl and completions/step_00000N.jsonl.

They are the run's only record: report.html is made from them alone. Every line is flushed, so a killed process
loses nothing it logged, and what a resumed run will repeat is dropped when it starts.
"""

import json
import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from jgrpo.reporting.base import CompletionRow, Sink
from jgrpo.sft_config import AnyConfig

METRICS, WARNINGS, COMPLETIONS = "metrics.jsonl", "warnings.jsonl", "completions"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, [] if there is none; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's history, one object a step; non-finite values are None."""
    return read_lines(run_dir / METRICS)


def completions_path(run_dir: Path, step: int) -> Path:
    """The file of one step's completions."""
    return run_dir / COMPLETIONS / f"step_{step:06}.jsonl"


def logged_steps(run_dir: Path) -> list[int]:
    """Steps whose completions were logged, in order."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / COMPLETIONS).glob("step_*.jsonl"))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a process killed half-way, sees the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_line(values: Mapping[str, Any]) -> str:
    """One line of strict JSON; NaN and infinities, which JSON lacks, become null."""
    return (
        json.dumps({key: _jsonable(value) for key, value in values.items()}, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    as_float = float(value)  # NumPy and JAX scalars
    return as_float if isfinite(as_float) else None


def keep_steps(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and a last line that was cut off."""
    if path.exists():
        write_atomically(path, "".join(json_line(line) for line in read_lines(path) if line["step"] <= last_step))


class RunFiles(Sink):
    """Sink that writes the run directory's record."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.last_step = 0
        self._metrics: TextIO | None = None

    def start(self, config: AnyConfig, plan_lines: Sequence[str], first_step: int) -> None:
        """Drop what a resumed run will repeat, and open metrics.jsonl."""
        (self.run_dir / COMPLETIONS).mkdir(parents=True, exist_ok=True)
        keep_steps(self.run_dir / METRICS, first_step)
        keep_steps(self.run_dir / WARNINGS, first_step)
        for step in logged_steps(self.run_dir):
            if step > first_step:
                completions_path(self.run_dir, step).unlink()
        self.last_step = max(first_step, 0)
        self._metrics = (self.run_dir / METRICS).open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl."""
        assert self._metrics is not None, "start() comes before log()"
        self.last_step = step
        self._metrics.write(json_line({"step": step, **metrics}))
        self._metrics.flush()

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """One file, one line for each row."""
        lines = [
            {"prompt": r.prompt, "completion": r.completion, "rewards": r.rewards, "advantage": r.advantage, **r.extra}
            for r in rows
        ]
        write_atomically(completions_path(self.run_dir, step), "".join(map(json_line, lines)))

    def warn(self, text: str) -> None:
        """One line of warnings.jsonl, under the last finished step."""
        with (self.run_dir / WARNINGS).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json_line({"step": self.last_step, "text": text}))

    def finish(self, summary: str) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
