"""What answers a model between its turns: the protocol of an environment, and where a run's comes from.

An environment sees one conversation. `reset` prepares it for a prompt, `step` takes what the model has just written and
returns the text that follows, or None when there is nothing more to say. The text is put behind the model's tokens as it is,
markup of the chat template included (`chat_reply` makes that); the model goes on behind it. Its tokens are not the
model's, so they carry no loss.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from jgrpo.config import RolloutConfig
from jgrpo.errors import UserError
from jgrpo.rollout.tools import ToolEnvironment


@runtime_checkable
class Environment(Protocol):
    """One conversation; every completion gets an environment of its own."""

    stop_strings: Sequence[str]
    """Texts that end a turn, besides the end tokens; the same for every environment of a run. What the model wrote behind one
    is thrown away. Those that are a single token stop the sampler itself."""

    def reset(self, columns: Mapping[str, Any]) -> None:
        """Begin; `columns` are the prompt's columns of the data set."""

    def step(self, turn: str) -> str | None:
        """What follows the model's turn (its new text, end token left out); None: the conversation is over."""


EnvironmentFactory = Callable[[], Environment]


def environment_factory(config: RolloutConfig, tokenizer: Any, eos_ids: Sequence[int]) -> EnvironmentFactory | None:
    """What `config` names: tools, an environment, or None for completions of one turn.

    `eos_ids` are the tokens that end a turn.

    Raises:
        UserError: a path cannot be imported, or is not what it should be.
    """
    if config.tools:
        return partial(ToolEnvironment, load_tools(config), partial(chat_reply, tokenizer, eos_ids))
    if config.environment is None:
        return None
    factory = _imported(config.environment, "environment")
    environment = factory()
    if not isinstance(environment, Environment):
        raise UserError(
            f"environment {config.environment!r} returns {type(environment).__name__}; expected an object with "
            "stop_strings, reset(columns) and step(turn)"
        )
    return factory


def load_tools(config: RolloutConfig) -> list[Callable[..., Any]]:
    """The functions that `config.tools` names. Raises `UserError` for one that cannot be imported."""
    return [_imported(path, "tools") for path in config.tools]


def chat_reply(tokenizer: Any, eos_ids: Sequence[int], contents: Sequence[str], role: str = "tool") -> str:
    """Messages as the chat template writes them behind an assistant's end token, up to where the assistant goes on.

    Without a chat template: the contents, each on lines of its own.

    Raises:
        UserError: the template does not know the role.
    """
    if not tokenizer.chat_template:
        return "".join(f"\n{content}\n" for content in contents)
    from jinja2 import TemplateError

    spoken = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    replies = [{"role": role, "content": content} for content in contents]
    try:
        before = tokenizer.apply_chat_template(spoken, tokenize=False)
        after = tokenizer.apply_chat_template([*spoken, *replies], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the chat template refuses messages of role {role!r}: {error}") from error
    if not after.startswith(before):
        raise UserError(f"the chat template rewrites earlier turns when a message of role {role!r} follows them")
    # The sampled turn ends with its end token; what the template writes behind that belongs to the reply.
    _, _, closing = before.rpartition("!")
    ends = [end for end in tokenizer.batch_decode([[token] for token in eos_ids]) if end in closing]
    return (closing.partition(ends[0])[2] if ends else "") + after[len(before) :]


def _imported(path: str, setting: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(f"{setting}: {path!r} is not a dotted path; expected package.module.name")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{setting}: cannot import {module!r} ({error}); is it on PYTHONPATH?") from error
    if not callable(found):
        raise UserError(f"{setting}: {module!r} has no function or class {name!r}")
    return found
