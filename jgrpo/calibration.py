"""The text that a four-bit export is rounded against (`jgrpo.checkpoints.calibrated`), as rows of tokens.

What the exported model will read and write is what its errors have to be small on. So the rows are, in this order of choice: a file
that the user names; the completions that the run logged, the newest first; or completions that the model itself
draws for a few general prompts (data-free, as LLM-QAT: Liu et al. 2023, arXiv:2305.17888). Those prompts themselves are a
part of every choice, because a model that is rounded on one task alone loses what it does elsewhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jgrpo.checkpoints.dynamic import PROMPTS
from jgrpo.config import LoraConfig, RolloutConfig
from jgrpo.data import Example, encode_prompts, pad_prompts
from jgrpo.data.source import read_rows
from jgrpo.errors import UserError
from jgrpo.lora import Params
from jgrpo.models import ModelConfig, Transformer
from jgrpo.models.rope import for_positions
from jgrpo.reporting.files import completions_path, logged_steps, read_lines
from jgrpo.rollout import Prompts, generate

ROW_TOKENS = 512
"""A longer row is cut off."""
GENERAL_SHARE = 0.1
"""Part of the tokens that `PROMPTS` make up at least, repeated: on the demo's run less costs most of the adapter's effect on other text, and
more nothing (docs/models.md)."""
DRAWN_LENGTH, DRAWN = 128, 8
"""Tokens of a completion that the model draws, and completions of each prompt."""

Row = list[int]


def logged_rows(run: Path, tokenizer: Any) -> Iterator[Row]:
    """Prompts with their completions from a run's `completions/`, the newest step first."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for step in reversed(logged_steps(run)):
        for line in read_lines(completions_path(run, step)):
            # The logged prompt has its special tokens; of a completion only the end is missing.
            row = tokenizer.encode(line["prompt"] + line["completion"], add_special_tokens=False)
            yield row + ends if line.get("finish") == "stop" else row


def rows_of_file(source: str, tokenizer: Any) -> list[Row]:
    """Rows of a data set: column `prompt` (a string or chat messages) and, if there is one, `completion` (a string).

    Raises UserError for a source that cannot be read or has no column `prompt`, or messages without a chat template.
    """
    lines = read_rows(source, "train", ["prompt"])
    prompts = encode_prompts([line["prompt"] for line in lines], tokenizer)
    ends = [tokenizer.encode(line.get("completion") or "", add_special_tokens=False) for line in lines]
    return [prompt + end for prompt, end in zip(prompts, ends, strict=True)]


def drawn_rows(
    base: Params,
    lora: Params,
    lora_config: LoraConfig,
    model_config: ModelConfig,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
) -> list[Row]:
    """Completions that base + adapter draws for `PROMPTS`, as text and, with a chat template, as user messages."""
    chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS] if tokenizer.chat_template else []
    texts = [*PROMPTS, *chats]
    examples = [Example(text, ids, {}) for text, ids in zip(texts, encode_prompts(texts, tokenizer), strict=True)]
    width = max(len(example.token_ids) for example in examples)
    length = min(DRAWN_LENGTH, model_config.max_position_embeddings - width)
    if length < 1:
        return [example.token_ids for example in examples]
    tokens, lengths = pad_prompts(examples, width, tokenizer.pad_token_id)
    rollout = generate(
        Transformer(for_positions(model_config, width + length), lora_config),
        base,
        lora,
        Prompts(tokens=jax.numpy.asarray(tokens), lengths=jax.numpy.asarray(lengths)),
        jax.random.key(0),
        RolloutConfig(num_generations=DRAWN, max_completion_length=length),
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id,
    )
    drawn, sizes = np.asarray(rollout.completion_tokens), np.asarray(rollout.completion_lengths)
    return [
        example.token_ids + drawn[q, g, : sizes[q, g]].tolist()
        for g in range(DRAWN)
        for q, example in enumerate(examples)
    ]


def mixed(rows: Iterable[Row], tokenizer: Any, model_config: ModelConfig, budget: int) -> list[Row]:
    """The first of the rows, at least one, up to `budget` tokens with `PROMPTS` among them.

    Raises UserError if no row has a token.
    """
    longest = min(ROW_TOKENS, model_config.max_position_embeddings)
    general = [tokenizer.encode(prompt)[:longest] for prompt in PROMPTS]
    room = budget - max(_count(general), round(GENERAL_SHARE * budget))
    kept = _up_to(room, (row[:longest] for row in rows))
    if not kept:
        raise UserError("no calibration text has a token; give --calibration a file whose prompts have some")
    repeats = round(_count(kept) * GENERAL_SHARE / _count(general)) or 1
    return kept + repeats * general


def _up_to(budget: int, rows: Iterable[Row]) -> list[Row]:
    kept: list[Row] = []
    for row in rows:
        if kept and _count(kept) + len(row) > budget:
            break
        kept += [row] if row else []
    return kept


def _count(rows: Sequence[Row]) -> int:
    return sum(map(len, rows))
