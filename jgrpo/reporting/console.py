"""The terminal: a live line of progress, or one plain line a step where the output is not a terminal.

Everything printed goes in as `rich.text.Text`, so neither markup nor control characters in a
model's output have any effect.
"""

import atexit
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jgrpo.reporting.base import CompletionRow, Sink
from jgrpo.reporting.samples import notable
from jgrpo.reporting.text import duration, number, printable, size
from jgrpo.sft_config import AnyConfig

ROWS_SHOWN = 4


class Clock:
    """Time left, from the recent steps; the first one, which compiles, doesn't count once there are others."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = self._last = now()
        self._steps: deque[float] = deque(maxlen=20)
        self._counted = 0

    def tick(self, counted: bool = True) -> None:
        """One more step is done; `counted=False`: what was done was not a training step."""
        now, self._last, began = self._now(), self._now(), self._last
        if counted:
            if self._counted == 1:
                self._steps.clear()
            self._steps.append(now - began)
            self._counted += 1

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self._began

    def left(self, steps: int) -> float | None:
        """Seconds for `steps` more steps; None before the first."""
        return steps * sum(self._steps) / len(self._steps) if self._steps else None


def step_summary(metrics: Mapping[str, float]) -> str:
    """The metrics a person watches, those that are there: 'reward 0.41 ± 0.2 · length 43 · …'."""
    return "  ".join(part for part in (_reward(metrics), *_parts(metrics)) if part)


def _reward(metrics: Mapping[str, float]) -> str:
    spread = f" ± {number(metrics['reward_std'])}" if "reward_std" in metrics else ""
    if "reward" in metrics:
        return f"reward {number(metrics['reward'])}{spread}"
    return f"loss {number(metrics['loss'])}" if "loss" in metrics else ""


def _parts(metrics: Mapping[str, float]) -> list[str]:
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("completions/mean_length", "length", lambda v: f"{v:.0f}"),
        ("kl", "kl", number),
        (f"throughput/{'rollout' if 'reward' in metrics else 'train'}_tokens_per_s", "tokens/s", lambda v: f"{v:,.0f}"),
        ("memory/peak_bytes", "memory", size),
        ("memory/host_peak_rss_bytes", "memory", size),
    ]
    return [f"{label} {form(metrics[name])}" for name, label, form in shown if name in metrics]


def held_out(metrics: Mapping[str, float]) -> str:
    """The evaluation's main numbers, '' if this step had none."""
    functions = sorted(n for n in metrics if n.startswith("eval_rewards/") and n.endswith("/mean"))
    names = [name for name in ("eval_accuracy", "eval_reward", "eval_loss") if name in metrics]
    return "  ".join(_with_interval(metrics, name) for name in names + (functions if len(functions) > 1 else []))


def _with_interval(metrics: Mapping[str, float], name: str) -> str:
    interval = f" ± {metrics[name + '_ci95']:.2g}" if name + "_ci95" in metrics else ""
    return f"{name.removeprefix('eval_')} {number(metrics[name])}{interval}"


class Console(Sink):
    """Sink for people."""

    def __init__(self, run_dir: Path, console: RichConsole | None = None, clock: Clock | None = None) -> None:
        self.console = console or RichConsole(highlight=False, markup=False, emoji=False, soft_wrap=False)
        self.run_dir = run_dir
        self._clock = clock
        self._live: Live | None = None
        self._evaluations: list[tuple[int, str]] = []

    def start(self, config: AnyConfig, plan_lines: Sequence[str], first_step: int) -> None:
        """The run in one line, the plan, and the progress bar."""
        self.total = config.training.steps
        self.clock = self._clock or Clock()
        self._print(_title(config), style="bold")
        for line in plan_lines:
            self._print(line)
        if first_step > 0:
            self._print(f"resuming after step {first_step} of {self.total}")
        self._print(f"writing to {self.run_dir}")
        if self.console.is_terminal:
            self._start_live(max(first_step, 0))

    def _start_live(self, first_step: int) -> None:
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=self.total, completed=first_step, left="compiling ...")
        self._live = Live(Group(self.progress), console=self.console, refresh_per_second=4)
        self._live.start()
        atexit.register(self._live.stop)  # a crash must give the cursor back

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar, or print the step's line; an evaluation always gets a line of its own."""
        self.clock.tick(counted=step > 0)
        seconds = self.clock.left(self.total - step)
        left = f"{duration(seconds)} left" if seconds is not None else ""
        if evaluation := held_out(metrics):
            self._evaluations.append((step, evaluation))
            self._print(f"step {step}/{self.total}  held-out: {evaluation}", style="bold green")
        if step == 0:
            return
        if self._live is None:
            self._print(
                f"step {step}/{self.total}  {step_summary(metrics)}  {duration(self.clock.elapsed())} elapsed  {left}"
            )
        else:
            self.progress.update(self.task, completed=step, left=left)
            self._live.update(Group(self.progress, Text(step_summary(metrics), overflow="ellipsis", no_wrap=True)))

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """A table of a few telling rows."""
        self.console.print(completions_table(step, notable(rows, ROWS_SHOWN)))

    def warn(self, text: str) -> None:
        """One yellow line."""
        self._print("warning: " + printable(text), style="yellow")

    def finish(self, summary: str) -> None:
        """Held-out numbers before and after, the summary, and where the report is."""
        if self._live is not None:
            self._live.stop()
        if len(self._evaluations) > 1:
            (first, before), (last, after) = self._evaluations[0], self._evaluations[-1]
            self._print(f"held-out, step {first}: {before}   step {last}: {after}", style="bold green")
        if summary:
            self._print(summary)
        self._print(f"report: {self.run_dir / 'report.html'}")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)


def _title(config: AnyConfig) -> str:
    steps = config.training.steps
    return f"jgrpo: {config.model.model} on {config.data.dataset}, {steps} steps, {config.batch_in_words}"


def completions_table(step: int, rows: Sequence[CompletionRow]) -> Table:
    """Prompt, completion, rewards and advantage of some rows."""
    table = Table(title=Text(f"completions of step {step}"), show_lines=True, expand=True, title_justify="left")
    table.add_column("prompt", ratio=3, overflow="fold")
    table.add_column("completion", ratio=5, overflow="fold")
    table.add_column("rewards", ratio=2, min_width=18, overflow="fold")
    table.add_column("advantage", justify="right", min_width=9)
    for row in rows:
        rewards = "\n".join(f"{number(value)} {name}" for name, value in row.rewards.items())
        table.add_row(
            Text(printable(row.prompt, max_lines=6, max_chars=300)),
            Text(printable(row.completion) or "(empty)"),
            Text(rewards),
            Text(f"{row.advantage:+.3f}"),
        )
    return table
