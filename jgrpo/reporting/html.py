"""report.html: placeholder module docstring."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jgrpo.config import TrainConfig
from jgrpo.reporting.base import CompletionRow


class HtmlReport:
    """Sink that rebuilds report.html from the run directory at every table of completions and at the end."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def start(self, config: TrainConfig, plan_lines: Sequence[str], first_step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def finish(self, summary: str) -> None:
        pass
