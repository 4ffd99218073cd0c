"""`python -m jgrpo.plan`: what a run needs of a GPU's memory, and the best settings that fit. Touches no GPU and no weights.

Takes every setting of `jgrpo.train`. The numbers are those of `jgrpo.training.memory`, for 16-bit compute on a GPU unless
`dtype` says float32; of a hub model only `config.json` is fetched.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console

from jgrpo.checkpoints.source import load_model_config
from jgrpo.cli import parse_command, run_command
from jgrpo.config import (
    AlgorithmConfig,
    DataConfig,
    LoraConfig,
    ModelSettings,
    OptimizerConfig,
    QuantizationConfig,
    RolloutConfig,
    TrainConfig,
    TrainingConfig,
)
from jgrpo.errors import UserError
from jgrpo.settings import build, flatten
from jgrpo.training.fitting import best_fit, parse_bytes, refusal, setting_flags, show_plan
from jgrpo.training.memory import MemoryPlan, plan_memory
from jgrpo.validation import check_batch, check_full, check_modules, check_ranges


@dataclass(frozen=True)
class PlanSettings:
    """A run as it would be trained, and the device to plan for."""

    device_memory: str | None = None
    """Memory of the device: "8GB" (10^9 bytes) or "8GiB"; null: only the chosen settings are shown."""
    model: ModelSettings = field(default_factory=ModelSettings)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exits with 2 if nothing fits."""
    description = "What a run needs of a GPU's memory, and the best settings that fit. Touches no GPU and no weights."
    settings = parse_command(PlanSettings, argv, prog="python -m jgrpo.plan", description=description)
    values = flatten(settings)
    device = values.pop("device_memory")
    config = build(TrainConfig, values)
    check_ranges(flatten(config))
    check_batch(config)
    check_modules(config)
    check_full(config)
    shape = load_model_config(config.model.model, config.model.revision, weights=False)
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)

    def plan(config: TrainConfig) -> MemoryPlan:
        return plan_memory(config, shape, dtype, config.data.max_prompt_length, cudnn=dtype != "float32")

    chosen = plan(config)
    show_plan(console, chosen, f"{config.model.model}, {config.batch_in_words}: the chosen settings")
    if device is None:
        return 0
    limit = parse_bytes(device)
    if chosen.total <= limit:
        console.print(f"fits {device} ({(limit - chosen.total) / 1e9:.2f} GB to spare)")
        return 0
    best = best_fit(config, plan, limit)
    if best is None:
        raise UserError(refusal(config, chosen, limit, None))
    show_plan(console, plan(best), f"the settings that fit {device} at least cost: {setting_flags(config, best)}")
    return 0


if __name__ == "__main__":
    run_command(main)
