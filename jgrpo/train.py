"""`python -m jgrpo.train`: train an adapter with GRPO. Without arguments: the built-in demo, offline, on a CPU."""

from collections.abc import Sequence

from jgrpo.cli import config_from_args, run_command
from jgrpo.training.loop import train


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    train(config_from_args(argv))
    return 0


if __name__ == "__main__":
    run_command(main)
