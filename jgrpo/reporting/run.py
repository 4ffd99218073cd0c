"""Which sinks a run has, from its settings."""

from pathlib import Path

from jgrpo.reporting.base import Reporter, Sink
from jgrpo.reporting.console import Console
from jgrpo.reporting.files import RunFiles
from jgrpo.reporting.html import HtmlReport
from jgrpo.reporting.trackers import TensorBoard, WeightsAndBiases
from jgrpo.sft_config import AnyConfig


def make_reporter(config: AnyConfig) -> Reporter:
    """The reporter of a run in `config.run.output_dir` (an existing directory, placeholders filled in).

    Raises UserError if a tracker is switched on but not installed. Nothing is written before `start`.
    """
    run_dir = Path(config.run.output_dir)
    sinks: list[Sink] = [RunFiles(run_dir), Console(run_dir)]
    if config.reporting.tensorboard:
        sinks.append(TensorBoard(run_dir))
    if config.reporting.wandb:
        sinks.append(WeightsAndBiases(run_dir))
    sinks.append(HtmlReport(run_dir))
    return Reporter(tuple(sinks))
