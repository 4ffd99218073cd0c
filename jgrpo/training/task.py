"""What a run trains on: prompts, held-out prompts and the functions that judge completions."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jgrpo.config import DataConfig, RolloutConfig, TrainConfig
from jgrpo.data import Example, PromptDataset, check_context, find_task, has_held_out, load_prompts
from jgrpo.errors import UserError
from jgrpo.rewards import NamedReward, named_rewards, resolve_rewards
from jgrpo.rollout import describe_tools, load_tools

PROMPT_MULTIPLE = 16
RewardFunctions = Sequence[Callable[..., Any]]


@dataclass(frozen=True)
class Task:
    """Prompts and their judges."""

    prompts: PromptDataset
    held_out: tuple[Example, ...] | None
    """None: the run does not evaluate."""
    rewards: tuple[NamedReward, ...]

    @property
    def reward_names(self) -> tuple[str, ...]:
        """In the order of the rewards."""
        return tuple(reward.name for reward in self.rewards)

    @property
    def prompt_width(self) -> int:
        """Prompt tokens P that a batch is padded to: what the longest prompt of the run needs, known beforehand."""
        return prompt_width([*self.prompts.examples, *(self.held_out or ())])

    def describe(self) -> list[str]:
        """What the user is told before the run."""
        left_out = [
            f"{count} {what}"
            for what, count in (("too long, dropped", self.prompts.dropped), ("truncated", self.prompts.truncated))
            if count
        ]
        prompts = f"{len(self.prompts)} prompts" + (f" ({', '.join(left_out)})" if left_out else "")
        held_out = f"{len(self.held_out)} held out" if self.held_out else "no evaluation"
        return [
            f"data: {prompts}, padded to {self.prompt_width} tokens; {held_out}",
            f"rewards: {', '.join(self.reward_names)}",
        ]


def prompt_width(examples: Iterable[Example]) -> int:
    """The longest prompt, rounded up to a multiple of 16 for the kernels' sake.

    `max_prompt_length` is a bound; padding to it would compute positions that no prompt of the run has.
    """
    longest = max(len(example.token_ids) for example in examples)
    return -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE


def load_task(config: TrainConfig, tokenizer: Any, context: int, reward_functions: RewardFunctions = ()) -> Task:
    """Read the prompts and resolve the rewards; `context` is the model's number of positions.

    Raises:
        UserError: bad data, unknown rewards, or prompts and completions that exceed the model's context.
    """
    check_context(config.data.max_prompt_length, config.rollout.max_completion_length, context)
    config = dataclasses.replace(config, data=with_tools(config.data, config.rollout))
    rewards = load_rewards(config, reward_functions)
    prompts = load_prompts(config.data, tokenizer, "train", config.training.seed)
    return Task(prompts, load_held_out(config, tokenizer), tuple(rewards))


def with_tools(data: DataConfig, rollout: RolloutConfig) -> DataConfig:
    """The data's settings with a description of the tools, if there are any, at the end of the system message.

    Raises:
        UserError: a tool cannot be imported or lacks a description.
    """
    if not rollout.tools:
        return data
    parts = [data.system_prompt] if data.system_prompt else []
    return dataclasses.replace(data, system_prompt="\n\n".join([*parts, describe_tools(load_tools(rollout))]))


def load_held_out(config: TrainConfig, tokenizer: Any) -> tuple[Example, ...] | None:
    """The first `eval_prompts` held-out prompts; None if evaluation is off or the data has none of its own.

    Raises:
        UserError: `eval_dataset` is named but cannot be read.
    """
    if config.evaluation.eval_every == 0 or not has_held_out(config.data):
        return None
    dataset = load_prompts(config.data, tokenizer, "test", config.training.seed)
    return dataset.examples[: config.evaluation.eval_prompts]


def load_rewards(config: TrainConfig, reward_functions: RewardFunctions = ()) -> list[NamedReward]:
    """The given functions, else the configured ones, else the built-in task's own.

    Raises:
        UserError: a name is unknown, or as many weights as functions are expected.
    """
    if reward_functions:
        weights = config.reward.reward_weights
        if weights and len(weights) != len(reward_functions):
            raise UserError(f"{len(weights)} reward_weights for {len(reward_functions)} functions: give one for each")
        return named_rewards(list(reward_functions), weights)
    task, _ = find_task(config.data.dataset)
    return resolve_rewards(config.reward, task.reward_functions if task else ())
