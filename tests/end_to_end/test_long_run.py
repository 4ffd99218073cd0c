"""50 steps whose completions have ever other lengths: nothing is compiled after the first two, and nothing grows."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jgrpo.cli import resolve_config
from jgrpo.training import loop
from jgrpo.training.guards import CompileCounter

STEPS, WARM = 50, 2
HOST_GROWTH = 40e6
"""Bytes that the process may grow by in 30 steps: Python's and XLA's pools settle; one rollout's cache a step would be 200 MB."""


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def steps(tiny_run, tmp_path_factory):
    """Of every step: compilations so far, arrays alive and their bytes, the process's size, and completion lengths (a copy)."""
    seen, compilations = [], CompileCounter()

    class Watched(loop.Run):
        def _report(self, step, values, experience, batch):
            super()._report(step, values, experience, batch)
            alive = jax.live_arrays()
            arrays = len(alive), sum(array.nbytes for array in alive)
            seen.append((compilations.count, *arrays, resident_bytes(), np.array(experience.lengths).ravel()))

    settings = {
        **tiny_run,
        "steps": STEPS,
        "output_dir": str(tmp_path_factory.mktemp("long") / "run"),
        # 64 rows, which may shrink to 32, and microbatches that are packed into one of two sizes.
        "prompts_per_step": 8,
        "num_generations": 8,
        "microbatch_size": 16,
        "max_completion_length": 32,
        "length_buckets": 2,
        "stop_token_ids": tuple(range(3, 12)),
        "eval_every": 10,
        "save_every": 20,
        "log_completions_every": 10,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Run", Watched)
        loop.train(resolve_config(overrides=settings))
    compilations.close()
    return seen


def test_lengths_vary(steps):
    """Or the rest would say nothing: tails short and long, and batches on both sides of a bucket's bound."""
    lengths = [step[4] for step in steps]
    assert len({int(step.sum()) for step in lengths}) > STEPS / 2
    shrinks = [int((step > 31).sum()) <= 32 for step in lengths]
    assert any(shrinks)
    halves = {int(rows.sum() > 16 * 32 / 2) for step in lengths for rows in step.reshape(-1, 16)}
    assert halves == {0, 1}


def test_nothing_is_compiled_after_the_second_step(steps):
    compiled = [step[0] for step in steps]
    assert compiled[0] > 0
    assert compiled[-1] == compiled[WARM - 1]


def test_nothing_grows_on_the_device_or_the_host(steps):
    # An evaluation or a save leaves its last arrays behind: steps with and without compare with their like.
    for start in (9, 10):
        assert {step[1:3] for step in steps[start::10]} == {steps[start][1:3]}
    assert steps[-1][3] - steps[19][3] < HOST_GROWTH
