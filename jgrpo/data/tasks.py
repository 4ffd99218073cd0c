"""Built-in tasks by name: where the rows come from and which reward functions judge them.

A task's rows are plain dictionaries with a "prompt" string; the other entries are columns for the rewards.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jgrpo.data import countdown, gym
from jgrpo.data.source import Split, read_rows
from jgrpo.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task that is known by name."""

    rows: Callable[[Split, int, str | None], list[Row]]
    """(split, seed, source) -> rows; the source is what follows the colon in `dataset`, if anything does."""
    reward_functions: tuple[str, ...]
    """Registry names of the rewards that apply when the config names none."""
    generated: bool
    """Whether jgrpo makes the rows itself, so that no source can be given."""
    always_held_out: bool = False
    """Whether there is a held-out split also where a source is given: the source is a name, not a file."""


def _countdown(split: Split, seed: int, source: str | None) -> list[Row]:
    return countdown.rows(split, seed)


GSM8K_INSTRUCTION = "Think step by step, then give the final answer as a number after ####."


def _gsm8k(split: Split, seed: int, source: str | None) -> list[Row]:
    """Rows of GSM8K (Cobbe et al. 2021, arXiv:2110.14168): question, worked answer ending in `#### number`."""
    rows = read_rows(source or f"openai/gsm8k:main:{split}", split, needed=("question", "answer"))
    return [gsm8k_row(row, number) for number, row in enumerate(rows)]


def gsm8k_row(row: Row, number: int = 0) -> Row:
    """prompt, answer (the number as a string, commas stripped) and solution (the worked answer)."""
    final = re.findall(r"####\s*([-\d.,]+)", str(row["answer"]))
    if not final:
        raise UserError(
            f"gsm8k: row {number}: the answer {str(row['answer'])[-40:]!r} does not end in '#### number'; "
            "use a file with the columns of openai/gsm8k"
        )
    prompt = f"{row['question']}\n{GSM8K_INSTRUCTION}"
    return {"prompt": prompt, "answer": final[-1].replace(",", "").rstrip("."), "solution": row["answer"]}


TASKS: Mapping[str, Task] = {
    "countdown": Task(_countdown, ("countdown",), generated=True),
    "gsm8k": Task(_gsm8k, ("gsm8k",), generated=False),
    gym.NAME: Task(gym.rows, (gym.NAME,), generated=False, always_held_out=True),
}


def find_task(dataset: str) -> tuple[Task | None, str | None]:
    """Split "name" or "name:source" into the task and the source; (None, None) if it names no task.

    Raises `UserError` for what looks like a misspelt task: asking the hub about it takes half a minute without a network.
    """
    name, _, source = dataset.partition(":")
    task = TASKS.get(name)
    if task is None:
        is_elsewhere = "/" in name or bool(Path(name).suffix)
        near = [] if is_elsewhere else difflib.get_close_matches(name, TASKS, n=1, cutoff=0.7)
        if near:
            tasks = ", ".join(TASKS)
            raise UserError(f"dataset {dataset!r} is unknown, did you mean {near[0]!r}? Built-in tasks: {tasks}")
        return None, None
    if source and task.generated:
        raise UserError(f"dataset {dataset!r}: the task {name!r} is generated and takes no source; use {name!r}")
    return task, source or None
