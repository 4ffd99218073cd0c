"""Every setting of a supervised run; the sections that it shares with the others are `jgrpo.config`'s."""

from dataclasses import dataclass, field

from jgrpo.config import LoraConfig, ModelSettings, OptimizerConfig, QuantizationConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class SftDataConfig:
    """Prompts with the completions to imitate."""

    dataset: str = "countdown"
    """Built-in task name, hub id, or path of a .jsonl, .json, .parquet or .csv file."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    eval_dataset: str | None = None
    """Held-out rows, same forms as dataset; null: the built-in task's own held-out split, if there is one."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    completion_column: str = "completion"
    """Column with the completion: a string, or a list of one assistant message."""
    system_prompt: str | None = None
    """System message put before every prompt (needs a chat template)."""
    max_length: int = 1024
    """Tokens T of a row; longer examples are left out and counted."""
    packing: bool = True
    """Put several examples into a row; they do not see each other."""


@dataclass(frozen=True)
class SftTrainingConfig:
    """The supervised loop."""

    steps: int = 200
    """Optimizer steps."""
    seed: int = 0
    """Seed of everything random."""
    rows_per_step: int = 16
    """Rows of max_length tokens in one optimizer step."""
    microbatch_rows: int = 4
    """Rows in one forward and backward; divides rows_per_step."""
    remat: bool = True
    """Recompute each layer in the backward instead of keeping its activations."""
    logprob_workspace: float = 256.0
    """MB that logits and their gradient may take: it bounds how many positions have them at once."""
    max_nonfinite_steps: int = 5
    """Abort after this many updates in a row with a non-finite loss or gradient."""


@dataclass(frozen=True)
class SftEvaluationConfig:
    """Held-out loss during the run."""

    eval_every: int = 20
    """Steps between evaluations, besides the first and the last; 0: never."""
    eval_prompts: int = 128
    """Held-out examples."""


@dataclass(frozen=True)
class SftReportingConfig:
    """What is written about the run."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (if installed)."""
    wandb_project: str = "jgrpo"
    """Its project name."""


@dataclass(frozen=True)
class SftConfig:
    """One supervised run. Sections have the names of `TrainConfig`'s, so that one file can serve both commands."""

    model: ModelSettings = field(default_factory=ModelSettings)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: SftDataConfig = field(default_factory=SftDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: SftTrainingConfig = field(default_factory=SftTrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: SftEvaluationConfig = field(default_factory=SftEvaluationConfig)
    reporting: SftReportingConfig = field(default_factory=SftReportingConfig)

    @property
    def batch_in_words(self) -> str:
        """What one step trains on."""
        return f"{self.training.rows_per_step} rows x {self.data.max_length} tokens a step"


AnyConfig = TrainConfig | SftConfig
"""What a run directory's config.yaml may hold."""
