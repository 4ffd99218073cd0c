"""Prompts with completions to imitate, tokenized exactly as the sampler meets them, and rows of them for the model.

The prompt is tokenized as in training by reinforcement (`jgrpo.data.prompts`), the completion on its own: the model
continues prompt tokens that end where they end in a rollout. A chat completion is what the chat template puts
behind the generation prompt. The end token belongs to the completion, and nothing behind it does (some templates write
a line break there, which no sampler would ever reach).

Built-in tasks: gsm8k imitates its worked answers, countdown the demo model's worked solutions by a writer who never
gives up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jgrpo.data.prompts import as_user_messages, checked_prompt, encode_prompts, render, with_system_prompt
from jgrpo.data.source import Split, read_rows
from jgrpo.data.tasks import Row, find_task
from jgrpo.errors import UserError
from jgrpo.sft_config import SftDataConfig


@dataclass(frozen=True)
class Pair:
    """One example."""

    prompt: list[int]
    completion: list[int]
    """Its last token is an end token."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class PairDataset:
    """Examples that fit into a row, in the order of the data set."""

    pairs: tuple[Pair, ...]
    dropped: int = 0
    """Rows left out because they were too long."""

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class PackedRows:
    """N rows of T positions on the host."""

    tokens: Int[np.ndarray, "N T"]
    segments: Int[np.ndarray, "N T"]
    """1, 2, … for the examples of a row; 0 behind them."""
    mask: Bool[np.ndarray, "N T"]
    """True on completion tokens."""
    lengths: Int[np.ndarray, " N"]


def load_pairs(
    config: SftDataConfig, tokenizer: Any, eos_ids: Sequence[int], split: Split = "train", seed: int = 0
) -> PairDataset:
    """The training examples, or with split "test" the held-out ones.

    Raises `UserError` for everything about the data that a person has to correct.
    """
    rows, prompt_column, completion_column = _rows(config, tokenizer, split, seed)
    prompts = [checked_prompt(row[prompt_column], number, prompt_column) for number, row in enumerate(rows)]
    prompts = [with_system_prompt(prompt, config.system_prompt) for prompt in prompts]
    completions = [_checked(row[completion_column], number, completion_column) for number, row in enumerate(rows)]
    prompt_ids = encode_prompts(prompts, tokenizer)
    texts = [_continuation(*pair, tokenizer) for pair in zip(prompts, completions, strict=True)]
    completion_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ended = [_ended(ids, eos_ids, tokenizer.eos_token_id) for ids in completion_ids]
    pairs = [Pair(*ids) for ids in zip(prompt_ids, ended, strict=True)]
    kept = tuple(pair for pair in pairs if len(pair) <= config.max_length and pair.prompt)
    if not kept:
        raise UserError(
            f"all {len(pairs)} examples are longer than max_length {config.max_length} (the shortest has "
            f"{min(map(len, pairs))} tokens); raise max_length"
        )
    return PairDataset(kept, dropped=len(pairs) - len(kept))


def has_held_out_pairs(config: SftDataConfig) -> bool:
    """Whether `load_pairs(…, "test")` has something to load."""
    task, source = find_task(config.dataset)
    return config.eval_dataset is not None or (task is not None and (source is None or task.always_held_out))


def rows_of_pairs(pairs: Sequence[Pair], groups: Sequence[Sequence[int]], width: int, pad_id: int) -> PackedRows:
    """Rows that hold the examples of `groups` (numbers into `pairs`) one behind the other, padded to T = `width`."""
    shape = (len(groups), width)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    mask, lengths = np.zeros(shape, bool), np.zeros(len(groups), np.int32)
    for row, group in enumerate(groups):
        for segment, number in enumerate(group, start=1):
            pair, start = pairs[number], lengths[row]
            end = start + len(pair)
            tokens[row, start:end] = pair.prompt + pair.completion
            segments[row, start:end] = segment
            mask[row, start + len(pair.prompt) : end] = True
            lengths[row] = end
    return PackedRows(tokens, segments, mask, lengths)


def _rows(config: SftDataConfig, tokenizer: Any, split: Split, seed: int) -> tuple[list[Row], str, str]:
    """Rows, and the columns of prompt and completion."""
    dataset = config.dataset if split == "train" else config.eval_dataset or config.dataset
    task, source = find_task(dataset)
    if task is None:
        columns = config.prompt_column, config.completion_column
        return read_rows(dataset, config.dataset_split if split == "train" else "test", needed=columns), *columns
    rows = task.rows(split, seed, source)
    if dataset == "countdown":
        rows = _with_worked_solutions(rows, seed)
    column = {"countdown": "completion", "gsm8k": "solution"}.get(dataset.partition(":")[0])
    if column is None:
        raise UserError(
            f"dataset {dataset!r} has no completions to imitate; use a file or hub id with prompt and completion"
        )
    return as_user_messages(rows, tokenizer), "prompt", column


def _with_worked_solutions(rows: list[Row], seed: int) -> list[Row]:
    from jgrpo.demo.worked_solutions import Writer, draw_tries, solution_text  # the demo stands above the data

    rng, writer = np.random.default_rng(seed), Writer(patient=1.0)
    solutions = [solution_text(draw_tries(tuple(r["nums"]), r["target"], writer, rng), r["target"]) for r in rows]
    return [{**row, "completion": solution} for row, solution in zip(rows, solutions, strict=True)]


def _checked(completion: Any, number: int, column: str) -> str:
    """The text of a completion: a string, or the content of a list of one assistant message."""
    if isinstance(completion, str) and completion:
        return completion
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        message = completion[0]
        if message.get("role") == "assistant" and isinstance(message.get("content"), str):
            return message["content"]
    raise UserError(
        f"row {number}: column {column!r} is {str(completion)[:60]!r}; expected a non-empty string or a list of one "
        'message {"role": "assistant", "content": …}'
    )


def _continuation(prompt: str | list[dict[str, Any]], completion: str, tokenizer: Any) -> str:
    """What stands behind the prompt's text."""
    if isinstance(prompt, str) or prompt[-1]["role"] == "assistant":
        return completion
    before, after = (
        render(prompt, tokenizer),
        tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": completion}], tokenize=False),
    )
    if not after.startswith(before):
        raise UserError(
            "the chat template writes an assistant's answer otherwise than its generation prompt announces it "
            f"({after[:80]!r}); give prompts and completions as plain strings in the template's own form"
        )
    return after[len(before) :]


def _ended(ids: Sequence[int], eos_ids: Sequence[int], eos_id: int) -> list[int]:
    """Tokens up to the last end token, which is put there if there is none."""
    ends = [index for index, token in enumerate(ids) if token in eos_ids]
    return list(ids[: ends[-1] + 1]) if ends else [*ids, eos_id]
