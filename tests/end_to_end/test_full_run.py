"""Runs that train the whole model: the directory, exact resume, and what the other commands make of them."""

import importlib
import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jgrpo import evaluate, export, sft, train
from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.checkpoints.train_state import load_adapter
from jgrpo.cli import load_config, resolve_config
from jgrpo.config import QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.export import load_run_adapter
from jgrpo.lora import WEIGHTS
from jgrpo.models import Transformer
from jgrpo.sft_config import SftConfig
from jgrpo.training.loop import Run, Stopped
from jgrpo.training.loop import train as train_as_configured
from tests.training.setup import assert_trees_equal

WALL_TIME = ("time/", "throughput/", "memory/", "step_time")


def configured(settings, output_dir, **changes):
    values = {**settings, "lora": None, "quantization": "none", "optimizer_bits": 8, "learning_rate": 3e-3}
    return resolve_config(overrides={**values, "steps": 3, "eval_every": 0, "output_dir": str(output_dir), **changes})


def metrics_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(WALL_TIME)} for row in rows]


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A run with a reference, through the command line."""
    directory = tmp_path_factory.mktemp("full") / "run"
    values = {**tiny_run, "steps": 3, "eval_every": 0, "beta": 0.05, "optimizer_bits": 8, "learning_rate": 3e-3}
    flags = [
        part
        for name, value in values.items()
        for part in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,)))
    ]
    assert train.main([*flags, "--lora", "null", "--quantization", "none", "--output-dir", str(directory)]) in (0, None)
    return directory


def test_run_directory(finished, tiny_run):
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model", "report.html"} <= {
        p.name for p in finished.iterdir()
    }
    assert not (finished / "adapter").exists()
    config = load_config(finished / "config.yaml")
    assert config.lora.lora is None
    assert metrics_of(finished)[0]["kl"] == 0
    assert metrics_of(finished)[-1]["kl"] > 0
    _, trained = load_adapter(finished / "checkpoints")
    start = load_base(tiny_run["model"], load_model_config(tiny_run["model"]), config.quantization)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained[WEIGHTS], start)
    assert min(jax.tree.leaves(moved)) > 0


def test_model_has_the_same_logits_in_transformers(finished):
    shape = load_model_config(finished / "model")
    _, trained = load_adapter(finished / "checkpoints")
    tokens = np.random.default_rng(0).integers(0, 250, (2, 9))
    model, weights = Transformer(shape), trained[WEIGHTS]
    hidden = model.apply({"params": weights}, tokens, np.array([9, 9]))
    ours = model.apply({"params": weights}, hidden, method="logits")
    theirs = AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(tokens)).logits.numpy(), atol=1e-4)


def test_stopped_and_resumed_is_uninterrupted(tiny_run, finished, tmp_path, monkeypatch):
    config = configured(tiny_run, tmp_path / "run", beta=0.05, save_every=1)
    whole = Run._step

    def interrupted(run, step):
        whole(run, step)
        if step == 2:
            run.signals.received = 15

    monkeypatch.setattr(Run, "_step", interrupted)
    with pytest.raises(Stopped):
        train_as_configured(config)
    monkeypatch.setattr(Run, "_step", whole)
    train_as_configured(configured(tiny_run, tmp_path / "run", beta=0.05, save_every=1, resume=True))
    assert metrics_of(tmp_path / "run") == metrics_of(finished)
    one, other = (load_adapter(directory / "checkpoints")[1] for directory in (tmp_path / "run", finished))
    assert_trees_equal(one, other)


def test_evaluate_compares_it_with_the_start(finished, capsys):
    flags = ["--run", str(finished), "--samples", "0", "--eval-prompts", "3"]
    assert evaluate.main(flags) == 0
    shown = capsys.readouterr().out
    assert "trained - base, greedy" in shown


def test_generate_samples_the_trained_weights(finished, capsys):
    flags = ["--prompt", "question", "--plain", "--max-completion-length", "6", "--temperature", "0"]
    texts = []
    for source in (["--run", str(finished)], ["--model", str(finished / "model"), "--quantization", "none"]):
        assert importlib.import_module("jgrpo.generate").main([*source, *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_export(finished, tmp_path, capsys):
    with pytest.raises(UserError, match="no adapter to export: take --format merged"):
        export.main(["--run", str(finished), "--output", str(tmp_path / "adapter")])
    merged = tmp_path / "merged"
    assert (
        export.main(
            ["--run", str(finished), "--output", str(merged), "--format", "merged", "--merged-dtype", "float32"]
        )
        == 0
    )
    assert "written vs trained model: logits differ by" in capsys.readouterr().out
    shape, exact = load_model_config(merged), QuantizationConfig(quantization="none")
    assert_trees_equal(load_base(merged, shape, exact), load_adapter(finished / "checkpoints")[1][WEIGHTS])
    (tmp_path / "copy").mkdir()
    for name in ("config.yaml", "model"):
        (tmp_path / "copy" / name).symlink_to(finished / name)
    weights, _ = load_run_adapter(tmp_path / "copy", load_config(finished / "config.yaml"), shape)
    assert_trees_equal(weights, load_adapter(finished / "checkpoints")[1])


def test_supervised_run(tiny_run, tmp_path):
    rows = [{"prompt": f"say {word}:", "completion": word} for word in ("red", "blue")]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--model",
        tiny_run["model"],
        "--dataset",
        data,
        "--eval-dataset",
        data,
        "--lora",
        "null",
        "--quantization",
        "none",
    ]
    flags += [
        "--max-length",
        "40",
        "--rows-per-step",
        "2",
        "--microbatch-rows",
        "1",
        "--steps",
        "12",
        "--tensorboard",
        "false",
    ]
    assert sft.main(list(map(str, [*flags, "--learning-rate", "3e-3", "--output-dir", tmp_path / "run"]))) == 0
    losses = [row["eval_loss"] for row in metrics_of(tmp_path / "run") if "eval_loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert load_config(tmp_path / "run" / "config.yaml", SftConfig).lora.lora is None
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization": "int4"},
            "--lora null trains the model's own weights, which --quantization int4 would freeze: add --quantization none",
        ),
        ({"algorithm": "ppo"}, "--algorithm ppo with --lora null"),
        ({"adapter": "somewhere"}, "there is no adapter to start from it"),
        ({"lora_dropout": 0.1}, "--lora-dropout 0.1 with --lora null"),
        ({"reference_adapter": "somewhere"}, "Leave --reference-adapter out"),
    ],
)
def test_settings_of_an_adapter_are_refused(tiny_run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        configured(tiny_run, tmp_path / "run", **changes)
