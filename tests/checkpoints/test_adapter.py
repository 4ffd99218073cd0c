"""PEFT adapters: what is written, and adapters that cannot be used. Parity with PEFT: tests/parity."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jgrpo.checkpoints.adapter import export_adapter, load_adapter
from jgrpo.checkpoints.hf import load_model_config
from jgrpo.checkpoints.safetensors_io import read_header, read_rows, write_tensors
from jgrpo.config import LoraConfig
from jgrpo.errors import UserError
from jgrpo.lora import init_lora
from tests.tiny_checkpoints import make_checkpoint

LORA = LoraConfig(lora_rank=2, lora_alpha=4.0, target_modules=("q_proj", "down_proj"))


@pytest.fixture
def adapter(pristine, tmp_path) -> Path:
    config = load_model_config(pristine)
    lora = init_lora(jax.random.key(0), LORA, config)
    return export_adapter(tmp_path / "adapter", lora, LORA, config, str(pristine))


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


def edit_tensors(path: Path, change) -> None:
    file = path / "adapter_model.safetensors"
    tensors = {name: read_rows(info) for name, info in read_header(file).items()}
    change(tensors)
    write_tensors(file, tensors)


def test_files(adapter, pristine):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pristine)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (2, 4.0, False, 0.0)
    index = read_header(adapter / "adapter_model.safetensors")
    assert index["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (2, 128)
    assert index["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (128, 2)
    assert len(index) == 8


def test_hub_id_is_recorded_as_it_is_and_the_demo_as_its_directory(pristine, tmp_path):
    config = load_model_config(pristine)
    lora = init_lora(jax.random.key(0), LORA, config)
    for name, recorded in {"some/model": "some/model", "demo": str(Path("jgrpo/demo/model"))}.items():
        out = export_adapter(tmp_path / "again", lora, LORA, config, name, replace=True)
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"].endswith(recorded)


def test_missing_file(adapter, pristine):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_adapter(adapter, load_model_config(pristine))


def test_truncated_file(adapter, pristine):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: truncated"):
        load_adapter(adapter, load_model_config(pristine))


def test_adapter_for_another_base(adapter, tmp_path):
    wider = load_model_config(make_checkpoint(tmp_path / "wider", "qwen3", intermediate_size=192))
    with pytest.raises(
        UserError, match=r"made for .*qwen3.*down_proj\.lora_A\.weight has shape \[2, 128\], expected \[2, 192\]"
    ):
        load_adapter(adapter, wider)


def test_adapter_for_a_deeper_or_a_shallower_base(adapter, tmp_path):
    deeper = load_model_config(make_checkpoint(tmp_path / "deeper", "qwen3", num_hidden_layers=3))
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight is missing"):
        load_adapter(adapter, deeper)
    shallower = load_model_config(make_checkpoint(tmp_path / "shallower", "qwen3", num_hidden_layers=1))
    with pytest.raises(UserError, match=r"layers\.1\..* has no place"):
        load_adapter(adapter, shallower)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": None}, "r is None, expected a number"),
        ({"r": 4}, r"lora_A\.weight has shape \[2, 64\], expected \[4, 64\]"),
    ],
)
def test_unsupported_settings(adapter, pristine, change, message):
    edit_config(adapter, **change)
    with pytest.raises(UserError, match=message):
        load_adapter(adapter, load_model_config(pristine))


def test_adapter_on_another_kind_of_module(adapter, pristine):
    edit_tensors(adapter, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.zeros((2, 64), "f4")}))
    with pytest.raises(UserError, match=r"lm_head\.lora_A\.weight .*has no place"):
        load_adapter(adapter, load_model_config(pristine))
