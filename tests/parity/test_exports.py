"""Merged checkpoints in four bits and in GGUF, read by others: the GPTQ layout word by word, GGUF by transformers."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jgrpo.checkpoints.gguf_file import read_gguf, write_gguf
from jgrpo.checkpoints.gptq import GPTQEncoding
from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.checkpoints.merged import export_merged, merged_rows
from jgrpo.config import QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.export import check_merged
from jgrpo.quantization import Int4Weight
from tests.tiny_checkpoints import make_checkpoint, make_tokenizer

from .conftest import (
    LORA,
    Case,
    assert_same_logits,
    build_case,
    load_theirs,
    make_tokens,
    our_logits,
    random_adapter,
    their_logits,
)

GROUP = 32


def dequantized_gptq(stored: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    """float32 [out, in] of one linear layer, element by element as in AutoGPTQ."""
    qweight, qzeros, scales, g_idx = (stored[f"{stem}.{n}"] for n in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = 8 * qweight.shape[0], qweight.shape[1]
    k, n = torch.meshgrid(torch.arange(inputs), torch.arange(outputs), indexing="ij")
    levels = (qweight[k // 8, n] >> (4 * (k % 8))) & 0xF
    zeros = ((qzeros[g_idx[k], n // 8] >> (4 * (n % 8))) & 0xF) + 1
    return ((levels - zeros).float() * scales[g_idx[k], n].float()).T.contiguous()


def test_gptq_export_is_read_word_by_word_and_by_jgrpo(family, tmp_path):
    lora, (tokens, lengths) = random_adapter(family.config, LORA), make_tokens()
    out = tmp_path / "gptq"
    export_merged(
        out,
        family.path,
        lora,
        LORA,
        family.config,
        base=family.base,
        encoding=GPTQEncoding(np.dtype(np.float32), GROUP),
    )
    stored = safetensors.torch.load_file(out / "model.safetensors")
    stems = [name.removesuffix(".qweight") for name in stored if name.endswith("qweight")]
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", 4, GROUP)
    dense = {name: value for name, value in stored.items() if not any(name.startswith(f"{stem}.q") for stem in stems)}
    dense = {k: v for k, v in dense.items() if not k.endswith(("scales", "g_idx"))}
    dense |= {f"{stem}.weight": dequantized_gptq(stored, stem) for stem in stems}
    theirs = load_theirs(family.path)
    missing, unexpected = theirs.load_state_dict(dense, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    expected = their_logits(theirs, tokens, lengths)
    base = load_base(out, family.config, QuantizationConfig())
    assert isinstance(base["layers"]["down"], Int4Weight)
    assert_same_logits(our_logits(family.model(), base, {}, tokens, lengths), expected)
    # It is base + adapter up to the rounding of four bits.
    full = our_logits(family.model(LORA), family.base, lora, tokens, lengths)
    assert np.std(expected - full) < 0.7 * np.std(full)


def test_gptq_of_an_int4_base_without_adapter_keeps_every_level(llama, tmp_path):
    base = load_base(llama.path, llama.config, QuantizationConfig(group_size=GROUP))
    encoding = GPTQEncoding(np.dtype(np.float32), GROUP)
    out = export_merged(tmp_path / "out", llama.path, {}, LORA, llama.config, base=base, encoding=encoding)
    again = load_base(out, llama.config, QuantizationConfig())
    for name in ("qkv", "out", "gate_up", "down"):
        np.testing.assert_array_equal(again["layers"][name].packed, base["layers"][name].packed)


def test_gptq_scales_of_a_bfloat16_model_are_exact_in_bfloat16(llama, tmp_path):
    # vLLM casts them to the model's dtype.
    for dtype, exact in ((torch.bfloat16, True), (torch.float16, False)):
        encoding = GPTQEncoding(jax.numpy.dtype(str(dtype).removeprefix("torch.")), GROUP)
        out = export_merged(
            tmp_path / str(dtype), llama.path, {}, LORA, llama.config, base=llama.base, encoding=encoding
        )
        stored = safetensors.torch.load_file(out / "model.safetensors")
        scales = [tensor for name, tensor in stored.items() if name.endswith("scales")]
        assert all(tensor.dtype == torch.float16 for tensor in scales)
        assert all(torch.equal(tensor, tensor.to(torch.bfloat16).to(torch.float16)) for tensor in scales) == exact


def test_gptq_of_sizes_that_do_not_divide_is_refused(tmp_path):
    path = make_checkpoint(tmp_path / "source", "llama", intermediate_size=96)
    case = dict(checkpoint=path, lora={}, lora_config=LORA)
    with pytest.raises(UserError, match=r"down_proj\.weight of shape \[64, 96\] does not divide"):
        export_merged(
            tmp_path / "out", model_config=load_model_config(path), encoding=GPTQEncoding(np.dtype("f4"), 64), **case
        )


# Neither llama.cpp nor transformers' reader of GGUF has windows in models of this architecture.
GGUF_CASES = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}, "phi3": {}}
# llama.cpp knows no other scale of Gemma's scores than head_dim's.
GGUF_CASES |= {"gemma2": {"query_pre_attn_scalar": 24}, "gemma3": {"query_pre_attn_scalar": 24}}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_is_read_by_transformers(name, tmp_path, tmp_path_factory):
    case = build_case(name, tmp_path_factory, **GGUF_CASES[name])
    lora, (tokens, lengths) = random_adapter(case.config, LORA), make_tokens()
    full = our_logits(case.model(LORA), case.base, lora, tokens, lengths)
    for kind, bound in {"F16": 5e-3, "Q8_0": 0.1, "Q4_0": 0.7}.items():
        file = tmp_path / f"{kind}.gguf"
        write_gguf(file, case.path, merged_rows(case.path, case.base, lora, LORA), case.config, kind)
        again = read_gguf(file, case.config, jax.device_put)
        ours = our_logits(case.model(), again, {}, tokens, lengths)
        assert np.std(ours - full) < bound * np.std(full)
        if kind != "Q4_0":
            # From the file's metadata transformers takes neither windows nor rotary scaling.
            config = None if name == "mistral" else AutoConfig.from_pretrained(case.path)
            theirs = AutoModelForCausalLM.from_pretrained(
                tmp_path, gguf_file=file.name, config=config, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            assert_same_logits(ours, their_logits(theirs, tokens, lengths), atol=2e-4)


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def write_plain(case: Case, file: Path) -> dict[str, Any]:
    write_gguf(file, case.path, merged_rows(case.path, case.base, {}, LORA), case.config, "Q8_0")
    return metadata(file)


def test_gguf_metadata_and_tokenizer(tmp_path, tmp_path_factory):
    case = build_case("gemma2", tmp_path_factory, query_pre_attn_scalar=24)
    found = write_plain(case, tmp_path / "model.gguf")
    expected = {
        "general.architecture": "gemma2",
        "general.file_type": 7,
        "gemma2.block_count": 3,
        "gemma2.attention.key_length": 24,
        "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.sliding_window": 8,
        "gemma2.attention.sliding_window_pattern": 2,
        "gemma2.attn_logit_softcapping": 2.0,
        "gemma2.final_logit_softcapping": 3.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.eot_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": make_tokenizer().chat_template,
    }
    assert {key: found[key] for key in expected} == expected
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == 263
    assert tokens[256] == "<|endoftext|>"
    assert found["tokenizer.ggml.token_type"][256:261] == [3, 3, 3, 3, 5]
    theirs = make_tokenizer()
    assert [tokens[i] for i in theirs.encode("a b\n")] == theirs.convert_ids_to_tokens(theirs.encode("a b\n"))


@pytest.mark.parametrize(("name", "key", "factors"), [("llama", "rope_freqs.weight", 8)])
def test_llama3_scaling_is_a_tensor_of_factors(name, key, factors, tmp_path, tmp_path_factory):
    case = build_case(name, tmp_path_factory)
    write_plain(case, tmp_path / "model.gguf")
    (stored,) = [tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors if tensor.name == key]
    assert stored.data.shape == (factors,)
    # High frequencies are kept, low ones divided by the factor of 8.
    np.testing.assert_allclose(stored.data[[0, -1]], [1.0, 8.0], rtol=1e-5)


def test_a_split_without_a_name_is_refused(tmp_path, tmp_path_factory):
    strange = build_case("qwen2", tmp_path_factory)
    tokenizer = json.loads((strange.path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (strange.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"name of the split \['x\+'\] is not known"):
        write_plain(strange, tmp_path / "model.gguf")


def test_without_the_package_the_way_out_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf.*pip install 'jgrpo\[gguf\]'"):
        write_plain(llama, tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["gptq", "Q4_0"])
def test_the_check_refuses_a_wrong_model_in_four_bits(kind, llama, tmp_path):
    lora, wrong = (random_adapter(llama.config, LORA, seed) for seed in (0, 5))
    quarter = {name: {"a": part["a"], "b": part["b"] / 4} for name, part in lora.items()}
    out = tmp_path / kind
    for adapter in (quarter, wrong):
        if kind == "gptq":
            encoding = GPTQEncoding(np.dtype(np.float32), GROUP)
            options = dict(base=llama.base, encoding=encoding)
            export_merged(tmp_path / f"{kind}{adapter is wrong}", llama.path, adapter, LORA, llama.config, **options)
        else:
            out = tmp_path / f"{kind}{adapter is wrong}"
            out.mkdir()
            rows = merged_rows(llama.path, llama.base, adapter, LORA)
            write_gguf(out / "model.gguf", llama.path, rows, llama.config, kind)
    check = check_merged(tmp_path / f"{kind}False", llama.base, quarter, LORA, llama.config, kind)
    # Rounding outweighs this adapter, and still there is no doubt that it is the one in the file.
    assert check.effect < check.difference < check.bound
    assert abs(check.share - 1) < 0.2
    with pytest.raises(UserError, match=r"merged checkpoint refused.*has -?0\.\d* times the adapter's effect"):
        check_merged(tmp_path / f"{kind}True", llama.base, quarter, LORA, llama.config, kind)
