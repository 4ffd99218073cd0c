"""A run that is killed, stopped and resumed is the run that was left alone, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 8
WALL_TIME = ("time/", "throughput/", "memory/", "step_time")


def command(settings, output_dir, *extra):
    flags = []
    for name, value in {**settings, "steps": STEPS, "output_dir": output_dir}.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return [sys.executable, "-m", "jgrpo.train", *flags, *extra]


def start(settings, output_dir, *extra):
    # The same persistent cache for all: each program is compiled once.
    return subprocess.Popen(
        command(settings, output_dir, *extra),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(output_dir):
    path = Path(output_dir) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def signal_at(process, output_dir, step, number):
    """Send a signal once `step` (and the evaluation of step 0) is in the log, somewhere in the step after it."""
    deadline = time.monotonic() + 240
    while lines(output_dir) < step + 1:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
    time.sleep(random.Random(step).uniform(0, 0.3))
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics(output_dir):
    rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(WALL_TIME)} for row in rows]


def test_killed_and_stopped_run_continues_bit_for_bit(tiny_run, tmp_path):
    settings = {**tiny_run, "reward_functions": ("tests.end_to_end.rewards.slow_vowels",)}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    kill_at = random.SystemRandom().randrange(1, 5)
    print(f"killed in step {kill_at + 1}")  # pytest shows it if the test fails

    finished(start(settings, straight))
    code, _ = signal_at(start(settings, broken), broken, kill_at, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (broken / "adapter").exists()
    code, output = signal_at(start(settings, broken, "--resume"), broken, kill_at + 2, signal.SIGTERM)
    assert code == 143, output
    assert "--resume" in output
    finished(start(settings, broken, "--resume"))

    assert metrics(broken) == metrics(straight)
    assert len(metrics(straight)) == STEPS + 1
    assert all(row["grad_norm"] > 0 for row in metrics(straight)[1:])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (broken / "adapter" / name).read_bytes() == (straight / "adapter" / name).read_bytes()
    completions = sorted(path.name for path in (straight / "completions").iterdir())
    assert len(completions) == STEPS
    for name in completions:
        assert (broken / "completions" / name).read_bytes() == (straight / "completions" / name).read_bytes()


SIGNAL_TWICE = """
import os, signal, time
from jgrpo.training.guards import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGINT and signals.exit_code == 130
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
"""


def test_second_signal_exits_at_once():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SIGNAL_TWICE], cwd=REPOSITORY, check=False)
    assert done.returncode == 130
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_handlers_are_restored(number):
    from jgrpo.training.guards import StopSignals

    before = signal.getsignal(number)
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        assert signals.exit_code == 128 + number
    assert signal.getsignal(number) is before
