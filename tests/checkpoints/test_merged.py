"""Merged checkpoints: files, shards, full disks. Their logits: tests/parity."""

import json
import os
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.checkpoints.merged import export_merged
from jgrpo.config import LoraConfig, QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.lora import init_lora

from .conftest import BIG

LORA = LoraConfig(lora_rank=2, lora_alpha=4.0)


def merge(checkpoint, out, **options):
    config = load_model_config(checkpoint)
    lora = init_lora(jax.random.key(0), LORA, config)
    return export_merged(out, checkpoint, lora, LORA, config, **options)


def test_files_shards_and_dtype(pristine, tmp_path):
    out = merge(pristine, tmp_path / "out", max_shard_bytes=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert {s.name for s in shards} == set(index["weight_map"].values())
    assert len(shards) > 3
    assert all(s.stat().st_size < 70_000 for s in shards)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {p.name for p in pristine.iterdir() if not p.name.startswith("model")}
    assert expected <= {p.name for p in out.iterdir()}
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(info.values())
    assert model.generation_config.eos_token_id == [258, 256]
    assert AutoTokenizer.from_pretrained(out).encode("hi") == [104, 105]


def test_one_file_where_it_fits(pristine, tmp_path):
    out = merge(pristine, tmp_path / "out")
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (out / "model.safetensors.index.json").exists()


def test_adapter_of_zero_gives_the_original_weights(pristine, tmp_path):
    out = merge(pristine, tmp_path / "out", dtype=jnp.float32)
    theirs = AutoModelForCausalLM.from_pretrained(pristine).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert theirs.keys() == merged.keys()
    assert all(torch.equal(theirs[name], merged[name]) for name in theirs)


def test_full_disk_leaves_nothing(pristine, tmp_path, full_disk):
    with pytest.raises(UserError, match=r"cannot write .*out"):
        merge(pristine, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_too_small_a_disk_is_refused_before_writing(pristine, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.00 GB, 0\.00 GB are free"):
        merge(pristine, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_refused_by_verify_leaves_nothing(pristine, tmp_path):
    def verify(directory):
        assert (directory / "model.safetensors").is_file()
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        merge(pristine, tmp_path / "out", verify=verify)
    assert os.listdir(tmp_path) == []


def test_host_memory_is_about_one_matrix(big, tmp_path):
    config = load_model_config(big)
    base = load_base(big, config, QuantizationConfig(), jnp.bfloat16)
    lora = init_lora(jax.random.key(0), LORA, config)
    tracemalloc.start()
    export_merged(tmp_path / "out", big, lora, LORA, config, base=base)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 200e6
    largest = 2 * BIG["vocab_size"] * BIG["hidden_size"]
    assert peak < 1.5 * largest
