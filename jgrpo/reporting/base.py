"""The one interface between a training loop and everything that shows or stores its progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jgrpo.reporting.diagnose import Watch
from jgrpo.sft_config import AnyConfig

FRESH = -1
"""`first_step` of a run that continues nothing: not even a record of step 0 is kept."""


@dataclass(frozen=True)
class CompletionRow:
    """One completion of a logged step."""

    prompt: str
    completion: str
    rewards: Mapping[str, float | None]
    """Each reward function's value by name; None: the function gave none for this row."""
    advantage: float
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More to keep with the row, JSON-able: length, finish reason, data set columns."""


class Sink:
    """One destination; each method does nothing unless overridden.

    The calls arrive in order: start, then any of the others, then finish.
    """

    def start(self, config: AnyConfig, plan_lines: Sequence[str], first_step: int) -> None:
        """The run begins (`FRESH`), or resumes after the step `first_step`; records of later steps are dropped."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one finished step, evaluation's among them with the prefix `eval_`. Steps count from 1;
        an evaluation before the first update is step 0.
        """

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Completions of a step, grouped by prompt."""

    def warn(self, text: str) -> None:
        """Something a person should know, in words."""

    def finish(self, summary: str) -> None:
        """The run ends, for whatever reason; nothing is lost if this is never called."""


class Reporter:
    """A sink made of sinks: each call goes to all of them, in order, and `log` warns of what `diagnose` finds."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)
        self._watch = Watch()
        self._started: list[Sink] = []

    def start(self, config: AnyConfig, plan_lines: Sequence[str] = (), first_step: int = FRESH) -> None:
        """See `Sink.start`."""
        for sink in self.sinks:
            sink.start(config, plan_lines, first_step)
            self._started.append(sink)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Sink.log`. Values may be Python, NumPy or JAX scalars."""
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        for sink in self.sinks:
            sink.log(step, values)
        for finding in self._watch.update(values):
            self.warn(finding.text)

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """See `Sink.completions`."""
        for sink in self.sinks:
            sink.completions(step, rows)

    def warn(self, text: str) -> None:
        """See `Sink.warn`."""
        for sink in self.sinks:
            sink.warn(text)

    def finish(self, summary: str = "") -> None:
        """See `Sink.finish`; a sink that never started is left alone, so this may stand in a `finally`."""
        for sink in self._started:
            sink.finish(summary)


def is_due(step: int, every: int, last_step: int, first_step: int = 1) -> bool:
    """Whether something done every N steps is done now: at the first step, each N-th and the last; never if N = 0."""
    return every > 0 and step >= first_step and (step in (first_step, last_step) or step % every == 0)
