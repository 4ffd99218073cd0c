"""Several examples in one row: which ones, so that few positions are left empty.

Best fit, decreasing: the longest example first, each into the fullest row that still has room for it. This wastes next to
nothing where short examples exist, and is deterministic given the order among equal lengths, which the epoch's
permutation gives: a resumed run packs the same rows.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jgrpo.data.order import epoch_order


def pack(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Rows of example numbers whose lengths add up to at most `capacity`; every number of `order` occurs once.

    Raises:
        ValueError: an example is longer than a row.
    """
    rows: list[list[int]] = []
    rows_with: dict[int, list[int]] = defaultdict(list)
    """Free positions -> numbers of the rows that have exactly so many."""
    sizes: list[int] = []
    """The keys of `rows_with` that have rows, ascending."""
    for example in sorted(order, key=lambda number: -lengths[number]):
        if lengths[example] > capacity:
            raise ValueError(f"example {example} has {lengths[example]} tokens, a row {capacity}")
        place = bisect_left(sizes, lengths[example])
        if place == len(sizes):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = sizes[place]
            row = rows_with[free].pop()
            if not rows_with[free]:
                sizes.pop(place)
        rows[row].append(int(example))
        left = free - lengths[example]
        if not rows_with[left]:
            insort(sizes, left)
        rows_with[left].append(row)
    return rows


def epoch_rows(
    lengths: Sequence[int], capacity: int, seed: int, epoch: int, *, packing: bool = True
) -> list[list[int]]:
    """The rows of one epoch in the order they are seen; without `packing`, one example a row."""
    order = epoch_order(len(lengths), seed, epoch).tolist()
    if not packing:
        return [[number] for number in order]
    rows = pack(lengths, capacity, order)
    # Packing sorted the rows by the length of their first example.
    return [rows[index] for index in np.random.default_rng([seed, epoch, 1]).permutation(len(rows))]
