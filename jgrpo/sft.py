"""`python -m jgrpo.sft`: train an adapter on prompts with completions, as a warm-up before reinforcement learning.

A base model that has never seen the wanted format gets no reward, and without reward GRPO learns nothing; a few hundred
supervised steps give it the format. The run directory is like that of `python -m jgrpo.train`. Merge the adapter
(`python -m jgrpo.export --format merged`) and train on from the merged checkpoint.
"""

from collections.abc import Sequence

from jgrpo.cli import parse_command, run_command
from jgrpo.sft_config import SftConfig
from jgrpo.training.sft_loop import sft
from jgrpo.validation import validate_supervised

DESCRIPTION = (
    "Train an adapter on prompts with completions (SFT). With no arguments: worked solutions for the demo model."
)


def config_from_args(argv: Sequence[str] | None = None) -> SftConfig:
    """The validated configuration of a supervised run from a command line (None: `sys.argv[1:]`)."""
    config = parse_command(SftConfig, argv, prog="python -m jgrpo.sft", description=DESCRIPTION)
    validate_supervised(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    sft(config_from_args(argv))
    return 0


if __name__ == "__main__":
    run_command(main)
