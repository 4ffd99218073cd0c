"""Loading: sharded and single files, dtypes, memory, and every way a checkpoint can be wrong."""

import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from jgrpo.checkpoints import hf, transfer
from jgrpo.checkpoints.hf import load_base, load_model_config, resolve_checkpoint
from jgrpo.checkpoints.names import modules_of
from jgrpo.checkpoints.transfer import PIECE_BYTES
from jgrpo.config import QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.models import base_shapes, model_config_from_hf
from jgrpo.quantization import Int4Weight
from tests.tiny_checkpoints import make_checkpoint

from .conftest import BIG

UNQUANTIZED = QuantizationConfig(quantization="none")


def load(path: Path, quantization: QuantizationConfig = UNQUANTIZED, dtype=jnp.float32):
    return load_base(path, load_model_config(path), quantization, dtype)


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(path: Path, change) -> None:
    """Apply `change` to the dictionary of all tensors and save them as one file."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink()
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors")


def test_shapes_are_those_of_the_model(pristine):
    base, shapes = load(pristine), base_shapes(load_model_config(pristine))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), base) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_sharded_and_single_file_are_the_same(pristine, checkpoint):
    assert len(list(pristine.glob("*.safetensors"))) > 2
    edit_tensors(checkpoint, lambda tensors: None)
    jax.tree.map(np.testing.assert_array_equal, load(checkpoint), load(pristine))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_config_of_transformers_4_is_read_alike(tmp_path, family):
    path = make_checkpoint(tmp_path, family)
    expected = load_model_config(path)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (path / "config.json").write_text(json.dumps(config))
    assert load_model_config(path) == expected


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(tmp_path, stored):
    path = make_checkpoint(tmp_path, "qwen2", dtype=stored)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    base = load(path)
    np.testing.assert_array_equal(base["embed"], tensors["model.embed_tokens.weight"].float())
    assert load(path, dtype=jnp.bfloat16)["embed"].dtype == jnp.bfloat16
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"].float() for name in "qkv")
    np.testing.assert_array_equal(base["layers"]["qkv"][1], torch.cat([q, k, v]))


def test_quantized_base_does_not_depend_on_the_compute_dtype(tmp_path):
    path = make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16)
    quantization = QuantizationConfig(group_size=32)
    narrow, wide = load(path, quantization, jnp.bfloat16), load(path, quantization, jnp.float32)
    assert isinstance(narrow["layers"]["down"], Int4Weight)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda x: x.astype(jnp.float32), narrow),
        jax.tree.map(lambda x: x.astype(jnp.float32), wide),
    )


def traced_load(path, quantization: str) -> tuple[int, int]:
    """(bytes of the base, peak of what Python and NumPy allocate while it is loaded)."""
    tracemalloc.start()
    base = load_base(path, model_config_from_hf(BIG), QuantizationConfig(quantization=quantization), jnp.bfloat16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return sum(leaf.nbytes for leaf in jax.tree.leaves(base)), peak


@pytest.mark.parametrize("quantization", ["int4", "none"])
def test_host_holds_one_layer_and_no_transfer_is_large(big, quantization, monkeypatch):
    """As on a GPU: arrays are copied into memory that `tracemalloc` does not see, so that it counts those of the host."""
    sizes = []

    def copy(host):
        sizes.append(host.nbytes)
        return jnp.array(host, copy=True)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_put", copy)
    result, peak = traced_load(big, quantization)
    assert sum(sizes) == result
    assert max(sizes) <= PIECE_BYTES
    largest = 2 * BIG["vocab_size"] * BIG["hidden_size"]  # the embedding, in 16 bits; a layer is smaller
    assert peak < largest + 8e6 < 0.7 * result


@pytest.mark.parametrize("quantization", ["int4", "none"])
def test_peak_memory_on_a_cpu_is_the_result_and_one_tensor(big, quantization):
    size = (big / "model.safetensors").stat().st_size
    assert size > 200e6
    result, peak = traced_load(big, quantization)
    largest = 2 * BIG["vocab_size"] * BIG["hidden_size"]
    assert peak < result + largest
    if quantization == "int4":
        # Without streaming the 16-bit weights would be there at some time.
        assert peak < 0.6 * size


@pytest.mark.parametrize("mode", ["none", "int4", "dynamic"])
def test_pieces_make_the_same_base(tmp_path, mode, monkeypatch):
    wide = ("1.gate_up=int8", "0.down=dense") if mode == "dynamic" else ()
    quantization = QuantizationConfig(mode, group_size=32, wide_matrices=wide)
    path = make_checkpoint(tmp_path, "qwen2", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    expected = load(path, quantization)
    moved = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hf, "PIECE_BYTES", 1500)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 1500)
    monkeypatch.setattr(hf, "insert", lambda *args, **place: moved.append(place) or transfer.insert(*args, **place))
    jax.tree.map(np.testing.assert_array_equal, load(path, quantization), expected)
    assert {"layer": 3} in moved


class TestBadInput:
    def test_missing_shard(self, checkpoint):
        (checkpoint / "model-00002-of-00006.safetensors").unlink()
        with pytest.raises(UserError, match=r"shard model-00002-of-00006\.safetensors is missing \(1 of 6\)"):
            load(checkpoint)

    def test_truncated_shard(self, checkpoint):
        file = checkpoint / "model-00002-of-00006.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"model-00002-of-00006\.safetensors: truncated"):
            load(checkpoint)

    def test_shard_without_a_tensor_of_the_index(self, checkpoint):
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        shards = set(index["weight_map"].values())
        right = index["weight_map"]["model.norm.weight"]
        index["weight_map"]["model.norm.weight"] = next(iter(shards - {right}))
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"tensor model\.norm\.weight is not in the file"):
            load(checkpoint)

    def test_no_weights(self, checkpoint):
        for file in checkpoint.glob("model*"):
            file.unlink()
        (checkpoint / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(UserError, match=r"neither model\.safetensors.*pytorch_model\.bin is a pickle"):
            load(checkpoint)

    def test_no_config(self, checkpoint):
        (checkpoint / "config.json").rename(checkpoint / "adapter_config.json")
        with pytest.raises(UserError, match=r"no config\.json.*PEFT adapter"):
            load(checkpoint)

    def test_broken_config(self, checkpoint):
        (checkpoint / "config.json").write_text('{"model_type": ')
        with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
            load(checkpoint)

    def test_wrong_architecture(self, checkpoint):
        edit_config(checkpoint, model_type="qwen3_moe")
        with pytest.raises(UserError, match=r"qwen3_moe.*llama, mistral, phi3, qwen2, qwen3.*nearest: qwen3"):
            load(checkpoint)

    @pytest.mark.parametrize(
        ("scheme", "words"),
        [
            ({"quant_method": "fp8"}, "the scheme 'fp8'"),
            ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "gptq of 8 bits"),
            ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
            ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv'"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ],
    )
    def test_a_quantization_scheme_that_is_not_read(self, checkpoint, scheme, words):
        edit_config(checkpoint, quantization_config=scheme)
        with pytest.raises(UserError, match=rf"{words}, which jgrpo does not read \(it reads .*\); give the 16-bit"):
            load(checkpoint)

    def test_missing_tensor(self, checkpoint):
        edit_tensors(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing.*\[128, 64\]"):
            load(checkpoint)

    def test_wrong_shape(self, checkpoint):
        edit_config(checkpoint, vocab_size=300)
        expected = r"model\.embed_tokens\.weight has shape \[263, 64\], expected \[300, 64\]"
        with pytest.raises(UserError, match=expected):
            load(checkpoint)

    def test_unknown_tensor(self, checkpoint):
        edit_tensors(checkpoint, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}))
        with pytest.raises(UserError, match=r"q_proj\.bias .*has no place in a qwen3 model"):
            load(checkpoint)

    def test_tied_head_that_differs(self, tmp_path):
        path = make_checkpoint(tmp_path, "qwen2")
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        expected = load(path)
        head = tensors["model.embed_tokens.weight"].clone()
        safetensors.torch.save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, load(path), expected)
        head[-1, 0] += 1
        safetensors.torch.save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
        with pytest.raises(UserError, match=r"lm_head\.weight differs from .*set tie_word_embeddings to false"):
            load(path)

    def test_integer_weights(self, checkpoint):
        edit_tensors(checkpoint, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
        with pytest.raises(UserError, match=r"lm_head\.weight is I8, expected one of F32"):
            load(checkpoint)

    def test_group_size_that_does_not_divide(self, tmp_path):
        path = make_checkpoint(tmp_path, "llama", intermediate_size=96)
        with pytest.raises(UserError, match=r"group_size 64 .* width 96 of down_proj; use group_size 32, or add them"):
            load(path, QuantizationConfig(group_size=64))
        load(path, QuantizationConfig(group_size=64, skip_modules=("down_proj",)))

    def test_unknown_skip_module(self, pristine):
        with pytest.raises(UserError, match=r"'gate' is not a module \(did you mean 'gate_proj'"):
            load(pristine, QuantizationConfig(skip_modules=("gate",)))


class TestResolve:
    @pytest.mark.parametrize("model", ["/no/such/directory", "./nowhere/at/all", "not an id"])
    def test_neither_a_directory_nor_an_id(self, model):
        with pytest.raises(UserError, match="no such directory, and not a hub id"):
            resolve_checkpoint(model)

    def test_offline(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(UserError, match=r"'some/model'.*hub could not be reached.*path of a downloaded checkpoint"):
            resolve_checkpoint("some/model")

    def test_file(self, pristine):
        with pytest.raises(UserError, match="is a file; expected the directory"):
            resolve_checkpoint(pristine / "config.json")

    def test_demo_is_packaged(self):
        assert resolve_checkpoint("demo").parts[-3:] == ("jgrpo", "demo", "model")


def test_fused_partners_and_tied_heads_share_a_leaf(pristine, tmp_path):
    config = load_model_config(pristine)
    assert modules_of(("layers", "gate_up"), config) == {"gate_proj", "up_proj"}
    assert modules_of(("embed",), config) == {"embed_tokens"}
    tied = load_model_config(make_checkpoint(tmp_path, "qwen2"))
    assert modules_of(("embed",), tied) == {"embed_tokens", "lm_head"}
