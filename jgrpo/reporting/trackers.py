"""TensorBoard and Weights & Biases sinks."""

import importlib
import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from jgrpo.errors import UserError
from jgrpo.reporting.base import Sink
from jgrpo.settings import flatten
from jgrpo.sft_config import AnyConfig


class TensorBoard(Sink):
    """Event files under `tensorboard/`, through tensorboardX (no TensorFlow, no torch)."""

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / "tensorboard"

    def start(self, config: AnyConfig, plan_lines: Sequence[str], first_step: int) -> None:
        """Open the event file."""
        from tensorboardX import SummaryWriter  # here: half a second that `--help` need not pay

        # purge_step makes TensorBoard forget what a killed run logged after its checkpoint.
        purge = first_step + 1 if first_step > 0 else None
        self.writer = SummaryWriter(str(self.directory), purge_step=purge, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar for each metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, float(value), step)

    def finish(self, summary: str) -> None:
        """Close the event file."""
        self.writer.close()


class WeightsAndBiases(Sink):
    """A W&B run; a resumed jgrpo run continues it (its id is kept in the run directory)."""

    def __init__(self, run_dir: Path) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb true, but the package wandb is not installed: pip install wandb, or drop --wandb.")
        self.run_dir = run_dir

    def start(self, config: AnyConfig, plan_lines: Sequence[str], first_step: int) -> None:
        """Start the W&B run, or continue it."""
        wandb = importlib.import_module("wandb")
        id_file = self.run_dir / "wandb_id"
        if not (first_step > 0 and id_file.exists()):
            id_file.write_text(uuid.uuid4().hex)
        self.run = wandb.init(
            project=config.reporting.wandb_project,
            name=self.run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(self.run_dir),
            config=flatten(config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of the step at once."""
        self.run.log(dict(metrics), step=step)

    def finish(self, summary: str) -> None:
        """Wait for the upload."""
        self.run.finish()
