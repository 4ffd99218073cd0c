"""Train the demo with each algorithm and several seeds, and draw the held-out accuracy: docs/algorithms_seeds.csv and .svg.

    python scripts/compare_algorithms.py run --runs DIR [--seeds 0 1 2]    # DIR/ALGORITHM-SEED, one run after the other
    python scripts/compare_algorithms.py plot --runs DIR                   # the table and the figure from what is in DIR

Every run starts `python -m jgrpo.train` with `COMMON` and the algorithm's flags, everything else being the demo's. Runs that
are already in DIR are left alone.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

DOCS = Path(__file__).parents[1] / "docs"
TABLE, FIGURE = DOCS / "algorithms_seeds.csv", DOCS / "algorithms_seeds.svg"
COMMON = ["--steps", "20", "--eval-every", "10", "--save-every", "0", "--no-tensorboard"]
RECIPES = {
    "grpo": [],
    "rloo": ["--algorithm", "rloo", "--beta", "0.01"],
    "ppo": ["--algorithm", "ppo"],
    "online_dpo": ["--algorithm", "online_dpo", "--mask-truncated-completions"],
}
COLUMNS = ("algorithm", "seed", "step", "eval_accuracy", "eval_accuracy_ci95", "reward")
COLORS = {"grpo": "#4269d0", "rloo": "#efb118", "ppo": "#ff725c", "online_dpo": "#3ca951"}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 600, 300, 48, 36, 12
LEGEND = 110

Rows = list[dict[str, str]]


def run(folder: Path, seeds: list[int]) -> None:
    """Whatever is missing in `folder`."""
    for seed in seeds:
        for name, flags in RECIPES.items():
            out = folder / f"{name}-{seed}"
            if not out.exists():
                command = [sys.executable, "-m", "jgrpo.train", *COMMON, "--seed", str(seed), "--output-dir", str(out)]
                subprocess.run([*command, *flags], check=True)


def collect(folder: Path) -> Rows:
    """A row for each logged step of each run."""
    rows = []
    for name in RECIPES:
        for path in sorted(folder.glob(f"{name}-[0-9]/metrics.jsonl")):
            lines = map(json.loads, path.read_text().splitlines())
            known = {"algorithm": name, "seed": path.parent.name.rpartition("-")[2]}
            rows += [{column: {**line, **known}.get(column, "") for column in COLUMNS} for line in lines]
    return rows


def accuracies(rows: Rows) -> dict[str, dict[int, list[float]]]:
    """{algorithm: {step: held-out accuracy of each seed}}."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["eval_accuracy"] != "":
            steps = found.setdefault(row["algorithm"], {})
            steps.setdefault(int(row["step"]), []).append(float(row["eval_accuracy"]))
    return found


def markdown(rows: Rows) -> str:
    """Accuracy of each seed at each evaluation, and the mean over seeds."""
    found = accuracies(rows)
    steps = sorted({step for curves in found.values() for step in curves})
    lines = ["| algorithm | " + " | ".join(f"step {step}" for step in steps) + " |", "|---|" + "---|" * len(steps)]
    for name, curves in found.items():
        cells = (" ".join(f"{v:.3f}" for v in curves[step]) + f" (mean {mean(curves[step]):.3f})" for step in steps)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Rows) -> str:
    """The figure as SVG text: thin lines are seeds, thick ones their mean."""
    last = max(int(row["step"]) for row in rows)

    def at(step: float, accuracy: float) -> str:
        return (
            f"{LEFT + step / last * (WIDTH - LEFT - LEGEND):.1f},{TOP + (1 - accuracy) * (HEIGHT - TOP - BOTTOM):.1f}"
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + (1 - tick) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<polyline points="{at(0, tick)} {at(last, tick)}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.2f}</text>')
    for index, (name, curves) in enumerate(accuracies(rows).items()):
        seeds = zip(*curves.values(), strict=True)
        lines = [(curve, 0.8) for curve in seeds] + [(tuple(mean(values) for values in curves.values()), 2.5)]
        for curve, width in lines:
            points = " ".join(at(step, value) for step, value in zip(curves, curve, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[name]}" stroke-width="{width}"/>')
        parts.append(f'<text x="{WIDTH - LEGEND + 16}" y="{TOP + 14 + 18 * index}" fill="{COLORS[name]}">{name}</text>')
    steps = sorted({step for curves in accuracies(rows).values() for step in curves})
    ticks = ((at(step, 0).split(",")[0], step) for step in steps)
    parts += [f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step}</text>' for x, step in ticks]
    note = "step (accuracy on held-out problems; thin: seeds, thick: their mean)"
    parts.append(f'<text x="{WIDTH / 2 - 30}" y="{HEIGHT - 4}" text-anchor="middle">{note}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "plot"))
    parser.add_argument("--runs", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.action == "run":
        run(args.runs, args.seeds)
    rows = collect(args.runs)
    with TABLE.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    FIGURE.write_text(draw(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
