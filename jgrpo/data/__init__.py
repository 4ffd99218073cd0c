"""Prompts: where they come from, how they are tokenized, and in which order they are seen."""

from jgrpo.data.order import Cursor, epoch_order, take
from jgrpo.data.prompts import (
    Example,
    PromptDataset,
    check_context,
    encode_prompts,
    has_held_out,
    load_prompts,
    pad_prompts,
    repeat_columns,
)
from jgrpo.data.tasks import TASKS, Task, find_task

__all__ = [
    "TASKS",
    "Cursor",
    "Example",
    "PromptDataset",
    "Task",
    "check_context",
    "encode_prompts",
    "epoch_order",
    "find_task",
    "has_held_out",
    "load_prompts",
    "pad_prompts",
    "repeat_columns",
    "take",
]
