"""The shipped checkpoint is an ordinary Hugging Face one, small, and what its documentation says it is."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jgrpo.checkpoints.hf import load_base, load_model_config, load_tokenizer
from jgrpo.config import DataConfig, QuantizationConfig, RolloutConfig
from jgrpo.data import load_prompts, pad_prompts
from jgrpo.demo import MODEL_PATH
from jgrpo.models import Transformer
from jgrpo.rewards.answers import countdown_score
from jgrpo.rollout import Prompts, generate

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_demo_model.py"


def test_it_is_at_most_four_megabytes():
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) <= 4 * 2**20


def test_transformers_loads_every_tensor_and_generates_a_solution():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(MODEL_PATH, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == "Qwen2ForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    example = load_prompts(DataConfig(), tokenizer, "test").example(0)
    ids = torch.tensor([example.token_ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=128)
    assert out[0, -1] == tokenizer.eos_token_id
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert countdown_score(text, example.columns["nums"], example.columns["target"]) > 0


def test_quantized_it_knows_the_format_and_often_gives_up():
    tokenizer, config = load_tokenizer("demo"), load_model_config("demo")
    base = load_base("demo", config, QuantizationConfig())
    examples = load_prompts(DataConfig(), tokenizer, "test").examples[:128]
    prompts = Prompts(*pad_prompts(examples, 16, tokenizer.pad_token_id))
    sampling = RolloutConfig(num_generations=2, max_completion_length=128)
    ends = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    rollout = generate(Transformer(config), base, {}, prompts, jax.random.key(0), sampling, **ends)
    texts = tokenizer.batch_decode(np.asarray(rollout.completion_tokens).reshape(256, -1), skip_special_tokens=True)
    columns = [example.columns for example in examples for _ in range(2)]
    scores = np.array([countdown_score(t, c["nums"], c["target"]) for t, c in zip(texts, columns, strict=True)])
    assert np.mean(scores > 0) > 0.95, "an answer is there"
    assert 0.15 < np.mean(scores == 1) < 0.5, "and seldom the right one: that is what the demo improves"


@pytest.fixture
def build(monkeypatch):
    spec = importlib.util.spec_from_file_location("build_demo_model", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(output, *flags):
        monkeypatch.setattr(sys, "argv", ["build_demo_model", "--output", str(output), *flags])
        script.main()
        return {path.name: path.read_bytes() for path in output.iterdir()}

    return run


def test_the_same_seed_builds_the_same_files(build, tmp_path):
    tiny = ("--batches", "2", "--tokens-per-batch", "256", "--layers", "1", "--mlp-width", "64")
    first, again, other = (
        build(tmp_path / name, *tiny, "--seed", seed) for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == other["tokenizer.json"] == (MODEL_PATH / "tokenizer.json").read_bytes()


def test_the_build_defaults_are_those_of_the_shipped_model(build, tmp_path):
    config = json.loads((MODEL_PATH / "config.json").read_text())
    built = json.loads(build(tmp_path / "a", "--batches", "1", "--tokens-per-batch", "256")["config.json"])
    assert built == config
