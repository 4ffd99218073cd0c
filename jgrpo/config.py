"""Every setting of a run: frozen dataclasses, one for each stage of the data flow. Supervised runs: `jgrpo.sft_config`.

The command line and the YAML file are both generated from these classes (`jgrpo.settings`,
`jgrpo.cli`), so a field, its default and its docstring exist once. Field names are those of the
ecosystem (TRL, PEFT, verl) where one exists; every field name is unique across the sections, which
is what lets a flag be written without its section (`--learning-rate`, not `--optimizer.learning-rate`).

The defaults suit LoRA on a real checkpoint of 0.5B to 8B (learning rate ten times that of full
fine-tuning, under 32 prompts a step: "LoRA Without Regret", Thinking Machines 2025). The demo model
is five orders of magnitude smaller and brings its own numbers, `presets/demo.yaml`.
"""

from dataclasses import dataclass, field
from typing import Literal

MEMORY_DIAL = {
    "fast": dict(microbatch_size=16, remat=False, offload=False, logprob_workspace=1024.0, rollout_weights="auto"),
    "balanced": dict(microbatch_size=8, remat=True, offload=False, logprob_workspace=256.0),
    "smallest": dict(microbatch_size=1, remat=True, offload=True, logprob_workspace=64.0),
}
"""What `memory` stands for; "balanced" is the defaults."""
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    model: str = "demo"
    """Local directory or hub id of a Hugging Face checkpoint; "demo" is the model shipped with jgrpo."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto: bfloat16 on a GPU or TPU, float32 on a CPU."""


@dataclass(frozen=True)
class QuantizationConfig:
    """How the frozen base weights are stored."""

    quantization: Literal["int4", "dynamic", "none"] = "int4"
    """int4: symmetric, group-wise along the input axis; dynamic: int4, except for the matrices that lose most by it, which
    get 8 or 16 bits within dynamic_budget; none: the compute dtype. A checkpoint that is already quantized keeps its
    own form with int4 and dynamic."""
    group_size: Literal[32, 64, 128] = 64
    """Input elements that share one scale."""
    skip_modules: tuple[str, ...] = ("lm_head", "embed_tokens")
    """Modules that stay unquantized (Hugging Face leaf names). q, k and v are stored as one matrix, and
    so are gate and up: naming one keeps its partners unquantized too."""
    dynamic_budget: float = 0.1
    """Memory that dynamic may add, as a part of what int4 takes for the whole model."""
    wide_matrices: tuple[str, ...] = ()
    """dynamic's choice, in the form "LAYER.MATRIX=int8" or "LAYER.MATRIX=dense" (3.down=int8). A run fills it in and saves it,
    so that whatever loads the base later finds the same one; empty: choose."""


@dataclass(frozen=True)
class LoraConfig:
    """The trained adapter (Hu et al. 2021, arXiv:2106.09685; conventions of PEFT)."""

    lora: Literal["adapter"] | None = "adapter"
    """What is trained: an adapter, or (null) the model's own weights, all of them: full fine-tuning, which needs quantization
    none; the learning rate's default is then a tenth."""
    lora_rank: int = 32
    """Rank R."""
    lora_alpha: float = 64.0
    """Scale numerator: the update is alpha / R · B A x."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(R) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in the training forward only."""
    target_modules: tuple[str, ...] = LINEAR_MODULES
    """Linear layers that get an adapter."""
    adapter: str | None = None
    """Directory of an adapter in PEFT's format to start from; its rank, alpha, rsLoRA and modules replace those here."""

    @property
    def is_full(self) -> bool:
        """Full fine-tuning: there is no adapter."""
        return self.lora is None

    @property
    def scale(self) -> float:
        """Factor in front of B A x."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.use_rslora else self.lora_rank)


@dataclass(frozen=True)
class DataConfig:
    """Prompts."""

    dataset: str = "countdown"
    """Built-in task name, hub id, or path of a .jsonl, .json, .parquet or .csv file."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    eval_dataset: str | None = None
    """Held-out prompts, same forms as dataset; null: the built-in task's own held-out split, if there is one."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    system_prompt: str | None = None
    """System message put before every prompt (needs a chat template)."""
    max_prompt_length: int = 512
    """Prompt tokens P; static shape of the prefill."""
    overlong_prompts: Literal["drop", "truncate"] = "drop"
    """What happens to a prompt above max_prompt_length; truncate keeps the last tokens."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of completions."""

    num_generations: int = 8
    """Completions G of each prompt (at least 2)."""
    max_completion_length: int = 512
    """New tokens C at most; static shape of the decode loop."""
    temperature: float = 1.0
    """Divides the logits, in the sampler and in the trainer's log-probabilities alike."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability (nucleus); 1: all."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the most likely token's probability; 0: all."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion besides the model's own EOS ids."""
    tools: tuple[str, ...] = ()
    """Dotted paths of Python functions that the model may call; their descriptions go into the system message."""
    environment: str | None = None
    """Dotted path of a function or class that makes an environment, which answers the model's turns; null: none."""
    max_turns: int = 8
    """Turns of the model in one completion, where there are tools or an environment."""
    round_length: int | None = None
    """Tokens after which rows whose turn has ended get their reply and the others are interrupted, where there are tools or
    an environment: a little above the usual turn; null: when every row's turn has ended."""
    rollout_weights: Literal["int4", "int8", "bf16", "auto"] = "int4"
    """What decodes: the base as stored plus the adapter (int4), or a copy with the adapter merged in, made for each rollout: in
    the compute dtype (bf16), faster with many rows, or in 8 bits (int8), half its memory and on a Hopper GPU faster with few
    rows, a little further from the trainer's log-probabilities. Where nothing is truncated it has the head in 8 bits beside the
    stored one, which corrects the draw. auto: by rows, size and memory."""
    compaction: bool = True
    """Go on with fewer rows once most completions have ended, so that a long tail doesn't cost what the whole batch costs."""
    decode_layers: Literal["auto", "loop", "unrolled"] = "auto"
    """Layers of a decode step as a loop (compiles fastest) or written out (fewer copies of indices); auto: unrolled on a GPU."""
    kv_cache: Literal["auto", "int8", "fp8"] = "auto"
    """Keys and values in the compute dtype (auto), or in 8 bits with a scale for each slot and head: half the memory and
    traffic of bfloat16, for a small gap between the sampler's and the trainer's log-probabilities."""
    prompts_at_once: int | None = None
    """Prompts that are sampled at the same time, G completions each: what the KV cache has room for; null: all."""


@dataclass(frozen=True)
class RewardConfig:
    """Reward functions."""

    reward_functions: tuple[str, ...] = ()
    """Registry names or dotted paths (package.module.function); "task": the built-in task's own, also if empty."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each function; empty: 1 each."""
    reward_timeout: float = 30.0
    """Seconds that one call of a reward function may take."""
    reward_errors: Literal["abort", "ignore"] = "abort"
    """A function that raises, hangs or returns the wrong length: stop the run, or count its rewards as None."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """What a batch of completions is trained with (docs/algorithms.md)."""

    algorithm: Literal["grpo", "rloo", "online_dpo", "ppo"] = "grpo"
    """grpo: policy gradient with the estimator and loss below; rloo: the same with its own baseline and the KL in the reward;
    online_dpo: preference of each group's best completion over its worst; ppo: advantages from a value head on the base."""
    beta: float = 0.0
    """Weight of the KL term against the reference policy; 0: no reference forward at all."""
    kl_in_reward: bool = False
    """Take beta times the completion's KL off its reward, instead of adding a KL term to the loss; always in rloo and ppo."""
    kl_target: float | None = None
    """Mean KL of a token that beta is adapted to; null: beta stays."""
    kl_horizon: int = 10000
    """Completions after which an adapted beta has followed its error once."""
    reference_adapter: str | None = None
    """PEFT directory of the reference policy's adapter; null: the base model, adapter off."""
    reference_sync_steps: int = 0
    """Steps after which the trained adapter is copied into the reference; 0: never."""
    epsilon: float = 0.2
    """Lower clip bound of the ratio: 1 - epsilon. gmpo: bound of the log-ratio instead (0.4 in its paper)."""
    epsilon_high: float | None = None
    """Upper clip bound: 1 + epsilon_high; null: epsilon."""
    delta: float | None = None
    """Cap of the ratio where the advantage is negative, above 1 + epsilon_high (two-sided clip); null: no cap."""
    advantage_estimator: Literal[
        "grpo", "gdpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "opo", "pass_at_k"
    ] = "grpo"
    """How the rewards of a group become advantages; scale_rewards belongs to grpo."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What divides the centred reward: the group's std, the batch's, or nothing."""
    loss_type: Literal["clipped", "cispo", "sapo", "vespo", "gmpo"] = "clipped"
    """Loss of one token; how tokens are averaged is aggregation's choice, not this one's."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    """Ratio of each token, of the whole completion (GSPO), or the completion's with token gradients (GSPO-token)."""
    aggregation: Literal["grpo", "bnpo", "dr_grpo", "dapo", "prompt", "luspo"] = "dapo"
    """How token losses become one number."""
    cispo_cap: float = 5.0
    """Upper bound of the ratio in cispo: of the ratio itself, not of its distance from 1."""
    sapo_temperature_pos: float = 1.0
    """Steepness of sapo's gate where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Steepness of sapo's gate elsewhere."""
    vespo_k_pos: float = 2.0
    """Power of the ratio in vespo's weight for advantages >= 0."""
    vespo_lambda_pos: float = 3.0
    """Decay of vespo's weight with the ratio for advantages >= 0."""
    vespo_k_neg: float = 3.0
    """Power of the ratio in vespo's weight for negative advantages."""
    vespo_lambda_neg: float = 2.0
    """Decay of vespo's weight with the ratio for negative advantages."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term; k1 needs use_bias_correction_kl."""
    use_bias_correction_kl: bool = False
    """Multiply the KL term by the ratio."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    entropy_target: float | None = None
    """Mean entropy of a token below which the bonus acts and grows from step to step; null: entropy_coef stays."""
    entropy_coef_step: float = 0.005
    """Growth of an adapted entropy_coef."""
    entropy_coef_max: float = 0.05
    """Upper bound of an adapted entropy_coef."""
    top_entropy_quantile: float = 1.0
    """Fraction of the batch's tokens, those of highest entropy, that the policy's loss is taken over; 1: all."""
    sampler_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Importance weights between the trainer's and the sampler's log-probabilities: truncated (TIS) or masked (MIS)."""
    sampler_correction_min: float = 0.5
    """Weights below this are set to 0 by the mask corrections."""
    sampler_correction_max: float = 2.0
    """Upper bound of the sampler correction."""
    off_policy_mask_threshold: float | None = None
    """Leave out completions with a negative advantage that drifted further than this in mean log-probability; null: off."""
    filter_zero_variance: bool = False
    """Leave groups with equal rewards out of the loss and of its averages."""
    max_generation_batches: int = 1
    """Rollouts of one step at most: groups with equal rewards make way for those of further rollouts (DAPO); 1: one rollout."""
    overlong_buffer: int = 0
    """Tokens before max_completion_length over which the reward falls by 1 (DAPO's soft overlong penalty); 0: it does not."""
    preference_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """online_dpo's loss of a pair."""
    preference_beta: float = 0.1
    """online_dpo's weight of the reference: the margin's factor (sigmoid), or half the inverse of its goal (ipo)."""
    gae_gamma: float = 1.0
    """ppo: discount of rewards."""
    gae_lambda: float = 0.95
    """ppo: decay of the advantage estimator, from one step (0) to whole completions (1)."""
    value_coef: float = 0.1
    """ppo: weight of the value loss."""
    value_clip: float = 0.2
    """ppo: change of a value within one batch that its loss still rewards."""
    num_iterations: int = 1
    """Passes over one rollout batch (mu of the GRPO paper)."""
    num_minibatches: int = 1
    """Optimizer steps in one pass; each sees prompts_per_step / num_minibatches prompts."""
    mask_truncated_completions: bool = False
    """Leave completions without EOS out of the loss (their rewards stay in the baseline)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_b1: float = 0.9
    """Decay of the first moment."""
    adam_b2: float = 0.99
    """Decay of the second moment."""
    max_grad_norm: float = 1.0
    """Clip bound of the global gradient norm."""
    optimizer_bits: Literal[32, 8] = 32
    """Bits of an element of either moment; 8: block-wise, 2 bytes a parameter instead of 8 (docs/memory.md)."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 200
    """Rollout batches to train on."""
    seed: int = 0
    """Seed of everything random."""
    prompts_per_step: int = 8
    """Prompts Q of one rollout batch; Q · num_generations completions."""
    microbatch_size: int = 8
    """Completions in one forward and backward; divides the completions of a minibatch."""
    memory: Literal["fast", "balanced", "smallest"] = "balanced"
    """One dial for microbatch_size, remat, offload, logprob_workspace and rollout_weights; those given as well win over it."""
    share_prompt: bool = True
    """Compute a prompt once for its completions in a microbatch, in training too."""
    length_buckets: int | None = None
    """Sizes K that a microbatch's completions are packed into in training, without their padding: k/K of the padded size, a branch
    of the compiled program each; 1: the padding is computed; null: 4, on a CPU 1 (compiling takes longer than it saves)."""
    remat: bool = True
    """Recompute each layer in the backward from its input; without it, the results of its matrix products are kept."""
    offload: bool = False
    """Keep the layers' inputs, which remat needs, in pinned host memory between forward and backward."""
    logprob_workspace: float = 256.0
    """MB that logits and their gradient may take in the training forward: it bounds how many positions have them at once."""
    max_nonfinite_steps: int = 5
    """Abort after this many updates in a row with a non-finite loss or gradient."""


@dataclass(frozen=True)
class RunConfig:
    """The run directory."""

    output_dir: str = "runs/{name}-{time}"
    """Where everything is written; {name} is the dataset's, {time} the start time."""
    resume: bool = False
    """Continue the run in output_dir from its last checkpoint."""
    save_every: int = 20
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy during the run."""

    eval_every: int = 20
    """Steps between evaluations, besides the first and the last; 0: never."""
    eval_prompts: int = 128
    """Held-out prompts."""
    eval_temperature: float = 0.0
    """Temperature of the evaluation's completions; 0: greedy."""
    eval_generations: int = 1
    """Completions k of each held-out prompt; from 2 on pass@k and maj@k are reported too (with a temperature above 0)."""


@dataclass(frozen=True)
class ReportingConfig:
    """What is shown and written about the run."""

    log_completions_every: int = 10
    """Steps between tables of sample completions; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (if installed)."""
    wandb_project: str = "jgrpo"
    """Its project name."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reporting: ReportingConfig = field(default_factory=ReportingConfig)

    @property
    def batch_in_words(self) -> str:
        """What one step trains on."""
        return f"{self.training.prompts_per_step} prompts x {self.rollout.num_generations} completions a step"
