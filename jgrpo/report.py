"""`python -m jgrpo.report --run DIR`: make a run's report.html again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jgrpo.cli import parse_command, run_command
from jgrpo.reporting.html import write_report


@dataclass(frozen=True)
class ReportArguments:
    """Which run."""

    run: str
    """Output directory of a training run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and print where it is."""
    arguments = parse_command(
        ReportArguments, argv, prog="python -m jgrpo.report", description="Make a run's report.html again."
    )
    print(write_report(Path(arguments.run)))


if __name__ == "__main__":
    run_command(main)
