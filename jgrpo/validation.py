"""What no single type can check: ranges, settings that must divide each other, and what a resumed run may change.

The rules of the objective (clip bounds, estimators, corrections) stand with it: `algorithms.registry.check_objective`.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from re import sub
from typing import Any, NamedTuple, TypeVar

from jgrpo.config import LINEAR_MODULES, TrainConfig
from jgrpo.errors import UserError
from jgrpo.settings import flag, flatten, nearest
from jgrpo.sft_config import AnyConfig, SftConfig

C = TypeVar("C", TrainConfig, SftConfig)


def validate(config: TrainConfig) -> None:
    """Raise UserError for the first setting that cannot work, with the value and what to set instead."""
    from jgrpo.algorithms.registry import check_objective  # here: it imports jax, which --help need not wait for

    check_ranges(flatten(config))
    check_objective(config.algorithm)
    check_batch(config)
    check_modules(config)
    check_rewards(config)
    check_full(config)
    if config.algorithm.algorithm == "ppo" and config.lora.is_full:
        raise UserError(
            "--algorithm ppo with --lora null: its critic is an adapter on the frozen base. Take grpo, rloo or online_dpo, or train an adapter."
        )
    if config.algorithm.reference_adapter is not None and config.lora.is_full:
        raise UserError(
            "--reference-adapter with --lora null: the reference of a whole model is a copy of it, its start or (--reference-sync-steps) "
            "an earlier state. Leave --reference-adapter out."
        )
    if config.training.offload and not config.training.remat:
        raise UserError("--offload moves what --remat keeps, and remat is false: set --remat, or leave --offload out.")
    if config.rollout.tools and config.rollout.environment is not None:
        raise UserError(
            f"--tools and --environment are both given: the environment {config.rollout.environment!r} answers every turn, "
            "so let it call the tools, or leave one out."
        )


def validate_supervised(config: SftConfig) -> None:
    """The same for a supervised run."""
    check_ranges(flatten(config))
    check_modules(config)
    check_full(config)
    rows, size = config.training.rows_per_step, config.training.microbatch_rows
    if rows % size:
        raise UserError(
            f"--microbatch-rows {size} does not divide --rows-per-step {rows}: "
            f"set --microbatch-rows to {_either(nearest_divisors(rows, size))}."
        )


def check_ranges(values: dict[str, Any]) -> None:
    """Ranges of the numbers in a flat table of settings; names that the table lacks are skipped, nulls too."""
    present = {name: value for name, value in values.items() if value is not None}
    for name, value in present.items():
        if isinstance(value, float) and not isfinite(value):
            raise UserError(f"{flag(name)} is {value}: expected a finite number.")
    for rule in RANGES:
        for name in rule.names.split():
            if name in present and not rule.holds(present[name]):
                raise UserError(f"{flag(name)} is {present[name]}: expected {rule.expected}.")


class Range(NamedTuple):
    """What some numbers must satisfy."""

    expected: str
    holds: Callable[[float], bool]
    names: str


RANGES = (
    Range(
        "above 0",
        lambda v: v > 0,
        "lora_rank lora_alpha max_prompt_length max_completion_length temperature reward_timeout "
        "num_iterations num_minibatches steps prompts_per_step microbatch_size logprob_workspace max_nonfinite_steps "
        "max_grad_norm keep_last eval_prompts eval_generations max_length rows_per_step microbatch_rows max_turns round_length "
        "prompts_at_once length_buckets",
    ),
    Range(
        "0 or above",
        lambda v: v >= 0,
        "top_k learning_rate warmup_steps weight_decay seed save_every eval_every eval_temperature "
        "log_completions_every",
    ),
    Range("at least 0 and below 1", lambda v: 0 <= v < 1, "lora_dropout min_p adam_b1 adam_b2"),
    Range("above 0 and at most 1", lambda v: 0 < v <= 1, "top_p"),
    Range("at least 2: a group's advantages compare its completions", lambda v: v >= 2, "num_generations"),
    Range("below 2**32", lambda v: v < 2**32, "seed"),
)


def nearest_divisors(total: int, value: int) -> list[int]:
    """Divisors of `total` next to `value`: the largest below and the smallest above, where they exist."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    return below[-1:] + above[:1]


def check_batch(config: TrainConfig) -> None:
    """prompts_per_step = num_minibatches · n, and n · num_generations = microbatch_size · m."""
    prompts, minibatches = config.training.prompts_per_step, config.algorithm.num_minibatches
    if prompts % minibatches:
        multiples = [m for m in (prompts // minibatches * minibatches, -(-prompts // minibatches) * minibatches) if m]
        raise UserError(
            f"--prompts-per-step {prompts} does not divide into --num-minibatches {minibatches}: "
            f"set --prompts-per-step to {_either(multiples)}, "
            f"or --num-minibatches to {_either(nearest_divisors(prompts, minibatches))}."
        )
    completions = prompts // minibatches * config.rollout.num_generations
    microbatch = config.training.microbatch_size
    if completions % microbatch:
        raise UserError(
            f"--microbatch-size {microbatch} does not divide the {completions} completions of an optimizer step "
            f"({prompts // minibatches} prompts x {config.rollout.num_generations} generations): "
            f"set --microbatch-size to {_either(nearest_divisors(completions, microbatch))}."
        )


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))


def check_modules(config: AnyConfig) -> None:
    """The adapter's modules are linear layers of the model, and there is at least one."""
    if not config.lora.target_modules:
        raise UserError(f"--target-modules is empty: name at least one of {', '.join(LINEAR_MODULES)}.")
    known = {"target_modules": LINEAR_MODULES, "skip_modules": (*LINEAR_MODULES, "lm_head", "embed_tokens")}
    for name, modules in known.items():
        for module in flatten(config)[name]:
            if module not in modules:
                raise UserError(
                    f"{flag(name)}: unknown module {module!r}.{nearest(module, modules)} "
                    f"Expected some of {', '.join(modules)}."
                )


def check_full(config: AnyConfig) -> None:
    """Full fine-tuning has weights that can be trained, and nothing that belongs to an adapter."""
    if not config.lora.is_full:
        return
    if (quantization := config.quantization.quantization) != "none":
        raise UserError(
            f"--lora null trains the model's own weights, which --quantization {quantization} would freeze: "
            "add --quantization none, or leave --lora out to train an adapter."
        )
    if config.lora.adapter is not None:
        raise UserError(
            f"--adapter {config.lora.adapter} with --lora null: there is no adapter to start from it. Merge it first "
            "(python -m jgrpo.export --format merged) and give the merged model, or leave --lora out."
        )
    if config.lora.lora_dropout > 0:
        raise UserError(
            f"--lora-dropout {config.lora.lora_dropout} with --lora null: it is the adapter's. Leave it out."
        )


def check_rewards(config: TrainConfig) -> None:
    """As many weights as functions, where both are given."""
    functions, weights = config.reward.reward_functions, config.reward.reward_weights
    if functions and weights and len(functions) != len(weights):
        raise UserError(
            f"--reward-weights has {len(weights)} values for {len(functions)} reward functions "
            f"({', '.join(functions)}): give one for each, or none."
        )


# A resumed run repeats an uninterrupted one bit for bit, so whatever enters the maths of a step stays.
# These don't: where and how often things are written and measured, and how the same gradient is computed
# in memory (equal up to rounding: the way out of a run that was stopped for lack of memory).
RESUME_MAY_CHANGE = frozenset(
    {"output_dir", "resume", "save_every", "keep_last"}
    | {"eval_every", "eval_prompts", "eval_temperature", "eval_generations", "eval_dataset"}
    | {"log_completions_every", "tensorboard", "wandb", "wandb_project", "reward_timeout"}
    | {"reward_errors", "max_nonfinite_steps", "microbatch_size", "microbatch_rows", "remat", "offload", "share_prompt"}
    | {"logprob_workspace", "memory", "prompts_at_once", "length_buckets"}
)


def diff_configs(saved: C, new: C) -> list[str]:
    """Settings in which `new` differs from `saved` and that a resumed run may not change, in order.

    `steps` may change (train longer) unless the learning-rate schedule depends on it.
    """
    before, after = flatten(saved), flatten(new)
    free = RESUME_MAY_CHANGE | ({"steps"} if saved.optimizer.lr_schedule == "constant" else set())
    return [name for name in before if before[name] != after[name] and name not in free]


def check_resume(saved: C, new: C) -> None:
    """Raise UserError naming each setting that a resumed run may not change, with both values."""
    before, after = flatten(saved), flatten(new)
    changed = [f"{flag(name)} was {before[name]}, is {after[name]}" for name in diff_configs(saved, new)]
    if changed:
        raise UserError(
            f"cannot resume with other settings: {'; '.join(changed)}. "
            "Use the saved values, or start a new run in another --output-dir."
        )


def with_output_dir(config: C, now: datetime | None = None) -> C:
    """The configuration with `{name}` and `{time}` of output_dir filled in."""
    name = sub(r"[^A-Za-z0-9._-]+", "-", Path(config.data.dataset).stem).strip("-.") or "run"
    path = config.run.output_dir.replace("{name}", name)
    path = path.replace("{time}", (now or datetime.now()).strftime("%Y%m%d-%H%M%S"))
    return replace(config, run=replace(config.run, output_dir=path))
