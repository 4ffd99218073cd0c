"""Tasks of reasoning-gym by name: `reasoning_gym:countdown`, `reasoning_gym:basic_arithmetic` and a hundred others.

The package (Stojanovski et al. 2025, arXiv:2505.24760) makes its problems from a seed and judges answers itself; it is an
optional extra and imported on use. Its item number i of a data set with seed s is drawn from the seed s + i, so data sets with
near seeds share items. Hence the held-out problems have one fixed seed far away from any run's, and training leaves out every
question that is among them, which in a small task happens by chance.
"""

import difflib
import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

from jgrpo.data.source import Split
from jgrpo.errors import UserError

NAME = "reasoning_gym"
SIZES = {"train": 2000, "test": 200}
"""Problems made; some tasks take 20 ms for one."""
HELD_OUT_SEED = 2_000_000_000
"""Apart from a run's seeds by more than a data set's size."""

INSTRUCTION = "Think step by step in <think> tags, then give only the final answer in <answer> tags."


def rows(split: Split, seed: int, source: str | None) -> list[dict[str, Any]]:
    """Problems of the task `source`: prompt, and the columns gym_task and gym_entry that its scorer needs.

    Raises:
        UserError: the package is missing, or knows no such task.
    """
    held_out = _held_out(source)
    if split == "test":
        return _as_rows(source, held_out)
    questions = {entry["question"] for entry in held_out}
    fresh = [entry for entry in _entries(source, "train", seed) if entry["question"] not in questions]
    if not fresh:
        raise UserError(f"dataset '{NAME}:{source}' has too few problems: all of them are held out; use another task")
    return _as_rows(source, fresh)


def gym(task: str) -> ModuleType:
    """The package. Raises `UserError` with the way to install it; `task` is what needed it."""
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UserError(
            f"{NAME}:{task} needs the package reasoning-gym ({error}): pip install 'jgrpo[reasoning-gym]'"
        ) from None


@lru_cache(maxsize=1)
def _held_out(source: str | None) -> list[dict[str, Any]]:
    """Both splits need them, and a run asks for one after the other."""
    return _entries(source, "test", HELD_OUT_SEED)


def _entries(source: str | None, split: Split, seed: int) -> list[dict[str, Any]]:
    package = gym(source or "…")
    known = package.factory.DATASETS
    if source not in known:
        near = difflib.get_close_matches(source or "", known, n=1, cutoff=0.0)
        raise UserError(
            f"dataset '{NAME}:{source or ''}': reasoning-gym has {len(known)} tasks and none of that name; "
            f"did you mean '{NAME}:{near[0]}'?"
        )
    dataset = package.create_dataset(source, seed=seed, size=SIZES[split])
    return [dataset[index] for index in range(SIZES[split])]


def _as_rows(source: str | None, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{entry['question']}\n\n{INSTRUCTION}", "gym_task": source, "gym_entry": entry} for entry in entries
    ]
