"""Completions of several turns: the model writes, its environment answers, the model goes on.

The work is done in rounds, each a call of `generate` of at most `round_length` tokens. After a round every row whose turn has
ended gets its reply; a row in the middle of a turn just goes on. The first round shares the prompt in a group as always; in
later ones each row's tokens so far are its prompt (G = 1), filled up to P + C. Keys and values are computed again: the state
between rounds is plain tokens, and a prefill is cheap next to decoding as long as turns are not much shorter than rounds. Rows
that are done drop out by halves (down to an eighth), so that a few shapes are compiled whatever happens.

The whole conversation behind the prompt shares the budget of `max_completion_length` tokens. In the `Rollout` it is one
completion: `completion_mask` covers it all (it is what the training forward reads), `loss_mask` what the model wrote.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from jgrpo.config import RolloutConfig
from jgrpo.models import Transformer
from jgrpo.rollout.batch import generate
from jgrpo.rollout.environment import Environment
from jgrpo.rollout.sampler import Params
from jgrpo.rollout.types import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout

HALVINGS = 3
"""Times that the number of rows may halve: the shapes to compile for later rounds, less one."""


@dataclass
class Conversation:
    """One completion while it grows."""

    environment: Environment
    budget: int
    tokens: list[int] = field(default_factory=list)
    by_model: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_kept: list[float] = field(default_factory=list)
    turns: int = 0
    """Finished turns of the model."""
    turn_start: int = 0
    """Where the model's present turn begins."""
    finish: int | None = None
    """None while the model may go on."""

    @property
    def room(self) -> int:
        """Tokens that the model may still write."""
        return self.budget - len(self.tokens) if self.finish is None else 0

    def extend(self, tokens: Sequence[int], logprobs: Sequence[float], log_kept: Sequence[float]) -> None:
        """What the model wrote in a round."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.log_kept += log_kept
        self.by_model += [True] * len(tokens)

    def cut_turn(self, count: int) -> None:
        """Keep the first `count` tokens of the present turn."""
        for values in (self.tokens, self.logprobs, self.log_kept, self.by_model):
            del values[self.turn_start + count :]

    def add_reply(self, tokens: Sequence[int]) -> None:
        """What the environment wrote. A reply that leaves no room for an answer is left out and ends the conversation."""
        if len(tokens) >= self.room:
            self.finish = FINISH_LENGTH
            return
        self.tokens += tokens
        for values in (self.logprobs, self.log_kept):
            values += [0.0] * len(tokens)
        self.by_model += [False] * len(tokens)
        self.turn_start = len(self.tokens)


def generate_turns(
    model: Transformer,
    base: Params,
    lora: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
    config: RolloutConfig,
    environments: Sequence[Environment],
    *,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """`generate` with an environment between the turns, at most `config.max_turns` of them.

    Args:
        environments: one for each of the Q · G completions, the G of one prompt next to each other, after `reset`.
        tokenizer: turns the model's tokens into text and replies into tokens.

    Returns:
        The conversations, with `loss_mask`. `finish` is FINISH_LENGTH where the budget or the turns ran out.
    """
    stop_strings = tuple(environments[0].stop_strings)
    settings = _round_settings(config, stop_strings, tokenizer)
    rows_at_once = config.prompts_at_once and config.prompts_at_once * config.num_generations
    conversations = [Conversation(environment, config.max_completion_length) for environment in environments]
    live, number = list(range(len(conversations))), 0
    while live:
        inputs, limits = (prompts, None) if number == 0 else _continued(prompts, conversations, live, pad_id)
        drawn = generate(
            model,
            base,
            lora,
            inputs,
            jax.random.fold_in(key, number),
            settings,
            eos_ids=eos_ids,
            pad_id=pad_id,
            row_limits=limits,
        )
        _extend([conversations[row] for row in live], jax.device_get(drawn))
        for row in live:
            _end_turn(conversations[row], stop_strings, settings.stop_token_ids + eos_ids, tokenizer, config.max_turns)
        live = [row for row in live if conversations[row].finish is None]
        settings = dataclasses.replace(settings, num_generations=1, compaction=False, prompts_at_once=rows_at_once)
        number += 1
    return _rollout(prompts, conversations, config, pad_id)


def _round_settings(config: RolloutConfig, stop_strings: Sequence[str], tokenizer: Any) -> RolloutConfig:
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in stop_strings]
    single = [ids[0] for ids in encoded if len(ids) == 1]
    length = min(config.round_length or config.max_completion_length, config.max_completion_length)
    return dataclasses.replace(config, max_completion_length=length, stop_token_ids=(*config.stop_token_ids, *single))


def _continued(
    prompts: Prompts, conversations: Sequence[Conversation], live: Sequence[int], pad_id: int
) -> tuple[Prompts, jax.Array]:
    """Prompt and conversation so far of the live rows, as prompts of P + C positions, and what each may still write.

    There are as many rows as conversations, or a half, a quarter or an eighth of them; what fills up may write nothing.
    """
    total = len(conversations)
    count = min(size for size in (-(-total // 2**k) for k in range(HALVINGS + 1)) if size >= len(live))
    before, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    group, width = total // len(lengths), before.shape[1] + conversations[0].budget
    tokens, totals = np.full((count, width), pad_id, np.int32), np.ones(count, np.int32)
    limits = np.zeros((count, 1), np.int32)
    for slot, row in enumerate(live):
        length, conversation = lengths[row // group], conversations[row]
        totals[slot] = length + len(conversation.tokens)
        tokens[slot, :length] = before[row // group, :length]
        tokens[slot, length : totals[slot]] = conversation.tokens
        limits[slot] = conversation.room
    return Prompts(tokens=tokens, lengths=totals), jnp.asarray(limits)  # type: ignore[arg-type]


def _extend(live: Sequence[Conversation], drawn: Rollout) -> None:
    """Give the live rows, which come first, their new tokens."""
    length = drawn.completion_tokens.shape[-1]
    arrays = [array.reshape(-1, length) for array in (drawn.completion_tokens, drawn.logprobs, drawn.log_kept)]
    counts = drawn.completion_lengths.reshape(-1)
    for slot, conversation in enumerate(live):
        conversation.extend(*(array[slot, : counts[slot]].tolist() for array in arrays))


def _end_turn(
    conversation: Conversation, stop_strings: Sequence[str], stop_ids: Sequence[int], tokenizer: Any, max_turns: int
) -> None:
    """If the present turn has ended, cut it there and add the environment's reply."""
    turn = conversation.tokens[conversation.turn_start :]
    kept = _until_stop(turn, stop_strings, tokenizer)
    if kept is None and turn[-1] not in stop_ids:
        conversation.finish = None if conversation.room else FINISH_LENGTH
        return
    kept = len(turn) if kept is None else kept
    conversation.cut_turn(kept)
    conversation.turns += 1
    reply = conversation.environment.step(tokenizer.decode(turn[:kept], skip_special_tokens=True))
    if reply is None:
        conversation.finish = FINISH_STOP
    elif conversation.turns == max_turns:
        conversation.finish = FINISH_LENGTH
    else:
        conversation.add_reply(tokenizer(reply, add_special_tokens=False)["input_ids"])


def _until_stop(tokens: Sequence[int], stop_strings: Sequence[str], tokenizer: Any) -> int | None:
    """Number of tokens up to the one that completes the first stop string; None if none occurs."""

    def holds_stop(count: int) -> bool:
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        return any(stop in text for stop in stop_strings)

    if not stop_strings or not holds_stop(len(tokens)):
        return None
    low, high = 0, len(tokens)  # not holds_stop(low), holds_stop(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds_stop(middle) else (middle, high)
    return high


def _rollout(prompts: Prompts, conversations: Sequence[Conversation], config: RolloutConfig, pad_id: int) -> Rollout:
    lead = (len(prompts.lengths), config.num_generations)

    def padded(name: str, fill: Any, dtype: Any) -> np.ndarray:
        out = np.full((len(conversations), config.max_completion_length), fill, dtype)
        for row, conversation in enumerate(conversations):
            values = getattr(conversation, name)
            out[row, : len(values)] = values
        return out.reshape(*lead, -1)

    lengths: Int[np.ndarray, "Q G"] = np.array([len(c.tokens) for c in conversations], np.int32).reshape(lead)
    arrays = {
        "prompt_tokens": np.asarray(prompts.tokens),
        "prompt_lengths": np.asarray(prompts.lengths),
        "completion_tokens": padded("tokens", pad_id, np.int32),
        "completion_lengths": lengths,
        "completion_mask": np.arange(config.max_completion_length) < lengths[..., None],
        "logprobs": padded("logprobs", 0.0, np.float32),
        "log_kept": padded("log_kept", 0.0, np.float32),
        "finish": np.array([c.finish for c in conversations], np.int32).reshape(lead),
        "loss_mask": padded("by_model", False, bool),
    }
    return Rollout(**jax.device_put(arrays))
