"""Rows of a data set, from the Hugging Face hub or from a local file, through `datasets`.

A source is written as the path of a .jsonl, .json, .parquet or .csv file, or as a hub id that may carry its
configuration and split: "openai/gsm8k", "openai/gsm8k:test", "openai/gsm8k:main:test".
`datasets` is imported on use: it takes a second, and the built-in tasks do without it.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from jgrpo.errors import UserError

Split = Literal["train", "test"]

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

_FORMS = f"a built-in task, a {', '.join(LOADERS)} file, or a hub id (id, id:split or id:configuration:split)"


def read_rows(source: str, split: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """All rows as dictionaries.

    Raises `UserError` for a source that cannot be found or read, an empty one, and a missing column of `needed`.
    """
    suffix = Path(source).suffix.lower()
    table = _local(source, LOADERS[suffix]) if suffix in LOADERS else _hub(source, split)
    if missing := [column for column in needed if column not in table.column_names]:
        raise UserError(missing_column(missing[0], table.column_names, f"dataset {source!r}"))
    if len(table) == 0:
        raise UserError(f"dataset {source!r} is empty; expected at least one row")
    return [dict(row) for row in table]


def missing_column(column: str, present: Iterable[str], where: str) -> str:
    """One line that names the columns there are and the nearest of them."""
    present = list(present)
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where} has no column {column!r}, only: {', '.join(present) or 'none'}{hint}"


def _local(source: str, loader: str) -> Any:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"dataset {source!r}: no such file; expected the path of a {', '.join(LOADERS)} file")
    if path.stat().st_size == 0:
        raise UserError(f"dataset {source!r} is empty; expected at least one row")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(loader, data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError) as error:
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"dataset {source!r} cannot be read as {path.suffix[1:]}: {reason}") from error


def _hub(source: str, split: str) -> Any:
    name, *rest = source.split(":")
    if len(rest) > 2 or Path(source).suffix in (".txt", ".tsv", ".xlsx", ".arrow") or Path(source).exists():
        raise UserError(f"dataset {source!r} is none of {_FORMS}")
    configuration = rest[0] if len(rest) == 2 else None
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, configuration, split=rest[-1] if rest else split)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        raise UserError(f"dataset {source!r}: {_first_line(error)}; expected {_FORMS}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
