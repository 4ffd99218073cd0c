"""Completions of several turns: the model writes, its environment answers, the model goes on.

Each turn is one call of `generate`. The first shares the prompt in a group as always; for a later one, every row's
tokens so far are its prompt (G = 1), filled up to P + C, so that two programs are compiled whatever happens. Keys
and values of earlier turns are computed again: a prefill is cheap next to decoding, and the state between turns is plain
tokens. Rows that are done take part with a limit of 0 tokens.

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


@dataclass
class Conversation:
    """One completion while it grows."""

    environment: Environment
    budget: int
    tokens: list[int] = field(default_factory=list)
    by_model: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_kept: list[float] = field(default_factory=list)
    finish: int | None = None
    """None while the model may go on."""

    @property
    def room(self) -> int:
        """Tokens that the model may still write."""
        return self.budget - len(self.tokens) if self.finish is None else 0

    def add_turn(self, tokens: Sequence[int], logprobs: Sequence[float], log_kept: Sequence[float]) -> None:
        """What the model wrote."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.log_kept += log_kept
        self.by_model += [True] * len(tokens)

    def add_reply(self, tokens: Sequence[int]) -> None:
        """What the environment wrote. A reply that leaves no room for an answer is left out and ends the conversation."""
        if len(tokens) >= self.room:
            self.finish = FINISH_LENGTH
            return
        self.tokens += tokens
        for values in (self.logprobs, self.log_kept):
            values += [0.0] * len(tokens)
        self.by_model += [False] * len(tokens)


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
    config = dataclasses.replace(
        config, stop_token_ids=(*config.stop_token_ids, *_single_tokens(stop_strings, tokenizer))
    )
    later = dataclasses.replace(config, num_generations=1)
    conversations = [Conversation(environment, config.max_completion_length) for environment in environments]
    for turn in range(config.max_turns):
        turn_key, settings = jax.random.fold_in(key, turn), config if turn == 0 else later
        inputs = prompts if turn == 0 else _continued(prompts, conversations, pad_id)
        limits = None if turn == 0 else jnp.array([[c.room] for c in conversations], jnp.int32)
        drawn = generate(
            model, base, lora, inputs, turn_key, settings, eos_ids=eos_ids, pad_id=pad_id, row_limits=limits
        )
        _add_turns(conversations, jax.device_get(drawn), stop_strings, tokenizer, last=turn + 1 == config.max_turns)
        if all(conversation.finish is not None for conversation in conversations):
            break
    return _rollout(prompts, conversations, config, pad_id)


def _single_tokens(stop_strings: Sequence[str], tokenizer: Any) -> list[int]:
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in stop_strings]
    return [ids[0] for ids in encoded if len(ids) == 1]


def _continued(prompts: Prompts, conversations: Sequence[Conversation], pad_id: int) -> Prompts:
    """Prompt and conversation so far of every row, as prompts of P + C positions."""
    before, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    group = len(conversations) // len(lengths)
    width = before.shape[1] + conversations[0].budget
    tokens, totals = np.full((len(conversations), width), pad_id, np.int32), np.zeros(len(conversations), np.int32)
    for row, conversation in enumerate(conversations):
        length = lengths[row // group]
        totals[row] = length + len(conversation.tokens)
        tokens[row, :length] = before[row // group, :length]
        tokens[row, length : totals[row]] = conversation.tokens
    return Prompts(tokens=tokens, lengths=totals)  # type: ignore[arg-type]


def _add_turns(
    conversations: Sequence[Conversation], drawn: Rollout, stop_strings: Sequence[str], tokenizer: Any, *, last: bool
) -> None:
    """Give each row its new tokens and its environment's reply."""
    length = drawn.completion_tokens.shape[-1]
    arrays = [array.reshape(-1, length) for array in (drawn.completion_tokens, drawn.logprobs, drawn.log_kept)]
    counts, finish = drawn.completion_lengths.reshape(-1), drawn.finish.reshape(-1)
    for row, conversation in enumerate(conversations):
        if conversation.finish is not None:
            continue
        tokens = arrays[0][row, : counts[row]].tolist()
        kept = _until_stop(tokens, stop_strings, tokenizer)
        conversation.add_turn(*(array[row, :kept].tolist() for array in arrays))
        if kept == len(tokens) and finish[row] == FINISH_LENGTH:
            # A stop string may be complete exactly at the limit, but then there is no room for what follows it.
            conversation.finish = FINISH_LENGTH
            continue
        reply = conversation.environment.step(tokenizer.decode(tokens[:kept], skip_special_tokens=True))
        if reply is None:
            conversation.finish = FINISH_STOP
        elif last:
            conversation.finish = FINISH_LENGTH
        else:
            conversation.add_reply(tokenizer(reply, add_special_tokens=False)["input_ids"])


def _until_stop(tokens: Sequence[int], stop_strings: Sequence[str], tokenizer: Any) -> int:
    """Number of tokens up to the one that completes the first stop string; all of them if none occurs."""

    def holds_stop(count: int) -> bool:
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        return any(stop in text for stop in stop_strings)

    if not stop_strings or not holds_stop(len(tokens)):
        return len(tokens)
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
