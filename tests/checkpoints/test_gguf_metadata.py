"""Which models llama.cpp can run from a GGUF file; that it does run them is in tests/parity/test_llama_cpp.py."""

import dataclasses
from typing import Any

import pytest
from transformers import AutoConfig

from jgrpo.checkpoints.gguf_metadata import check_expressible, gguf_note
from jgrpo.errors import UserError
from jgrpo.models import ModelConfig, model_config_from_hf
from tests.tiny_checkpoints import FAMILIES

SIZES = dict(vocab_size=263, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2)


def config_of(family: str, **more: Any) -> ModelConfig:
    return model_config_from_hf(AutoConfig.for_model(family, **SIZES | FAMILIES[family] | more).to_dict())


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": dict(rope_type=kind, rope_theta=300.0, factor=4.0, **more)}


GEMMA = {"query_pre_attn_scalar": 24}
REFUSED = {
    "dynamic rope": ("qwen2", rope("dynamic"), "rope type 'dynamic' has no equivalent in llama.cpp's 'qwen2' models"),
    "llama3 rope elsewhere": ("qwen3", rope("llama3", low_freq_factor=1, high_freq_factor=4), "'llama3' has no equiv"),
    "yarn ramp": ("llama", rope("yarn", beta_slow=2.0), "YaRN only with beta_fast 32, beta_slow 1"),
    "partial": ("llama", rope("linear", partial_rotary_factor=0.5), "rotate whole heads"),
    "phi heads": ("phi3", {"num_attention_heads": 2, "head_dim": 24}, "need head_dim = hidden_size"),
    "bias": ("qwen3", {"attention_bias": True}, "'qwen3' models have no bias on o_proj"),
    "gemma scale": ("gemma2", {"query_pre_attn_scalar": 10}, "by the root of 24, but its query_pre_attn_scalar is 10"),
    "gemma head": ("gemma3_text", GEMMA | {"tie_word_embeddings": False}, "no head of their own"),
    "gemma cap": ("gemma3_text", GEMMA | {"final_logit_softcapping": 3.0}, "no cap on the logits"),
    "gemma windows": (
        "gemma2",
        GEMMA | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        "windows in every layer but each n-th",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_run_as_another_model_is_refused(name):
    family, more, message = REFUSED[name]
    with pytest.raises(UserError, match=f"GGUF export: .*{message}.*export 16 bits instead"):
        check_expressible(config_of(family, **more))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_families_are_expressible(family):
    check_expressible(config_of(family, **(GEMMA if "gemma" in family else {})))


def test_the_27b_gemmas_have_their_own_scale():
    config = config_of("gemma3_text", num_hidden_layers=62, query_pre_attn_scalar=16)
    check_expressible(config)  # 64 / 4 heads
    with pytest.raises(UserError, match="root of 24"):
        check_expressible(dataclasses.replace(config, num_layers=61, windows=config.windows[:61]))


def test_an_ignored_window_is_said():
    assert "ignores the sliding window of mistral models (8 positions)" in (gguf_note(config_of("mistral")) or "")
    assert "ignores the sliding window of phi3 models (40 positions)" in (gguf_note(config_of("phi3")) or "")
    assert gguf_note(config_of("gemma2", **GEMMA)) is None
    assert gguf_note(config_of("llama")) is None
