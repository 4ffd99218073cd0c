"""What a run starts from: an adapter made elsewhere, a base quantized dynamically, a LongRoPE model beyond its pretraining."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from jgrpo.checkpoints.adapter import load_adapter
from jgrpo.checkpoints.hf import load_model_config
from jgrpo.cli import load_config, resolve_config
from jgrpo.errors import UserError
from jgrpo.training.loop import train
from tests.tiny_checkpoints import make_checkpoint


def run(tiny_run, directory, **changes):
    train(resolve_config(overrides={**tiny_run, "steps": 1, "eval_every": 0, "output_dir": str(directory), **changes}))
    return load_config(directory / "config.yaml")


@pytest.fixture(scope="module")
def peft_adapter(tiny_run, tmp_path_factory):
    """Made by PEFT, with B random, on other modules and of another rank than the run's settings."""
    out = tmp_path_factory.mktemp("peft")
    settings = PeftConfig(r=3, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "down_proj"])
    settings.init_lora_weights = False
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_run["model"]), settings).save_pretrained(out)
    return out


def test_an_adapter_made_by_peft_continues_training(tiny_run, peft_adapter, tmp_path):
    model_config = load_model_config(tiny_run["model"])
    given, lora_config = load_adapter(peft_adapter, model_config)
    saved = run(tiny_run, tmp_path / "still", adapter=str(peft_adapter), learning_rate=0.0)
    assert saved.lora == dataclasses.replace(lora_config, adapter=str(peft_adapter))
    kept, _ = load_adapter(tmp_path / "still" / "adapter", model_config)
    jax.tree.map(np.testing.assert_array_equal, kept, given)
    run(tiny_run, tmp_path / "moved", adapter=str(peft_adapter))
    moved, _ = load_adapter(tmp_path / "moved" / "adapter", model_config)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(given), strict=True))
    # A resumed run is asked with the same flags.
    run(tiny_run, tmp_path / "moved", adapter=str(peft_adapter), resume=True)


def test_an_adapter_for_another_base_is_refused(tiny_run, peft_adapter, tmp_path):
    other = make_checkpoint(tmp_path / "other", "qwen2", intermediate_size=192)
    with pytest.raises(UserError, match=r"does not fit this model: tensor .*down_proj.* expected"):
        run(tiny_run, tmp_path / "run", adapter=str(peft_adapter), model=str(other))


def test_what_dynamic_quantization_chose_is_saved_and_used_again(tiny_run, tmp_path):
    saved = run(tiny_run, tmp_path / "run", quantization="dynamic")
    assert saved.quantization.wide_matrices
    assert run(tiny_run, tmp_path / "run", quantization="dynamic", resume=True) == saved


def test_longrope_beyond_its_pretraining(tiny_run, tmp_path):
    rope = dict(rope_type="longrope", rope_theta=500.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8)
    sizes = dict(original_max_position_embeddings=16, rope_parameters=rope)
    model = make_checkpoint(tmp_path / "phi", "phi3", **sizes)
    # Rows of up to 24 positions: the sampler's cached keys and the trainer's whole rows are rotated alike.
    run(tiny_run, tmp_path / "run", model=str(model))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    gaps = [row["sampling/sampling_logp_difference/max"] for row in map(json.loads, lines) if row["step"] > 0]
    assert gaps
    assert max(gaps) < 1e-4
