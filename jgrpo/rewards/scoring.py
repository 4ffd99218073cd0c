"""Scoring a batch of completions with every reward function, in TRL's calling convention.

`f(prompts=…, completions=…, completion_ids=…, **columns)`: what a function gets depends on the prompts. Chat prompts
come with completions `[{"role": "assistant", "content": …}]`, string prompts with strings. Beyond TRL, a function
without `**kwargs` gets only the arguments that it names, where TRL would raise. `trainer_state`, `log_extra` and
`log_metric` are passed as TRL does.

A function that raises, exceeds its time limit, or returns something other than one number or None for each completion
either stops the run with its name in the message ("abort"), or counts as None for all rows with the same message as a
problem to report ("ignore"). An argument that no column supplies always stops the run: it is a mistake in the
configuration, not an accident.
"""

import functools
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jgrpo.data.source import missing_column
from jgrpo.errors import UserError
from jgrpo.rewards import limits
from jgrpo.rewards.registry import NamedReward


@dataclass(frozen=True)
class RewardResult:
    """What the reward functions said about N completions."""

    per_function: Float[np.ndarray, "F N"]
    """One row for each function; NaN where it returned None (or NaN)."""
    problems: list[str] = field(default_factory=list)
    """What went wrong and was ignored, one line each."""
    extra_columns: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that functions logged through `log_extra`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means of what functions logged through `log_metric`."""


class RewardProblem(Exception):
    """What a reward function did wrong, as the end of a sentence that starts with its name."""


def as_completions(prompts: Sequence[Any], texts: Sequence[str]) -> list[Any]:
    """Generated texts in the form that belongs to their prompts: chat messages or strings."""
    pairs = zip(prompts, texts, strict=True)
    return [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for prompt, text in pairs]


def score(
    rewards: Sequence[NamedReward],
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    *,
    timeout: float = 30.0,
    on_error: Literal["abort", "ignore"] = "abort",
    extras: Mapping[str, Any] | None = None,
) -> RewardResult:
    """Call every function once with all N completions (texts; `as_completions` is applied here).

    `columns` are lists of N. `extras` are further keyword arguments that are no columns, such as `trainer_state` and
    `max_completion_length`. Synchronous functions run one after the other, asynchronous ones at the same time.
    Raises `UserError` with the function's name, see the module's docstring.
    """
    log = _Log()
    available = {
        "prompts": list(prompts),
        "completions": as_completions(prompts, completions),
        "completion_ids": [list(map(int, ids)) for ids in completion_ids],
        **columns,
        "log_extra": log.extra,
        "log_metric": log.metric,
        **(extras or {}),
    }
    calls = [(reward, _arguments(reward, available, columns)) for reward in rewards]
    waiting = {reward.name: _start_async(reward, kwargs) for reward, kwargs in calls}
    rows, problems = [], []
    for reward, kwargs in calls:
        try:
            rows.append(_outcome(reward, kwargs, waiting[reward.name], timeout, len(completions)))
        except RewardProblem as problem:
            message = f"reward {reward.name!r} {problem}"
            if on_error == "abort":
                raise UserError(f"{message}; correct it, or set reward_errors to ignore") from problem.__cause__
            problems.append(f"{message}; its rewards of this batch count as None")
            rows.append(np.full(len(completions), np.nan))
    return RewardResult(np.stack(rows), problems, log.columns, log.means())


def _arguments(reward: NamedReward, available: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(reward.function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in available:
            raise UserError(missing_column(parameter.name, columns, f"reward {reward.name!r}: the data set"))
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return dict(available)
    return {p.name: available[p.name] for p in named if p.name in available}


def _is_async(function: Callable[..., Any]) -> bool:
    if isinstance(function, functools.partial):
        return _is_async(function.func)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _start_async(reward: NamedReward, kwargs: dict[str, Any]) -> Any:
    return limits.EVENT_LOOP.submit(reward.function(**kwargs)) if _is_async(reward.function) else None


def _outcome(reward: NamedReward, kwargs: dict[str, Any], future: Any, timeout: float, count: int) -> np.ndarray:
    try:
        if future is None:
            values = limits.call(lambda: reward.function(**kwargs), timeout)
        else:
            values = limits.EVENT_LOOP.result(future, timeout)
    except limits.TimeLimit as error:
        raise RewardProblem(f"did not return within reward_timeout, {timeout:g} s") from error
    except UserError:
        raise
    except Exception as error:  # whatever a user's function raises is to be reported under its name
        raise RewardProblem(f"raised {type(error).__name__}: {error} ({_where(error)})") from error
    return _numbers(values, count)


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _numbers(values: Any, count: int) -> np.ndarray:
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise RewardProblem(f"returned {type(values).__name__}; expected a list of {count} numbers or None")
    if len(values) != count:
        raise RewardProblem(f"returned {len(values)} values for {count} completions")
    return np.array([_number(value, row) for row, value in enumerate(values)], dtype=np.float64)


def _number(value: Any, row: int) -> float:
    if value is None:
        return math.nan
    # Scalars of numpy, jax and torch know how to become Python numbers.
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, numbers.Real):
        raise RewardProblem(f"returned {plain!r} for completion {row}; expected a number or None")
    if math.isinf(plain):
        raise RewardProblem(f"returned {plain} for completion {row}; expected a finite number or None")
    return float(plain)


class _Log:
    """Targets of `log_extra` and `log_metric`."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self._values: dict[str, list[float]] = {}

    def extra(self, name: str, values: Sequence[Any]) -> None:
        self.columns[name] = list(values)

    def metric(self, name: str, value: float) -> None:
        self._values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._values.items()}
