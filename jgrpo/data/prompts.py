"""Prompts: rows of a data set, tokenized for the model, the other columns kept for the reward functions.

How a prompt reaches the model:
- a list of chat messages goes through the tokenizer's chat template, with the generation prompt (or, where the last
  message is the assistant's, as the start of its answer);
- a string is taken as it is. With `system_prompt` it becomes a user message behind the system message;
- a built-in task asks in one user message, or in plain text if the tokenizer has no chat template.

A prompt of more than `max_prompt_length` tokens is dropped, or keeps its last tokens ("truncate"); both are counted.
The data layer deals in numpy and Python objects; the loop makes arrays of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jgrpo.config import DataConfig
from jgrpo.data.source import Split, read_rows
from jgrpo.data.tasks import Row, find_task
from jgrpo.errors import UserError


@dataclass(frozen=True)
class Example:
    """One prompt."""

    prompt: str | list[dict[str, Any]]
    """As the reward functions get it: text, or chat messages."""
    token_ids: list[int]
    """As the model gets it."""
    columns: dict[str, Any]
    """The row's other columns."""


@dataclass(frozen=True)
class PromptDataset:
    """Prompts that fit, in the order of the data set."""

    examples: tuple[Example, ...]
    dropped: int = 0
    """Rows left out because their prompt was too long."""
    truncated: int = 0
    """Prompts that lost their first tokens."""

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int) -> Example:
        """The example with this number."""
        return self.examples[index]


def load_prompts(config: DataConfig, tokenizer: Any, split: Split = "train", seed: int = 0) -> PromptDataset:
    """The training prompts, or with split "test" the held-out ones; `tokenizer` is a Hugging Face tokenizer.

    Raises `UserError` for everything about the data that a person has to correct.
    """
    dataset = _dataset_name(config, split)
    task, source = find_task(dataset)
    if task is not None:
        prompts, columns = _split_rows(as_user_messages(task.rows(split, seed, source), tokenizer), "prompt")
    else:
        hub_split = config.dataset_split if split == "train" else "test"
        rows = read_rows(dataset, hub_split, needed=(config.prompt_column,))
        prompts, columns = _split_rows(rows, config.prompt_column)
    prompts = [checked_prompt(prompt, number, config.prompt_column) for number, prompt in enumerate(prompts)]
    prompts = [with_system_prompt(prompt, config.system_prompt) for prompt in prompts]
    token_ids = encode_prompts(prompts, tokenizer)
    examples = [Example(*parts) for parts in zip(prompts, token_ids, columns, strict=True)]
    return _fit(examples, config)


def has_held_out(config: DataConfig) -> bool:
    """Whether `load_prompts(…, "test")` has something to load."""
    if config.eval_dataset is not None:
        return True
    task, source = find_task(config.dataset)
    return task is not None and (source is None or task.always_held_out)


def check_context(max_prompt_length: int, max_completion_length: int, context: int) -> None:
    """Raise `UserError` if prompt and completion together exceed the model's positions."""
    if (total := max_prompt_length + max_completion_length) > context:
        raise UserError(
            f"max_prompt_length {max_prompt_length} + max_completion_length {max_completion_length} = {total} exceeds the "
            f"model's context of {context} positions; lower them by {total - context} in total"
        )


def pad_prompts(examples: Sequence[Example], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[Q, P] with P = `width`, right-padded, and lengths int32[Q]."""
    tokens = np.full((len(examples), width), pad_id, np.int32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.token_ids)] = example.token_ids
    return tokens, np.array([len(example.token_ids) for example in examples], np.int32)


def repeat_columns(examples: Sequence[Example], num_generations: int) -> dict[str, list[Any]]:
    """Columns for Q · G completions, the G of one prompt next to each other; a column absent in a row is None there."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return {name: [example.columns.get(name) for example in examples for _ in range(num_generations)] for name in names}


def _dataset_name(config: DataConfig, split: Split) -> str:
    if split == "train":
        return config.dataset
    if not has_held_out(config):
        raise UserError(
            f"dataset {config.dataset!r} has no held-out prompts of its own; set eval_dataset, or eval_every to 0"
        )
    return config.eval_dataset or config.dataset


def as_user_messages(rows: list[Row], tokenizer: Any) -> list[Row]:
    """A built-in task's rows with the prompt as a user message, if the tokenizer has a chat template."""
    if not tokenizer.chat_template:
        return rows
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


def _split_rows(rows: list[Row], prompt_column: str) -> tuple[list[Any], list[dict[str, Any]]]:
    columns = [{name: value for name, value in row.items() if name != prompt_column} for row in rows]
    return [row[prompt_column] for row in rows], columns


def checked_prompt(prompt: Any, number: int, column: str) -> str | list[dict[str, Any]]:
    """A row's prompt, without absent keys of messages. Raises `UserError` if it is neither text nor messages."""
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        # Arrow gives every message the union of all keys: the absent ones come back as None.
        return [{key: value for key, value in message.items() if value is not None} for message in prompt]
    raise UserError(
        f"row {number}: column {column!r} is {str(prompt)[:60]!r}; expected a non-empty string or a list of messages "
        '{"role": …, "content": …}'
    )


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("role"), str) and "content" in entry


def with_system_prompt(prompt: str | list[dict[str, Any]], system: str | None) -> str | list[dict[str, Any]]:
    """The prompt behind a system message. Raises `UserError` if it has one of its own."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        raise UserError(
            "system_prompt is set, but the prompts have a system message of their own; leave one of them out"
        )
    return [{"role": "system", "content": system}, *messages]


def encode_prompts(prompts: Sequence[str | list[dict[str, Any]]], tokenizer: Any) -> list[list[int]]:
    """Token ids of strings, taken as they are, and of lists of chat messages, through the chat template.

    Raises `UserError` for messages without a chat template, or that the template refuses.
    """
    # One call for all strings: a fast tokenizer encodes a batch in parallel.
    chats = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    if chats and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which chat messages and system_prompt need; use an instruction-tuned "
            "checkpoint, or string prompts without system_prompt"
        )
    texts = [prompt if isinstance(prompt, str) else render(prompt, tokenizer) for prompt in prompts]
    # A template writes its own special tokens; plain text gets the tokenizer's.
    plain = tokenizer(texts, add_special_tokens=True)["input_ids"] if len(chats) < len(prompts) else [[]] * len(texts)
    chat = tokenizer(texts, add_special_tokens=False)["input_ids"] if chats else [[]] * len(texts)
    return [list(plain[i] if isinstance(prompt, str) else chat[i]) for i, prompt in enumerate(prompts)]


def render(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    """Chat messages as text, up to where the model goes on. Raises `UserError` if the template refuses them."""
    from jinja2 import TemplateError

    continues = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
        )
    except TemplateError as error:
        raise UserError(f"the chat template refuses the messages {str(messages)[:80]}: {error}") from error


def _fit(examples: list[Example], config: DataConfig) -> PromptDataset:
    limit = config.max_prompt_length
    lengths = [len(example.token_ids) for example in examples]
    if 0 in lengths:
        raise UserError(f"row {lengths.index(0)}: the prompt has no tokens; expected at least one")
    too_long = sum(length > limit for length in lengths)
    if config.overlong_prompts == "truncate":
        kept = [replace(example, token_ids=example.token_ids[-limit:]) for example in examples]
        return PromptDataset(tuple(kept), truncated=too_long)
    if too_long == len(examples):
        raise UserError(
            f"all {too_long} prompts are longer than max_prompt_length {limit} (the shortest has {min(lengths)} tokens); "
            "raise max_prompt_length, or set overlong_prompts to truncate"
        )
    kept = [example for example in examples if len(example.token_ids) <= limit]
    return PromptDataset(tuple(kept), dropped=too_long)
