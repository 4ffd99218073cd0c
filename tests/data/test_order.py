"""The data order is a function of (seed, epoch) and a cursor resumes it exactly."""

import numpy as np
import pytest

from jgrpo.data import Cursor, epoch_order, take


def test_an_epoch_is_a_permutation_of_its_own():
    first, again, second, other = (epoch_order(50, *key) for key in [(0, 0), (0, 0), (0, 1), (1, 0)])
    assert sorted(first) == list(range(50))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", [3, 7, 16])
def test_resuming_at_any_cursor_continues_the_same_sequence(size):
    whole, _ = take(size, 5, Cursor(), 40)
    for cut in range(40):
        head, cursor = take(size, 5, Cursor(), cut)
        tail, _ = take(size, 5, cursor, 40 - cut)
        assert head + tail == whole


def test_every_row_is_seen_once_an_epoch_even_if_batches_do_not_divide_it():
    rows, cursor = take(10, 0, Cursor(), 30)
    assert [sorted(rows[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert cursor == Cursor(3, 0)
