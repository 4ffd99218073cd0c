"""Run the built-in demo once for each seed and draw the held-out accuracy: docs/demo_seeds.csv and docs/demo_seeds.svg.

    python scripts/plot_demo_seeds.py run [--seeds 0 1 2 3 4] [--threads 2]
    python scripts/plot_demo_seeds.py plot

`run` starts `python -m jgrpo.train` as a user would, one process after the other, and measures each one's wall
time from start to exit. `plot` draws the table that is there.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
TABLE, FIGURE = DOCS / "demo_seeds.csv", DOCS / "demo_seeds.svg"
COLUMNS = ("seed", "step", "eval_accuracy", "eval_completions/mean_length", "wall_seconds")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 300, 48, 36, 12
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5", "#9c6b4e")


def run_seed(seed: int, cpus: set[int]) -> list[dict[str, float]]:
    """One demo run on the given cores: a row for each evaluation, with the wall time of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jgrpo.train", "--seed", str(seed), "--output-dir", f"{folder}/run"]
        start = time.monotonic()
        subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cpus), stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        lines = (json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        rows = [{**line, "seed": seed, "wall_seconds": round(seconds, 1)} for line in lines if "eval_accuracy" in line]
    print(
        f"seed {seed}: {rows[0]['eval_accuracy']:.3f} -> {rows[-1]['eval_accuracy']:.3f} in {seconds:.0f} s", flush=True
    )
    return [{column: row[column] for column in COLUMNS} for row in rows]


def write_table(rows: list[dict[str, float]]) -> None:
    with TABLE.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table() -> dict[int, list[tuple[int, float]]]:
    """(step, accuracy) of each seed."""
    curves: dict[int, list[tuple[int, float]]] = {}
    with TABLE.open() as stream:
        for row in csv.DictReader(stream):
            curves.setdefault(int(row["seed"]), []).append((int(row["step"]), float(row["eval_accuracy"])))
    return curves


def draw(curves: dict[int, list[tuple[int, float]]]) -> str:
    """The figure as SVG text."""
    last = max(step for curve in curves.values() for step, _ in curve)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - 80)

    def y(accuracy: float) -> float:
        return TOP + (1 - accuracy) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line x1="{LEFT}" x2="{x(last)}" y1="{y(tick)}" y2="{y(tick)}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:.2f}</text>')
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    parts += [f'<text x="{x(step)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step}</text>' for step in steps]
    for index, (seed, curve) in enumerate(sorted(curves.items())):
        color = COLORS[index % len(COLORS)]
        points = " ".join(f"{x(step):.1f},{y(accuracy):.1f}" for step, accuracy in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - 70}" y="{TOP + 14 + 18 * index}" fill="{color}">seed {seed}</text>')
    center = (LEFT + x(last)) / 2
    parts.append(
        f'<text x="{center}" y="{HEIGHT - 4}" text-anchor="middle">step (accuracy on held-out problems)</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "plot"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2, help="CPU cores that a run may use")
    args = parser.parse_args()
    if args.action == "run":
        cpus = set(sorted(os.sched_getaffinity(0))[: args.threads])
        write_table([row for seed in args.seeds for row in run_seed(seed, cpus)])
    FIGURE.write_text(draw(read_table()))


if __name__ == "__main__":
    main()
