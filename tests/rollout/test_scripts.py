"""The example and the benchmark run as a user runs them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jgrpo.checkpoints.adapter import export_adapter
from jgrpo.checkpoints.hf import load_model_config
from jgrpo.config import LoraConfig
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer, init_base
from jgrpo.rollout.weights import WeightsPlan, merged_bytes
from tests.tiny_checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def test_example_compares_base_and_adapter(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama")
    config = load_model_config(model)
    lora = jax.tree.map(lambda x: x + 0.1, init_lora(jax.random.key(0), LoraConfig(lora_rank=4), config))
    adapter = export_adapter(tmp_path / "adapter", lora, LoraConfig(lora_rank=4), config, str(model))
    flags = ["--model", str(model), "--adapter", str(adapter), "--max-completion-length", "12"]
    out = run("examples/generate_with_adapter.py", *flags, "--prompt", "one", "--prompt", "two")
    assert out.count("prompt : ") == 2
    base, tuned = (out.split(f"{name}: ")[1].split("\n")[0] for name in ("base   ", "adapter"))
    assert base != tuned


def test_bench_prints_json_and_a_table() -> None:
    flags = "--preset tiny --dtype float32 --kv int8 --prompts 2 --group 2 --prompt-len 4 --new-tokens 9 --runs 1"
    more = "--weights int4 bf16 --lengths lognormal --bandwidth 0.01 --tflops 0.01 --gap --microbatch-size 2"
    lines = run("scripts/bench_rollout.py", *flags.split(), *more.split())
    first, other, row = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    assert (other["weights"], row["weights"]) == ("int4", "bf16")
    assert other["bound_tokens_per_s"] != row["bound_tokens_per_s"]  # no adapter beside the copy
    assert other["int4_bound_tokens_per_s"] == row["int4_bound_tokens_per_s"] > other["bound_tokens_per_s"]
    assert 1e-4 < row["gap_mean"] < row["gap_max"] < 0.1  # a cache of int8
    assert row["compile_s"] > 0
    assert first["device"] == jax.devices()[0].device_kind
    assert row["sequences"] == 4
    assert 0 < row["fraction"] < 1
    column = lines.splitlines()[-4].split().index("tokens_per_s")
    assert lines.splitlines()[-1].split()[column] == str(row["tokens_per_s"])


def test_the_bench_counts_the_head_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a copy that has one in 8 bits its own; a tied embedding then is only looked up in, and the stored head for a few rows."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    count = runpy.run_path(str(ROOT / "scripts" / "bench_rollout.py"))["step_weight_bytes"]
    for tied in (False, True):
        config = ModelConfig("llama", 256, 64, 128, 1, 2, 1, 32, tie_embeddings=tied)
        model, base = Transformer(config), init_base(jax.random.key(0), config)
        layers, head, norm = sum(leaf.nbytes for leaf in jax.tree.leaves(base["layers"])), 4 * 256 * 64, 4 * 64
        assert count(model, base, WeightsPlan(None, "")) == layers + head + norm
        assert count(model, base, WeightsPlan("bf16", "")) == merged_bytes(model) + head + norm
        assert count(model, base, WeightsPlan("int8", "")) == merged_bytes(model, "int8") + head + norm
        assert count(model, base, WeightsPlan("int8", "", True)) == merged_bytes(model, "int8", head=True) + norm


def test_the_start_is_measured_cold_and_warm(tmp_path: Path) -> None:
    flags = "--preset tiny --weights bf16 --prompts 1 --group 2 --prompt-len 4 --new-tokens 3"
    lines = run("scripts/measure_start.py", *flags.split(), "--cache", str(tmp_path)).splitlines()
    cold, warm = map(json.loads, lines)
    assert (cold["state"], warm["state"]) == ("cold", "warm")
    assert (cold["hits"], warm["misses"]) == (0, 0)
    assert cold["misses"] == warm["hits"] > 0
    for row in (cold, warm):
        parts = sum(row[name] for name in ("import", "context", "load", "trace", "triton", "xla", "run"))
        assert abs(parts - row["total"]) < 0.1


def test_overlapping_spans_count_once() -> None:
    covered = runpy.run_path(str(ROOT / "scripts" / "measure_start.py"))["covered"]
    assert covered([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5), (0.5, 1.0)]) == 3.5


def test_speculation_is_replayed() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "measure_speculation.py"))
    group = script["Group"]([1, 2, 3, 4], [[9, 1, 2, 3, 4, 5], [9, 1, 2, 7]])
    # 9, 1 and 2 come without a draft or with none that counts; behind 1, 2 the prompt drafts 3, 4, which is right once.
    own = script["replay"]([group], 2, 2, False)
    assert (own.tokens, own.steps, own.drafted, own.accepted_first) == (10, 8, 2, 1)
    assert own.first == [(0, 3, 3), (1, 3, 3)]
    # The second completion sees what the first has so far, not what it will have.
    texts = [[5, 6, 7, 5, 6], [5, 6, 8, 9]]
    assert list(script["find_draft"](texts, [5, 6], 3)) == [7, 5, 6]
    assert list(script["find_draft"]([[1, 5, 6], *texts[1:]], [5, 6], 3)) == [8, 9]
    assert [script["step_ms"](rows, {64: 2.0, 256: 4.0, 512: 8.0}) for rows in (64, 160, 512, 1024)] == [2, 3, 8, 16]


def test_speculation_prints_a_row_for_every_draft() -> None:
    flags = "--prompts 2 --group 2 --new-tokens 24 --ngram 2 --draft 1 3 --rows 64 --check"
    lines = run("scripts/measure_speculation.py", *flags.split()).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| 2 ")]
    assert [(row[1], row[2]) for row in rows] == [("1", "no"), ("1", "yes"), ("3", "no"), ("3", "yes")]
    assert all(float(row[5]) >= 1 for row in rows)
    assert [json.loads(line)["draft"] for line in lines if "break_even" in line] == [1, 3]


def test_bench_step_tracks_memory_over_steps_of_other_lengths() -> None:
    shape = "--preset tiny --dtype float32 --prompts 2 --num-generations 4 --microbatch-size 2 --prompt-length 8"
    more = "--max-completion-length 256 --lengths lognormal --length-buckets 2 --track-memory --steps 3"
    out = run("scripts/bench_step.py", *shape.split(), *more.split())
    _, *steps, growth = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [step["number"] for step in steps] == [1, 2, 3]
    assert len({step["tokens"] for step in steps}) > 1
    assert all(step["useful_fraction"] <= step["computed_fraction"] <= 1 for step in steps)
    assert any(step["computed_fraction"] < 1 for step in steps)
    assert steps[0]["compiled"] > 0
    assert (growth["compiled"], growth["live_arrays"]) == (0, 0)
