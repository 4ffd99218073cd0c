"""`python -m jgrpo.evaluate`: base model against adapter, or against the whole model that a run trained, on held-out prompts,
greedy and sampled, with intervals.

Definitions (correct, accuracy, pass@k, maj@k, intervals) are those of `jgrpo.training.evaluation`. Both policies see the same
prompts and the same random numbers, so their difference is taken prompt by prompt, and its interval is the paired one.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jgrpo.checkpoints.hf import load_model_config, load_tokenizer
from jgrpo.cli import load_config, parse_command, run_command
from jgrpo.config import DataConfig, LoraConfig, ModelSettings, QuantizationConfig, RewardConfig, RolloutConfig
from jgrpo.data import check_context, find_task, load_prompts
from jgrpo.errors import UserError
from jgrpo.export import load_adapter, load_run_adapter
from jgrpo.generate import SeedSettings
from jgrpo.rewards import resolve_rewards
from jgrpo.rollout import environment_factory
from jgrpo.training.evaluation import Interval, Scores, evaluate_policy, held_out_sampling, interval
from jgrpo.training.policy import load_policy
from jgrpo.training.task import prompt_width, with_tools
from jgrpo.validation import check_ranges


@dataclass(frozen=True)
class HeldOutSettings:
    """Which prompts."""

    eval_prompts: int = 128
    """Held-out prompts."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Base model against adapter. Sections are parts of `TrainConfig`'s, so that a run's settings apply."""

    run: str | None = None
    """Directory of a training run: its model, data, settings and newest adapter or weights."""
    adapter: str | None = None
    """Directory of a PEFT adapter for the model; without run and adapter, the base model alone is evaluated."""
    samples: int = 8
    """Completions of each prompt in the sampled evaluation, and the largest k of pass@k and maj@k; 0: greedy only."""
    batch_size: int = 128
    """Completions decoded at the same time."""
    output: str | None = None
    """File to write the numbers to as JSON."""
    model: ModelSettings = field(default_factory=ModelSettings)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: HeldOutSettings = field(default_factory=HeldOutSettings)
    training: SeedSettings = field(default_factory=SeedSettings)


@dataclass(frozen=True)
class Result:
    """Scores of one policy under one way of sampling."""

    policy: str
    sampling: str
    scores: Scores

    @property
    def ks(self) -> list[int]:
        """Powers of two up to the number of samples, and that number."""
        samples = self.scores.correct.shape[1]
        return sorted({k for k in (2**n for n in range(1, 12)) if k <= samples} | {samples} - {1})

    def numbers(self) -> dict[str, Interval]:
        """Everything that has an interval."""
        passes = {f"pass@{k}": self.scores.pass_at(k) for k in self.ks}
        votes = {f"maj@{k}": self.scores.majority_at(k) for k in self.ks if k > 2}
        return {"accuracy": self.scores.accuracy(), "reward": self.scores.reward(), **passes, **votes}


def evaluate(settings: EvaluateConfig) -> list[Result]:
    """Score the base model and, if there is one, the adapter: greedily, then with `samples` completions a prompt.

    Raises:
        UserError: bad input.
    """
    _check(settings)
    model_config = load_model_config(settings.model.model, settings.model.revision)
    tokenizer = load_tokenizer(settings.model.model, settings.model.revision)
    limits = settings.data.max_prompt_length, settings.rollout.max_completion_length
    check_context(*limits, model_config.max_position_embeddings)
    task, _ = find_task(settings.data.dataset)
    rewards = resolve_rewards(settings.reward, task.reward_functions if task else ())
    data = with_tools(settings.data, settings.rollout)
    dataset = load_prompts(data, tokenizer, "test", settings.training.seed)
    adapters, lora_config = _adapters(settings, model_config)
    policy = load_policy(settings.model, settings.quantization, lora_config, tokenizer, sum(limits))
    environment = environment_factory(settings.rollout, tokenizer, policy.eos_ids)
    policy = dataclasses.replace(policy, environment=environment)
    examples = dataset.examples[: settings.evaluation.eval_prompts]
    results = []
    for way, sampling in _ways(settings).items():
        for name, lora in adapters.items():
            scores = evaluate_policy(
                policy,
                lora,
                examples,
                rewards,
                jax.random.key(settings.training.seed),
                sampling=sampling,
                reward_config=settings.reward,
                prompt_width=prompt_width(examples),
                batch_size=max(1, settings.batch_size // sampling.num_generations),
            )
            results.append(Result(name, way, scores))
    return results


def _check(settings: EvaluateConfig) -> None:
    if settings.run is not None and settings.adapter is not None:
        raise UserError("--run and --adapter name two adapters; give one of them")
    if settings.samples < 0 or settings.batch_size < 1:
        raise UserError(
            f"samples is {settings.samples}, batch_size {settings.batch_size}: expected at least 0 and at least 1"
        )
    names = ("max_completion_length", "temperature", "top_k", "top_p", "min_p", "prompts_at_once")
    check_ranges({**{name: getattr(settings.rollout, name) for name in names}, **vars(settings.evaluation)})


def _ways(settings: EvaluateConfig) -> dict[str, RolloutConfig]:
    ways = {"greedy": held_out_sampling(settings.rollout, 0.0)}
    if settings.samples:
        temperature = settings.rollout.temperature
        ways[f"temperature {temperature:g}"] = held_out_sampling(settings.rollout, temperature, settings.samples)
    return ways


def _adapters(settings: EvaluateConfig, model_config: Any) -> tuple[dict[str, Mapping[str, Any]], LoraConfig]:
    if settings.run is not None:
        lora, config = load_run_adapter(
            Path(settings.run), load_config(Path(settings.run, "config.yaml")), model_config
        )
        return {"base": {}, "trained" if config.is_full else "adapter": lora}, config
    if settings.adapter is not None:
        lora, config = load_adapter(settings.adapter, model_config)
        return {"base": {}, "adapter": lora}, config
    return {"base": {}}, LoraConfig()


def differences(results: Sequence[Result]) -> dict[str, Interval]:
    """Accuracy of the policy that was trained minus that of the base, paired by prompt, for each way of sampling."""
    by_way: dict[str, dict[str, Scores]] = {}
    for result in results:
        by_way.setdefault(result.sampling, {})[result.policy] = result.scores
    return {
        way: interval(other.correct.mean(axis=1) - scores["base"].correct.mean(axis=1))
        for way, scores in by_way.items()
        for name, other in scores.items()
        if name != "base"
    }


def table(results: Sequence[Result]) -> Table:
    """One column a policy and way of sampling, one row a number: that fits a terminal of 80 columns."""
    prompts = results[0].scores.correct.shape[0]
    shown = Table(title=f"{prompts} held-out prompts, ± 95 % confidence", title_justify="left")
    shown.add_column("")
    for result in results:
        shown.add_column(f"{result.policy}\n{result.sampling}", justify="right")
    for name in dict.fromkeys(name for result in results for name in result.numbers()):
        shown.add_row(name, *(str(result.numbers().get(name, "")) for result in results))
    shown.add_row("mean length", *(f"{result.scores.lengths.mean():.0f}" for result in results))
    shown.add_row("cut off", *(f"{1 - result.scores.terminated.mean():.0%}" for result in results))
    return shown


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The same numbers for a program."""
    return {
        "prompts": results[0].scores.correct.shape[0],
        "results": [
            {
                "policy": result.policy,
                "sampling": result.sampling,
                "completions_per_prompt": result.scores.correct.shape[1],
                "mean_length": float(result.scores.lengths.mean()),
                "clipped_ratio": float(1 - result.scores.terminated.mean()),
                **{name: {"mean": v.mean, "ci95": v.half_width} for name, v in result.numbers().items()},
            }
            for result in results
        ],
        "accuracy_gain": {way: {"mean": v.mean, "ci95": v.half_width} for way, v in differences(results).items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    settings = parse_command(
        EvaluateConfig,
        argv,
        prog="python -m jgrpo.evaluate",
        description="Evaluate the base model and an adapter on held-out prompts.",
    )
    results = evaluate(settings)
    console = Console()
    console.print(table(results))
    for way, gain in differences(results).items():
        console.print(f"{results[-1].policy} - base, {way}: accuracy {gain} (paired by prompt)")
    for problem in dict.fromkeys(problem for result in results for problem in result.scores.problems):
        console.print(f"warning: {problem}", markup=False)
    if settings.output is not None:
        try:
            Path(settings.output).write_text(json.dumps(as_json(results), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output {settings.output} cannot be written: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    run_command(main)
