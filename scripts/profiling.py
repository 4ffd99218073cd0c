"""Where the device time of a piece of code goes: a table of kernels from JAX's own profiler.

with traced() as table: run()
print(table())
"""

import collections
import contextlib
import glob
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax


@contextlib.contextmanager
def traced() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Profile the block; the function it yields returns the kernels afterwards, the longest in total first."""
    with tempfile.TemporaryDirectory() as folder:
        rows: list[dict[str, Any]] = []
        jax.profiler.start_trace(folder)
        try:
            yield lambda: rows
        finally:
            jax.profiler.stop_trace()
            rows.extend(_kernels(folder))


def _kernels(folder: str) -> list[dict[str, Any]]:
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    total: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if "Stream" in line.name:  # the other lines repeat the same time by HLO op and by module
                for event in line.events:
                    name = re.sub(r"_\d+$", "", event.name)
                    total[name] += event.duration_ns / 1e3
                    count[name] += 1
    everything = sum(total.values())
    return [
        {"kernel": name[:90], "us": round(spent, 1), "count": count[name], "share": round(spent / everything, 4)}
        for name, spent in sorted(total.items(), key=lambda item: -item[1])
    ]


def format_table(rows: list[dict[str, Any]], most: int = 30, steps: int | None = None) -> str:
    """The first rows as text, with the sum of all; `steps` adds what a decode step has of each."""

    def line(us: float, count: int, rest: str) -> str:
        of_step = f"{us / steps:>9.1f} us {count / steps:>6.1f} x a step" if steps else ""
        return f"{us:>12,.1f} us {count:>7} x {of_step} {rest}"

    lines = [line(row["us"], row["count"], f"{row['share']:>6.1%}  {row['kernel']}") for row in rows[:most]]
    everything = sum(row["us"] for row in rows), sum(row["count"] for row in rows)
    return "\n".join([*lines, line(*everything, "kernels in all")])
