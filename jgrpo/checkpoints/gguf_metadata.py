"""A model's settings in GGUF's keys, and which models llama.cpp can run from them.

Facts from llama.cpp's loaders (https://github.com/ggml-org/llama.cpp, src/models/*.cpp): what a file cannot tell them, because
an architecture has no key for it or its graph does not look at the tensor, is refused here, or it would run as another
model without a word. The one exception is a sliding window that llama.cpp ignores: `gguf_note` says so.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jgrpo.errors import UserError
from jgrpo.models import ModelConfig, RopeConfig
from jgrpo.models.rope import inverse_frequencies

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}
"""llama.cpp's names of the families that it calls differently."""
_WINDOWED = ("gemma2", "gemma3")
"""Architectures whose windows llama.cpp applies."""
_ROPE_KINDS = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "phi3": ("default", "linear", "longrope"),
    "gemma2": ("default", "linear"),
    "gemma3": ("default", "linear"),
}
"""Rotary scaling that an architecture's graph applies."""
_YARN = (32.0, 1.0, True)
"""The ramp that llama.cpp computes: it has keys for another one, but its loaders of these architectures do not read them."""
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_ROPE_TENSORS = ("FREQS", "FACTORS_LONG", "FACTORS_SHORT")


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the family."""
    return _ARCHITECTURES.get(config.family, config.family)


def gguf_note(config: ModelConfig) -> str | None:
    """What llama.cpp will do otherwise than the model; None where it does the same."""
    if architecture(config) not in _WINDOWED and (windows := [w for w in config.windows if w]):
        return f"note: llama.cpp ignores the sliding window of {config.family} models ({max(windows)} positions)"
    return None


def check_expressible(config: ModelConfig) -> None:
    """UserError where llama.cpp would run the model as another one."""
    name = architecture(config)
    if config.rope.kind not in _ROPE_KINDS[name]:
        _refuse(f"rope type {config.rope.kind!r} has no equivalent in llama.cpp's {name!r} models")
    if config.rope.kind == "yarn" and (config.rope.beta_fast, config.rope.beta_slow, config.rope.truncate) != _YARN:
        _refuse("llama.cpp knows YaRN only with beta_fast 32, beta_slow 1 and whole dimensions")
    if config.rope.partial != 1 and name != "phi3":
        _refuse(f"llama.cpp's {name!r} models rotate whole heads, but partial_rotary_factor is {config.rope.partial}")
    if name == "phi3" and config.num_heads * config.head_dim != config.hidden_size:
        _refuse("llama.cpp's 'phi3' models need head_dim = hidden_size / num_attention_heads")
    if config.out_bias and name != "llama":
        _refuse(f"llama.cpp's {name!r} models have no bias on o_proj")
    if name in _WINDOWED:
        _check_gemma(config, name)


def _check_gemma(config: ModelConfig, name: str) -> None:
    width = config.hidden_size // config.num_heads if config.num_layers == _LAYERS_OF_27B[name] else config.head_dim
    if abs(config.score_scale * width**0.5 - 1) > 1e-6:
        _refuse(
            f"llama.cpp divides the attention scores of this {name!r} model by the root of {width}, but its "
            f"query_pre_attn_scalar is {config.score_scale**-2:g}"
        )
    if not config.tie_embeddings:
        _refuse(f"llama.cpp's {name!r} models have no head of their own, but tie_word_embeddings is false")
    if _window_period(config) is None:
        _refuse(f"llama.cpp knows windows in every layer but each n-th, not {config.windows}")
    if name == "gemma3" and config.logit_softcap is not None:
        _refuse("llama.cpp's 'gemma3' models have no cap on the logits, but final_logit_softcapping is set")
    if config.local_rope is not None and config.local_rope.kind != "default":
        _refuse("llama.cpp knows no rotary scaling in layers with a window")


def _refuse(reason: str) -> None:
    raise UserError(f"GGUF export: {reason}; export 16 bits instead (--format merged)")


def _window_period(config: ModelConfig) -> int | None:
    """n where every n-th layer attends to everything and the others to the window; 0: all to the window; None: neither."""
    full = [layer for layer, window in enumerate(config.windows) if window is None]
    period = full[0] + 1 if full else 0 if config.windows else 1
    expected = [layer for layer in range(len(config.windows)) if period and (layer + 1) % period == 0]
    return period if full == expected else None


def add_metadata(gguf: Any, writer: Any, config: ModelConfig, kind: str) -> None:
    """Everything but the tokenizer and the name; `kind` is "F16", "Q8_0" or "Q4_0"."""
    files = {"F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[files[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(config.head_dim * config.rope.partial))
    writer.add_rope_freq_base(config.rope.theta)
    if architecture(config) in _WINDOWED:
        _add_gemma(writer, config)
    _add_rope_scaling(gguf, writer, config.rope)


def _add_gemma(writer: Any, config: ModelConfig) -> None:
    # Without windows every layer attends to everything, whatever the width of the window.
    writer.add_sliding_window(next((w for w in config.windows if w is not None), config.max_position_embeddings))
    writer.add_sliding_window_pattern(_window_period(config))
    if config.local_rope is not None:
        writer.add_rope_freq_base_swa(config.local_rope.theta)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)


def _add_rope_scaling(gguf: Any, writer: Any, rope: RopeConfig) -> None:
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
        # llama.cpp multiplies its own 0.1 ln(factor) + 1 by this.
        writer.add_rope_scaling_attn_factors(rope.attention_factor / (0.1 * float(np.log(rope.factor)) + 1))
    if rope.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)


def rope_tensors(gguf: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Divisors of the frequencies, where they differ from one dimension to the next."""
    rope = config.rope
    names = {kind: gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[f"ROPE_{kind}"]] + ".weight" for kind in _ROPE_TENSORS}
    if rope.kind == "llama3":
        plain = inverse_frequencies(RopeConfig(rope.theta, partial=rope.partial), config.head_dim)
        yield names["FREQS"], (plain / inverse_frequencies(rope, config.head_dim)).astype(np.float32)
    if rope.kind == "longrope":
        yield names["FACTORS_LONG"], np.asarray(rope.long_factor, np.float32)
        yield names["FACTORS_SHORT"], np.asarray(rope.short_factor, np.float32)
