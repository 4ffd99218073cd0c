"""Geometry of the charts: positions, ticks, reduction to a few hundred points, smoothing."""

import re

import pytest

from jgrpo.reporting.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    Line,
    column,
    decimate,
    draw,
    nice_ticks,
    smooth,
)


def points(path: str) -> list[list[tuple[float, float]]]:
    pieces = [piece for piece in re.split("[M ]+", path) if piece]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in piece.split("L"))] for piece in pieces]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.12, 0.79, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3e-6, 1e-6, [-3e-6, -2e-6, -1e-6, 0, 1e-6]),
        (0, 7300, [0, 2000, 4000, 6000, 8000]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, ticks: list[float]):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_the_frame_maps_its_corners_to_the_plot_area():
    frame = Frame(1, 11, -1.0, 3.0)
    assert (frame.x(1), frame.x(11), frame.x(6)) == (LEFT, WIDTH - RIGHT, (LEFT + WIDTH - RIGHT) / 2)
    assert (frame.y(3.0), frame.y(-1.0)) == (TOP, HEIGHT - BOTTOM)


def test_a_curve_passes_through_its_points_and_breaks_at_gaps():
    chart = draw("t", "", [Line("a", [1, 2, 3, 4, 5], [0.0, 1.0, None, float("nan"), 0.5])])
    assert chart is not None
    frame = Frame(1, 5, 0.0, 1.0)
    first, second = points(chart.lines[0].path)
    expected = [(frame.x(1), frame.y(0)), (frame.x(2), frame.y(1)), (frame.x(5), frame.y(0.5))]
    for (x, y), (expected_x, expected_y) in zip(first + second, expected, strict=True):
        assert (x, y) == (pytest.approx(expected_x, abs=0.05), pytest.approx(expected_y, abs=0.05))
    assert (len(first), len(second)) == (2, 1)
    assert chart.lines[0].last == "0.5"


def test_one_step_is_a_dot_in_the_middle():
    chart = draw("t", "", [Line("a", [1], [0.25])])
    assert chart is not None
    ((x, y),) = chart.lines[0].dots
    assert x == (LEFT + WIDTH - RIGHT) / 2
    assert TOP < y < HEIGHT - BOTTOM
    assert chart.x_ticks == [(x, "1")]


def test_no_numbers_no_chart():
    assert draw("t", "", [Line("a", [1, 2], [None, float("nan")])]) is None
    assert draw("t", "", []) is None


@pytest.mark.parametrize("constant", [0.0, 1e-12, -3.0, 1e12])
def test_a_constant_is_drawn_inside_the_plot(constant: float):
    chart = draw("t", "", [Line("a", [1, 2, 3], [constant] * 3)])
    assert chart is not None
    (piece,) = points(chart.lines[0].path)
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in piece)


def test_bytes_start_at_zero():
    chart = draw("t", "", [Line("a", [1, 2], [9.9e9, 1.0e10])], unit="bytes")
    assert chart is not None
    assert [label for _, label in chart.y_ticks] == ["0 B", "2.5 GB", "5 GB", "7.5 GB", "10 GB"]


def test_reduction_keeps_means_extremes_and_the_last_step():
    steps = list(range(1, 5001))
    spike = [100.0 if step == 2500 else 1.0 for step in steps]
    line = decimate(Line("a", steps, [float(s) for s in steps], [0.0] * 5000, spike))
    assert len(line.x) == MAX_POINTS
    assert line.x[-1] == 5000
    assert line.y[0] == pytest.approx(sum(range(1, line.x[0] + 1)) / line.x[0])
    assert line.high is not None
    assert max(v for v in line.high if v is not None) == 100.0


def test_reduction_leaves_empty_runs_empty():
    line = decimate(Line("a", list(range(1000)), [None] * 500 + [1.0] * 500))
    assert line.y[0] is None
    assert line.y[-1] == 1.0


def test_smoothing_is_unbiased_and_smooths():
    assert smooth([3.0] * 10, 5) == pytest.approx([3.0] * 10)
    noisy = smooth([0.0, 1.0] * 50, 9)
    assert all(0.3 < v < 0.7 for v in noisy[20:] if v is not None)
    assert smooth([1.0, None, 1.0], 5) == [1.0, None, 1.0]


def test_long_curves_are_smoothed_over_their_raw_values():
    chart = draw("t", "", [Line("a", list(range(60)), [float(i % 2) for i in range(60)])])
    assert chart is not None
    spread = [max(y for _, y in piece) - min(y for _, y in piece[20:]) for piece in points(chart.lines[0].faint_path)]
    assert spread[0] > 100
    (curve,) = points(chart.lines[0].path)
    assert max(y for _, y in curve[20:]) - min(y for _, y in curve[20:]) < 0.6 * spread[0]


def test_hover_lists_the_union_of_steps():
    chart = draw("t", "", [Line("a", [1, 2], [0.1, 0.2]), Line("b", [2, 3], [5.0, 6.0])])
    assert chart is not None
    assert chart.hover["steps"] == [1, 2, 3]
    assert chart.hover["rows"] == [["0.1", ""], ["0.2", "5"], ["", "6"]]


def test_a_column_has_only_the_steps_that_logged_it():
    line = column([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": None}], "a")
    assert (line.x, line.y) == ([1, 3], [2.0, None])
