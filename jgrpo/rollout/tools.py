"""Python functions as tools: their description for the prompt, calls in what the model wrote, and results.

The form is that of Hermes and Qwen: a call is `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, JSON inside tags. Arguments
are checked against the function's type hints. Whatever goes wrong is a result too, for the model to read and learn from.

A tool runs in the training process: one that can hang or do harm has to limit itself (`jgrpo.rewards.sandbox` runs programs).
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call

from jgrpo.errors import UserError

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

INSTRUCTIONS = """You may call these functions:
{functions}
To call one, write <tool_call>{{"name": "function", "arguments": {{"parameter": "value"}}}}</tool_call> and end your turn. \
You then get its result, and go on."""


def describe_tools(functions: Sequence[Callable[..., Any]]) -> str:
    """What the system message says about the tools: how to call them, and one line of JSON for each.

    Raises:
        UserError: a function has no docstring, or a parameter without a type.
    """
    return INSTRUCTIONS.format(functions="\n".join(json.dumps(tool_schema(function)) for function in functions))


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Name, description (the docstring) and JSON schema of the parameters.

    Raises:
        UserError: it has no docstring, or a parameter without a type.
    """
    name, description = function.__name__, inspect.getdoc(function)
    if not description:
        raise UserError(f"tool {name!r} has no docstring; the model needs a sentence on what it does")
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.annotation is parameter.empty:
            raise UserError(f"tool {name!r}: parameter {parameter.name!r} has no type; write one, such as x: float")
    schemas = {key: TypeAdapter(p.annotation).json_schema() for key, p in _resolved(function).items()}
    required = [key for key, p in parameters.items() if p.default is p.empty]
    properties = {"type": "object", "properties": schemas, "required": required}
    return {"name": name, "description": description, "parameters": properties}


def _resolved(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function, eval_str=True).parameters


class ToolEnvironment:
    """Answers every turn that calls tools with their results; a turn without a call is the last.

    Args:
        functions: the tools; their names must differ.
        reply: results of a turn's calls -> the text behind it (`jgrpo.rollout.environment.chat_reply`).
    """

    stop_strings: Sequence[str] = ()

    def __init__(self, functions: Sequence[Callable[..., Any]], reply: Callable[[Sequence[str]], str]) -> None:
        checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))
        self.functions = {function.__name__: checked(function) for function in functions}
        self.reply = reply

    def reset(self, columns: Mapping[str, Any]) -> None:
        """Tools keep no state between prompts."""

    def step(self, turn: str) -> str | None:
        """The results of the turn's calls, in their order."""
        calls = CALL.findall(turn)
        return self.reply([self.call(text) for text in calls]) if calls else None

    def call(self, text: str) -> str:
        """The result of one call as text: `str` of what the function returns, or what was wrong."""
        try:
            request = json.loads(text)
        except json.JSONDecodeError as error:
            return f"error: not JSON ({error})"
        if not isinstance(request, dict) or not isinstance(request.get("arguments", {}), dict):
            return 'error: expected {"name": …, "arguments": {…}}'
        function = self.functions.get(str(request.get("name")))
        if function is None:
            return f"error: no function {request.get('name')!r}; there are: {', '.join(self.functions)}"
        try:
            return str(function(**request.get("arguments", {})))
        except ValidationError as error:
            first = error.errors()[0]
            return f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        except Exception as error:  # whatever somebody's function raises is its result
            return f"error: {type(error).__name__}: {error}"
