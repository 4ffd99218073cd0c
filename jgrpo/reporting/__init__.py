"""What a run shows and writes: metrics.jsonl, completions/, the console, TensorBoard, W&B, report.html."""

from jgrpo.reporting.base import FRESH, CompletionRow, Reporter, Sink, is_due
from jgrpo.reporting.memory import memory_metrics
from jgrpo.reporting.run import make_reporter

__all__ = ["FRESH", "CompletionRow", "Reporter", "Sink", "is_due", "make_reporter", "memory_metrics"]
