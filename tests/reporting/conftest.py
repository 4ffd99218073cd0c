"""A made-up run, as a loop would report it."""

from collections.abc import Callable
from math import exp
from pathlib import Path

import pytest

from jgrpo.cli import resolve_config, save_config
from jgrpo.config import TrainConfig
from jgrpo.reporting import CompletionRow, make_reporter

HOSTILE = "\x1b[2J\x9b1m[bold]<script>alert(1)</script> </td> {{ 1 }} \u202eevil \ud800 end"


def metrics_of(step: int, steps: int) -> dict[str, float]:
    """Healthy metrics with every name that algorithms.md lists."""
    share = step / steps
    reward = 0.2 + 0.6 * (1 - exp(-4 * share))
    return {
        **{"epoch": share, "loss": 0.01 * (-1) ** step, "grad_norm": 0.5, "learning_rate": 1e-4},
        **{"num_tokens": 1000 * step, "step_time": 2.0, "reward": reward, "reward_std": 0.3},
        **{"frac_reward_zero_std": 0.2, "rewards/exact/mean": reward, "rewards/exact/std": 0.3},
        **{"completions/mean_length": 40.0, "completions/min_length": 5, "completions/max_length": 96},
        **{"completions/clipped_ratio": 0.1, "kl": 0.01 * share, "entropy": 0.8},
        **{"clip_ratio/low_mean": 0.001, "clip_ratio/high_mean": 0.002},
        **{"sampling/sampling_logp_difference/mean": 1e-6, "sampling/sampling_logp_difference/max": 1e-5},
        **{"time/rollout": 1.0, "time/reward": 0.1, "time/update": 0.9},
        **{"throughput/rollout_tokens_per_s": 4000.0, "throughput/train_tokens_per_s": 9000.0},
        **{"memory/peak_bytes": 3.0e9, "memory/in_use_bytes": 2.5e9},
    }


def rows_of(step: int) -> list[CompletionRow]:
    """Two prompts with three completions each."""
    return [
        CompletionRow(
            f"prompt {i} of {step}", f"answer {j} {HOSTILE}", {"exact": None if j == 1 else float(j)}, j - 1.0
        )
        for i in range(2)
        for j in range(3)
    ]


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run of 10 steps in a temporary directory."""
    overrides = {"output_dir": str(tmp_path / "run"), "steps": 10, "tensorboard": False}
    (tmp_path / "run").mkdir()
    config = resolve_config(overrides=overrides)
    save_config(config, tmp_path / "run" / "config.yaml")
    return config


@pytest.fixture
def run(config: TrainConfig) -> Callable[[int], Path]:
    """Report a whole run of so many steps; returns its directory."""

    def report(steps: int) -> Path:
        reporter = make_reporter(config)
        reporter.start(config, ["plan line"])
        for step in range(1, steps + 1):
            evaluation = {"eval_accuracy": 0.5} if step in (1, steps) else {}
            reporter.log(step, metrics_of(step, steps) | evaluation)
            if step in (1, steps):
                reporter.completions(step, rows_of(step))
        reporter.finish("done")
        return Path(config.run.output_dir)

    return report
