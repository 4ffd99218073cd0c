"""One run from prompts to adapter, and every way to be told that it cannot be."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jgrpo import evaluate
from jgrpo.cli import resolve_config
from jgrpo.errors import UserError
from jgrpo.training.guards import CompileCounter
from jgrpo.training.loop import train
from tests.end_to_end.rewards import vowels

REPOSITORY = Path(__file__).parents[2]
STEPS = 12
METRICS = [
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "step_time",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/vowels/mean",
    "rewards/vowels/std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "entropy",
    "clip_ratio/region_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/mean",
    "time/rollout",
    "time/reward",
    "time/update",
    "throughput/rollout_tokens_per_s",
    "throughput/train_tokens_per_s",
    "updates/skipped",
]


def configured(settings, output_dir, **changes):
    return resolve_config(overrides={**settings, "output_dir": str(output_dir), **changes})


@pytest.fixture(scope="module")
def finished_run(tiny_run, tmp_path_factory):
    """A finished run, and what was alive on the device and compiled at each of its steps."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    seen = []
    counter = CompileCounter()

    def watched(completions, trainer_state=None, **columns):
        if trainer_state is not None:
            live = jax.live_arrays()
            seen.append((len(live), sum(array.nbytes for array in live), counter.count))
        return vowels(completions)

    watched.__name__ = "vowels"
    config = configured(tiny_run, directory, steps=STEPS, learning_rate=3e-2, reward_functions=(), eval_every=6)
    state = train(config, reward_functions=[watched])
    counter.close()
    return directory, state, seen


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_run_directory_is_complete(finished_run):
    directory, state, _ = finished_run
    assert state.step == STEPS
    names = {path.name for path in directory.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "completions", "checkpoints", "adapter", "report.html"} <= names
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step_000010", "step_000012"]
    assert {p.name for p in (directory / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_metrics_have_the_ecosystems_names(finished_run):
    rows = lines(finished_run[0])
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        assert set(METRICS) <= set(row)
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 6, 12]
    assert {"eval_accuracy", "eval_rewards/vowels/mean", "eval_completions/mean_length"} <= set(rows[0])


def test_reward_rises(finished_run):
    rewards = [row["reward"] for row in lines(finished_run[0])[1:]]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05


def test_completions_are_fresh_and_complete(finished_run):
    files = sorted((finished_run[0] / "completions").iterdir())
    assert len(files) == STEPS
    first, second = ([json.loads(line) for line in file.read_text().splitlines()] for file in files[:2])
    assert len(first) == 16
    assert {"prompt", "completion", "rewards", "advantage"} <= set(first[0])
    assert [row["completion"] for row in first] != [row["completion"] for row in second]


def test_nothing_grows_and_nothing_recompiles(finished_run):
    """Arrays alive and programs compiled: the same at the end as early on (a save, every 2 steps, leaves some behind)."""
    seen = finished_run[2]
    assert len(seen) == STEPS
    counts, bytes_alive, compiled = zip(*seen, strict=True)
    assert counts[2:4] * 5 == counts[2:]
    assert bytes_alive[2:4] * 5 == bytes_alive[2:]
    assert compiled[-1] == compiled[2]


def test_evaluate_command(finished_run, capsys, tmp_path):
    output = tmp_path / "numbers.json"
    flags = ["--run", finished_run[0], "--samples", "2", "--output", output]
    flags += ["--reward-functions", "tests.end_to_end.rewards.vowels"]
    assert evaluate.main(list(map(str, flags))) == 0
    assert "paired by prompt" in capsys.readouterr().out
    numbers = json.loads(output.read_text())
    rewards = {(r["policy"], r["sampling"]): r["reward"]["mean"] for r in numbers["results"]}
    assert set(rewards) == {(policy, way) for policy in ("base", "adapter") for way in ("greedy", "temperature 1")}
    assert rewards["adapter", "temperature 1"] > rewards["base", "temperature 1"]
    assert set(numbers["results"][-1]) >= {"accuracy", "pass@2", "completions_per_prompt"}
    # The run's own last evaluation is the greedy one of the adapter.
    assert rewards["adapter", "greedy"] == pytest.approx(lines(finished_run[0])[-1]["eval_reward"], abs=1e-6)


def test_learning_rate_zero_moves_nothing_but_the_dice(tiny_run, tmp_path):
    """The same prompts twice, the policy unchanged: other completions, the same adapter."""
    config = configured(
        tiny_run, tmp_path / "run", steps=2, learning_rate=0.0, prompts_per_step=8, eval_every=0, beta=0.1
    )
    state = train(config)
    assert all(np.all(np.asarray(module["b"]) == 0) for module in state.lora.values())
    files = sorted((tmp_path / "run" / "completions").iterdir())
    by_prompt = [
        sorted((row["prompt"], row["completion"]) for row in map(json.loads, file.read_text().splitlines()))
        for file in files
    ]
    assert [prompt for prompt, _ in by_prompt[0]] == [prompt for prompt, _ in by_prompt[1]]
    assert by_prompt[0] != by_prompt[1]
    assert all(row["kl"] == pytest.approx(0, abs=1e-10) for row in lines(tmp_path / "run")[1:])


def test_interrupted_in_a_reward_saves_the_step_before(tiny_run, tmp_path):
    """Ctrl-C while step 3 is being judged: exit code 130, the state of step 2 saved, its rollout thrown away."""

    def interrupting(completions, trainer_state=None, **columns):
        if trainer_state is not None and trainer_state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return vowels(completions)

    interrupting.__name__ = "vowels"
    config = configured(tiny_run, tmp_path / "run", steps=4, save_every=0, eval_every=0, reward_functions=())
    with pytest.raises(SystemExit) as stopped:
        train(config, reward_functions=[interrupting])
    assert stopped.value.code == 130
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    assert train(resumed, reward_functions=[vowels]).step == 4
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_run_that_diverges_is_aborted(tiny_run, tmp_path):
    """An absurd learning rate: the updates after the first are skipped and counted, then the run gives up."""
    config = configured(tiny_run, tmp_path / "run", learning_rate=1e38, max_nonfinite_steps=2, eval_every=0)
    with pytest.raises(UserError, match="2 updates in a row"):
        train(config)
    rows = lines(tmp_path / "run")
    assert [row["updates/skipped"] for row in rows] == [0, 1, 1]
    assert rows[-1]["grad_norm"] is None or rows[-1]["loss"] is None


def test_output_dir_in_use(tiny_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*--resume"):
        train(configured(tiny_run, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_output_dir_that_cannot_be_made(tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a writable directory"):
        train(configured(tiny_run, tmp_path / "file" / "run"))


def test_bad_data_leaves_no_directory(tiny_run, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        train(configured(tiny_run, tmp_path / "run", dataset=str(tmp_path / "missing.jsonl")))
    assert not (tmp_path / "run").exists()


def test_resume_needs_a_run_with_the_same_settings(tiny_run, tmp_path, finished_run):
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        train(configured(tiny_run, tmp_path, resume=True))
    with pytest.raises(UserError, match="--output-dir"):
        train(resolve_config(overrides={**tiny_run, "resume": True}))
    other = configured(tiny_run, finished_run[0], resume=True, lora_rank=8, eval_every=6, steps=STEPS)
    with pytest.raises(UserError, match=r"lora-rank was 4, is 8"):
        train(other)


def test_broken_reward_names_itself(tiny_run, tmp_path):
    config = configured(tiny_run, tmp_path / "run", reward_functions=("tests.end_to_end.rewards.broken",), eval_every=0)
    with pytest.raises(UserError, match=r"broken.*out of ideas"):
        train(config)


def test_prompt_and_completion_beyond_the_context(tiny_run, tmp_path):
    with pytest.raises(UserError, match="exceeds"):
        train(configured(tiny_run, tmp_path / "run", max_completion_length=10_000))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jgrpo.train", "--model", str(tmp_path), "--output-dir", str(tmp_path / "run")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "config.json" in done.stderr
