"""Reward functions by name: registry names for the built-in ones, dotted paths for everybody else's."""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jgrpo.config import RewardConfig
from jgrpo.errors import UserError
from jgrpo.rewards import answers, code, formats, gym, lengths, mathematics

RewardFn = Callable[..., Any]
"""TRL's convention: f(prompts, completions, completion_ids=…, **columns) -> list[float | None], sync or async."""

REWARDS: Mapping[str, RewardFn] = {
    "countdown": answers.countdown,
    "gsm8k": answers.gsm8k,
    "exact_match": answers.exact_match,
    "integer_answer": answers.integer_answer,
    "math_verify": mathematics.math_verify,
    "code_tests": code.code_tests,
    "code_io": code.code_io,
    "reasoning_gym": gym.reasoning_gym,
    "xml_format_strict": formats.xml_format_strict,
    "xml_format_soft": formats.xml_format_soft,
    "xml_count": formats.xml_count,
    "think_format": formats.think_format,
    "length": lengths.length,
    "repetition_penalty": lengths.repetition_penalty,
    "cosine": lengths.cosine,
    "soft_overlong": lengths.soft_overlong,
}


TASK = "task"
"""The name that stands for the built-in task's own functions; a weight given for it is the weight of each."""


@dataclass(frozen=True)
class NamedReward:
    """A reward function, the name its metrics carry, and its weight in the sum."""

    name: str
    function: RewardFn
    weight: float = 1.0


def resolve_rewards(config: RewardConfig, defaults: tuple[str, ...] = ()) -> list[NamedReward]:
    """The functions that the config names; `defaults` (the task's own) for the name "task", or where it names none.

    Raises `UserError` for an unknown name, a path that cannot be imported, something that is no function, two
    functions of one name, and weights whose number differs from the functions'.
    """
    names = config.reward_functions or (TASK,)
    if TASK in names and not defaults:
        given = "empty" if not config.reward_functions else f"{', '.join(names)}"
        raise UserError(
            f"reward_functions is {given}, and the data set brings none; name at least one of {', '.join(REWARDS)}"
        )
    weights = config.reward_weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"reward_weights has {len(weights)} entries for {len(names)} reward functions; give one for each"
        )
    pairs = [
        (function, weight)
        for name, weight in zip(names, weights, strict=True)
        for function in (defaults if name == TASK else (name,))
    ]
    return named_rewards([_find(name) for name, _ in pairs], tuple(weight for _, weight in pairs))


def named_rewards(functions: list[RewardFn], weights: tuple[float, ...] = ()) -> list[NamedReward]:
    """The same for functions given as Python objects."""
    names = [reward_name(function) for function in functions]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two reward functions are named {duplicates[0]!r}; metrics go by name, rename one of them")
    parts = zip(names, functions, weights or (1.0,) * len(functions), strict=True)
    return [NamedReward(*part) for part in parts]


def reward_name(function: RewardFn) -> str:
    """`__name__`, or the class name of a callable object."""
    return getattr(function, "__name__", type(function).__name__)


def _find(name: str) -> RewardFn:
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown reward {name!r}, did you mean {near!r}? Known: {', '.join(REWARDS)}; "
            "your own functions go by dotted path, package.module.function"
        )
    return _import(name, module_name, attribute)


def _import(name: str, module_name: str, attribute: str) -> RewardFn:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"reward {name!r}: cannot import {module_name!r} ({error}); is it on PYTHONPATH?") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, [n for n in dir(module) if callable(getattr(module, n))], n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"reward {name!r}: {module_name!r} has no function {attribute!r}{hint}")
    return function
