"""The order in which prompts are seen: a permutation for each epoch and a cursor into it.

Both are functions of (seed, epoch) alone, so a run that resumes from a saved cursor sees exactly the prompts that
an uninterrupted run sees, and there is no iterator state to save.
"""

from typing import NamedTuple

import numpy as np


class Cursor(NamedTuple):
    """Position of the next prompt in the data order."""

    epoch: int = 0
    index: int = 0


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation int64[size] of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def take(size: int, seed: int, cursor: Cursor, count: int) -> tuple[list[int], Cursor]:
    """The next `count` row numbers and the cursor behind them.

    A batch may run over the end of an epoch: every row is seen once an epoch and none is left over, also where the
    data set is smaller than a batch.
    """
    rows: list[int] = []
    epoch, index = cursor
    while len(rows) < count:
        chunk = epoch_order(size, seed, epoch)[index : index + count - len(rows)]
        rows.extend(int(row) for row in chunk)
        index += len(chunk)
        if index >= size:
            epoch, index = epoch + 1, 0
    return rows, Cursor(epoch, index)
