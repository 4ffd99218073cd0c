"""Already quantized checkpoints: values bit for bit, logits, decoding and adapters, against the formats' definitions."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.checkpoints.merged import export_merged
from jgrpo.checkpoints.names import placements
from jgrpo.config import QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.models import KVCache, Transformer
from jgrpo.quantization import Int4Weight, MixedWeight, NF4Weight, PackedWeight, dequantize, take_layer
from tests.quantized_checkpoints import FORMATS, quantize_checkpoint
from tests.tiny_checkpoints import make_checkpoint

from .conftest import (
    LORA,
    UNQUANTIZED,
    assert_same_logits,
    hidden_states,
    load_theirs,
    make_tokens,
    our_logits,
    random_adapter,
    their_logits,
    to_logits,
)

AS_STORED = QuantizationConfig()
# Unsloth's dynamic repositories keep single modules of single layers in 16 bits.
SKIP = ("layers.0.self_attn.v_proj", "layers.1.mlp.down_proj")
# Blocks of 64 inputs have to divide every matrix.
HEAD_DIM = {"gemma2": 32, "gemma3_text": 32}


def make(directory: Path, format_name: str, family: str = "llama", skip: tuple[str, ...] = ()) -> tuple[Path, Any]:
    overrides = {"head_dim": HEAD_DIM[family]} if family in HEAD_DIM else {}
    source = make_checkpoint(directory / "source", family, **overrides)
    return directory / "quantized", quantize_checkpoint(source, directory / "quantized", format_name, skip)


def dense_twin(directory: Path, values: dict[str, torch.Tensor]) -> Any:
    """transformers' model with the values of the format."""
    source = directory / "source"
    safetensors.torch.save_file(values, source / "model.safetensors", metadata={"format": "pt"})
    return load_theirs(source)


def assert_values(base: Any, config: Any, values: dict[str, torch.Tensor], dtype: Any = np.float32) -> None:
    for leaf, placed in placements(config).items():
        stored = base["layers"][leaf[1]] if leaf[0] == "layers" else base[leaf[0]]
        for placement in placed:
            own = stored if placement.layer is None else take_layer(stored, placement.layer)
            matrix = np.asarray(dequantize(own, dtype) if isinstance(own, PackedWeight) else own)
            expected = np.asarray(jnp.asarray(values[placement.name].float().numpy(), dtype))
            np.testing.assert_array_equal(matrix[placement.start : placement.stop], expected, err_msg=placement.name)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("skip", [(), SKIP], ids=["all", "skipped"])
def test_values_are_the_formats_bit_for_bit(format_name, skip, tmp_path):
    path, values = make(tmp_path, format_name, skip=skip)
    config = load_model_config(path)
    for dtype in (jnp.float32, jnp.bfloat16):
        base = load_base(path, config, AS_STORED, dtype)
        assert_values(base, config, values, dtype)
        form = NF4Weight if "nf4" in format_name else Int4Weight
        kinds = {name: type(base["layers"][name]) for name in ("qkv", "out", "gate_up", "down")}
        assert kinds == dict.fromkeys(kinds, form) | (dict.fromkeys(("qkv", "down"), MixedWeight) if skip else {})
        if form is Int4Weight:
            assert (base["layers"]["out"].zeros is None) == (format_name == "gptq-sym")
    assert_values(load_base(path, config, UNQUANTIZED, jnp.float32), config, values)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("format_name", ["nf4-double", "gptq-asym", "awq"])
def test_logits_equal_transformers_on_the_formats_values(family, format_name, tmp_path):
    path, values = make(tmp_path, format_name, family)
    config = load_model_config(path)
    base = load_base(path, config, AS_STORED)
    tokens, lengths = make_tokens()
    ours = our_logits(Transformer(config), base, {}, tokens, lengths)
    assert_same_logits(ours, their_logits(dense_twin(tmp_path, values), tokens, lengths))


def test_mixed_stacks_decode_and_train_like_dense_ones(tmp_path):
    path, _ = make(tmp_path, "nf4", skip=SKIP)
    config = load_model_config(path)
    mixed, dense = load_base(path, config, AS_STORED), load_base(path, config, UNQUANTIZED)
    model, lora = Transformer(config, LORA), random_adapter(config, LORA)
    tokens, lengths = make_tokens()
    tokens, lengths = tokens[:, :12], np.minimum(lengths, 12)

    def gradient(base):
        return jax.grad(lambda lora: (hidden_states(model, base, lora, tokens, lengths) ** 2).mean())(lora)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient(mixed), gradient(dense))
    outputs = []
    for base in (mixed, dense):
        variables = {"params": base, "lora": lora}
        hidden, kv = model.apply(variables, tokens, lengths, method="prefill")
        cache = KVCache.create(kv, lengths, 2, 3)
        step = jax.jit(functools.partial(model.apply, method="decode"))
        hidden, cache = step(variables, np.full((3, 2), 5, np.int32), cache)
        outputs.append(to_logits(model, base, hidden))
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-4)


def test_merging_into_a_quantized_checkpoint_gives_an_ordinary_one(tmp_path):
    path, _ = make(tmp_path, "nf4-double", skip=SKIP)
    config = load_model_config(path)
    base, lora = load_base(path, config, AS_STORED), random_adapter(config, LORA)
    out = export_merged(tmp_path / "merged", path, lora, LORA, config, base=base, dtype=jnp.float32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tokens, lengths = make_tokens()
    ours = our_logits(Transformer(config, LORA), base, lora, tokens, lengths)
    assert_same_logits(ours, their_logits(load_theirs(out), tokens, lengths))


def edit(path: Path, change) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("format_name", "change", "message"),
    [
        ("gptq-asym", lambda t: t.update({Q + "g_idx": t[Q + "g_idx"].flip(0)}), r"q_proj\.g_idx is not in order.*act-order"),
        ("gptq-asym", lambda t: t.pop(Q + "scales"), r"tensor .*q_proj\.scales is missing"),
        ("gptq-sym", lambda t: t.update({Q + "qweight": t[Q + "qweight"][:-1].clone()}), r"qweight has shape \[7, 64\], expected \[8, 64\]"),
        ("awq", lambda t: t.update({Q + "qzeros": t[Q + "qzeros"][:, :-1].clone()}), r"qzeros has shape \[2, 7\], expected \[2, 8\]"),
        ("nf4", lambda t: t.update({Q + "weight": t[Q + "weight"][:-1].clone()}), r"q_proj\.weight has shape \[2047, 1\]"),
        ("nf4", lambda t: t.update({Q + "weight.quant_map": torch.zeros(16)}), "is not the table of NF4"),
        ("nf4", lambda t: t.update({"extra.weight": torch.zeros(3)}), r"extra\.weight .* has no place"),
    ],
)  # fmt: skip
def test_damaged_or_unreadable_tensors_are_named(format_name, change, message, tmp_path):
    path, _ = make(tmp_path, format_name)
    edit(path, change)
    with pytest.raises(UserError, match=message):
        load_base(path, load_model_config(path), AS_STORED)


def test_blocks_that_cross_rows_are_refused(tmp_path):
    source = make_checkpoint(tmp_path / "source", "llama", intermediate_size=96)
    quantize_checkpoint(source, tmp_path / "quantized", "nf4")
    with pytest.raises(
        UserError, match=r"blocks of 64 elements of .*down_proj\.weight run over the ends of its rows of 96"
    ):
        load_base(tmp_path / "quantized", load_model_config(tmp_path / "quantized"), AS_STORED)
