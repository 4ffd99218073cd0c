"""report.html: one self-contained page about a run, made from its directory alone.

Nothing in it is loaded from anywhere (a content security policy says so to the browser), and what the model wrote
is escaped. `python -m jgrpo.report --run DIR` makes it again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jgrpo.cli import load_run_config
from jgrpo.errors import UserError
from jgrpo.reporting.base import CompletionRow, Sink
from jgrpo.reporting.charts import HEIGHT, LEFT, RIGHT, WIDTH, column, finite
from jgrpo.reporting.diagnose import diagnose
from jgrpo.reporting.files import (
    METRICS,
    WARNINGS,
    completions_path,
    logged_steps,
    read_lines,
    read_metrics,
    write_atomically,
)
from jgrpo.reporting.panels import panels
from jgrpo.reporting.samples import notable
from jgrpo.reporting.text import duration, number, printable, size
from jgrpo.settings import flatten, settings_of
from jgrpo.sft_config import AnyConfig

SAMPLED_STEPS, ROWS_OF_A_STEP = 6, 6
REFRESH_SECONDS = 60.0
History = Sequence[Mapping[str, Any]]


def write_report(run_dir: Path, config: AnyConfig | None = None) -> Path:
    """Make `run_dir/report.html` from metrics.jsonl, warnings.jsonl, completions/ and config.yaml.

    Raises UserError if the directory is not one of a run.
    """
    if not (run_dir / METRICS).exists():
        raise UserError(f"{run_dir}: no {METRICS} in it. Give the output directory of a training run.")
    path = run_dir / "report.html"
    write_atomically(path, render(run_dir, config or load_run_config(run_dir / "config.yaml")))
    return path


def render(run_dir: Path, config: AnyConfig) -> str:
    """The page as text."""
    history = read_metrics(run_dir)
    warnings = read_lines(run_dir / WARNINGS)
    told = {line["text"] for line in warnings}
    environment = Environment(
        loader=PackageLoader("jgrpo.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "printable": printable}
    return environment.get_template("report.html.j2").render(
        config=config,
        steps=history[-1]["step"] if history else 0,
        tiles=tiles(history, config),
        findings=[finding.text for finding in diagnose(history) if finding.text not in told],
        warnings=warnings,
        charts=panels(history),
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT},
        samples=samples(run_dir),
        settings=settings(config),
        table=metric_table(history),
    )


def tiles(history: History, config: AnyConfig) -> list[tuple[str, str]]:
    """(label, value) of the numbers at the top; those that the history has."""
    accuracy = next((n for n in ("eval_accuracy", "eval_reward") if any(n in row for row in history)), "")
    found = [
        (f"held-out {accuracy.removeprefix('eval_')}", change(history, accuracy, 1)),
        ("reward", change(history, "reward", 5)),
        ("completion length", change(history, "completions/mean_length", 5)),
        ("time", over(history, "step_time", lambda v: duration(sum(v)))),
        ("tokens", over(history, "num_tokens", lambda v: f"{v[-1]:,.0f}")),
        ("rollout tokens/s", over(history, "throughput/rollout_tokens_per_s", lambda v: f"{median(v):,.0f}")),
        ("peak memory", over(history, "memory/peak_bytes", lambda v: size(max(v)))),
        ("peak memory (host)", over(history, "memory/host_peak_rss_bytes", lambda v: size(max(v)))),
    ]
    return [(label, value) for label, value in found if value]


def over(history: History, name: str, form: Any) -> str:
    """A metric's finite values as text, "" if there are none."""
    values = finite(column(history, name).y)
    return form(values) if values else ""


def change(history: History, name: str, over_steps: int) -> str:
    """'0.25 → 0.61': means of the first and the last values of a metric; one number if there is only one."""

    def first_to_last(values: list[float]) -> str:
        count = min(over_steps, max(1, len(values) // 2))
        ends = (sum(values[:count]) / count, sum(values[-count:]) / count)
        return " → ".join(f"{end:.3g}" for end in ends) if len(values) > 1 else f"{ends[0]:.3g}"

    return over(history, name, first_to_last)


def samples(run_dir: Path) -> list[tuple[int, list[CompletionRow]]]:
    """Notable rows of a few logged steps: the first, the last and some between."""
    logged = logged_steps(run_dir)
    count = min(SAMPLED_STEPS, len(logged))
    chosen = [logged[round(i * (len(logged) - 1) / max(count - 1, 1))] for i in range(count)]
    rows = {step: [row_of(line) for line in read_lines(completions_path(run_dir, step))] for step in chosen}
    return [(step, notable(rows[step], ROWS_OF_A_STEP)) for step in chosen]


def row_of(line: Mapping[str, Any]) -> CompletionRow:
    """A line of completions/ as it was logged."""
    return CompletionRow(line["prompt"], line["completion"], line["rewards"], line["advantage"] or 0.0)


def settings(config: AnyConfig) -> dict[str, list[tuple[str, str, bool]]]:
    """{section: [(name, value, differs from the default)]}."""
    values = flatten(config)
    grouped: dict[str, list[tuple[str, str, bool]]] = {}
    for name, setting in settings_of(type(config)).items():
        value = values[name]
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        grouped.setdefault(setting.section, []).append((name, shown, value != setting.default))
    return grouped


def metric_table(history: History) -> list[tuple[str, list[str]]]:
    """(metric, [first, last, lowest, highest]) of everything that was logged."""
    names = dict.fromkeys(name for row in history for name in row if name != "step")
    values = {name: finite(column(history, name).y) for name in names}
    return [(n, [number(x) for x in (v[0], v[-1], min(v), max(v))]) for n, v in values.items() if v]


class HtmlReport(Sink):
    """Sink that makes report.html at the end, and on the way with a table of completions, at most once a minute."""

    def __init__(self, run_dir: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.run_dir = run_dir
        self._now = now
        self._made_at = -float("inf")

    def start(self, config: AnyConfig, plan_lines: Sequence[str], first_step: int) -> None:
        """Keep the configuration."""
        self.config = config

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Bring the page up to date, unless that was done a moment ago."""
        if self._now() - self._made_at >= REFRESH_SECONDS:
            write_report(self.run_dir, self.config)
            self._made_at = self._now()

    def finish(self, summary: str) -> None:
        """Bring the page up to date."""
        write_report(self.run_dir, self.config)
