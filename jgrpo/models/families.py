"""The supported families: how each `model_type` of transformers departs from Llama, as data.

A new family is an entry here, its tensor names in `jgrpo.checkpoints.names` where they differ, and an entry in
`tests/tiny_checkpoints.py`, from which every parity test follows. Models without an entry of their own that state one of
these types in `config.json` need nothing: Yi, SmolLM and DeepSeek-R1-Distill are "llama" or "qwen2", Phi-4 is "phi3".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a `model_type` fixes, and what it takes where `config.json` is silent."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_bias: str | None = None
    """Config field that decides about biases of q, k, v and o."""
    mlp_bias: str | None = None
    """Config field that decides about biases of the MLP."""
    window_always_on: bool = False
    """`sliding_window` applies to every layer without `use_sliding_window`."""
    window_pattern: int = 0
    """Where `layer_types` is missing: every n-th layer attends to everything, the others to the window; 0: no pattern."""
    fused_projections: bool = False
    """q, k, v are one module `qkv_proj`, gate and up one module `gate_up_proj`."""
    gemma: bool = False
    """Norm scales are 1 + w, norms also behind attention and MLP, embeddings times √D, scores over √query_pre_attn_scalar."""
    local_theta: str | None = None
    """Config field (of transformers 4) with the rotary base of the layers with a window, where those have their own."""
    activation_field: str = "hidden_act"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Config fields that checkpoints leave out, because transformers has these defaults."""


_GEMMA = dict(
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    sliding_window=4096,
)
_GEMMA2 = _GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
_GEMMA3 = _GEMMA | dict(
    num_attention_heads=8, num_key_value_heads=4, vocab_size=262_208, rope_theta=1e6, rope_local_base_freq=1e4
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", attention_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family("MistralForCausalLM", window_always_on=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, attention_bias="attention_bias"),
    "phi3": Family("Phi3ForCausalLM", fused_projections=True, window_always_on=True, defaults=dict(rms_norm_eps=1e-5)),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        gemma=True,
        attention_bias="attention_bias",
        window_pattern=2,
        activation_field="hidden_activation",
        defaults=_GEMMA2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        gemma=True,
        qk_norm=True,
        attention_bias="attention_bias",
        window_pattern=6,
        local_theta="rope_local_base_freq",
        activation_field="hidden_activation",
        defaults=_GEMMA3,
    ),
}
