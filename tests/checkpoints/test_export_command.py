"""`python -m jgrpo.export` on a run directory."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jgrpo.checkpoints.hf import load_model_config
from jgrpo.checkpoints.safetensors_io import read_header
from jgrpo.checkpoints.train_state import Checkpoints
from jgrpo.cli import save_config
from jgrpo.config import LoraConfig, ModelSettings, QuantizationConfig, TrainConfig
from jgrpo.errors import UserError
from jgrpo.export import export_adapter, load_adapter, main
from jgrpo.lora import init_lora

LORA = LoraConfig(lora_rank=2, lora_alpha=4.0, use_rslora=True, target_modules=("v_proj", "up_proj"))


@pytest.fixture(scope="module")
def run(pristine, tmp_path_factory):
    """A run directory with two checkpoints, and the adapter of the newer one."""
    directory = tmp_path_factory.mktemp("run")
    model_config = load_model_config(pristine)
    config = TrainConfig(
        model=ModelSettings(model=str(pristine)), quantization=QuantizationConfig(group_size=32), lora=LORA
    )
    save_config(config, directory / "config.yaml")
    lora = init_lora(jax.random.key(0), LORA, model_config)
    newer = {
        name: {"a": part["a"], "b": 0.1 * jax.random.normal(jax.random.key(i), part["b"].shape)}
        for i, (name, part) in enumerate(lora.items())
    }
    checkpoints = Checkpoints(directory / "checkpoints", keep_last=2)
    checkpoints.save(10, lora, {"step": np.int32(10)}, {})
    checkpoints.save(20, newer, {"step": np.int32(20)}, {})
    checkpoints.close()
    return directory, newer


def test_adapter_of_the_newest_checkpoint(run, pristine, tmp_path, capsys):
    directory, newer = run
    assert main(["--run", str(directory), "--output", str(tmp_path / "out")]) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    lora, lora_config = load_adapter(tmp_path / "out", load_model_config(pristine))
    assert lora_config == LORA
    jax.tree.map(np.testing.assert_array_equal, lora, newer)


def test_run_without_checkpoints_exports_its_adapter(run, pristine, tmp_path):
    directory, newer = run
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((directory / "config.yaml").read_bytes())
    export_adapter(bare / "adapter", newer, LORA, load_model_config(pristine), str(pristine))
    main(["--run", str(bare), "--output", str(tmp_path / "out")])
    lora, _ = load_adapter(tmp_path / "out", load_model_config(pristine))
    jax.tree.map(np.testing.assert_array_equal, lora, newer)


def test_merged_is_checked_and_loads(run, tmp_path, capsys):
    directory, _ = run
    flags = ["--format", "merged", "--merged-dtype", "float32", "--max-shard-gb", "0.0001"]
    main(["--run", str(directory), "--output", str(tmp_path / "out"), *flags])
    assert "merged vs base + adapter: logits differ by" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "file"), [(["gptq"], "model.safetensors"), (["gguf", "--gguf-type", "F16"], "model.gguf")]
)
def test_four_bits_and_gguf_are_checked(run, tmp_path, capsys, flags, file):
    directory, _ = run
    main(["--run", str(directory), "--output", str(tmp_path / "out"), "--format", *flags])
    assert "merged vs base + adapter: logits differ by" in capsys.readouterr().out
    assert (tmp_path / "out" / file).is_file()


def test_merging_into_the_original_equals_peft(run, pristine, tmp_path):
    directory, _ = run
    flags = ["--format", "merged", "--merge-into", "original", "--merged-dtype", "float32"]
    main(["--run", str(directory), "--output", str(tmp_path / "merged"), *flags])
    main(["--run", str(directory), "--output", str(tmp_path / "adapter")])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pristine), tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_wrong_merge_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    directory, _ = run
    # A merge with another scale than the policy's: the mistake that the check exists for.
    monkeypatch.setattr("jgrpo.export.export_merged", _with_doubled_scale())
    flags = ["--format", "merged", "--merged-dtype", "float32"]
    with pytest.raises(UserError, match=r"merged checkpoint refused, .*logits differ by"):
        main(["--run", str(directory), "--output", str(tmp_path / "out"), *flags])
    assert list(tmp_path.iterdir()) == []


def _with_doubled_scale():
    from jgrpo.checkpoints.merged import export_merged

    def export(out, checkpoint, lora, lora_config, model_config, **options):
        doubled = dataclasses.replace(lora_config, lora_alpha=2 * lora_config.lora_alpha)
        return export_merged(out, checkpoint, lora, doubled, model_config, **options)

    return export


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "onnx"], "onnx"),
        (["--format", "gguf", "--gguf-type", "Q2_K"], "Q2_K"),
        (["--max-shard-gb", "0"], "--max-shard-gb is 0"),
        (["--output", "TAKEN"], "not empty"),
        (["--run", "TAKEN"], r"no config\.yaml"),
    ],
)
def test_bad_input(run, tmp_path, flags, message):
    directory, _ = run
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    flags = [str(tmp_path / "taken") if part == "TAKEN" else part for part in flags]
    with pytest.raises(UserError, match=message):
        main(["--run", str(directory), "--output", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "jgrpo.export", "--run", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no config.yaml" in done.stderr


def test_adapter_dtype_is_float32(run, tmp_path):
    directory, _ = run
    main(["--run", str(directory), "--output", str(tmp_path / "out")])
    index = read_header(tmp_path / "out" / "adapter_model.safetensors")
    assert {info.dtype for info in index.values()} == {"F32"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"] is True
