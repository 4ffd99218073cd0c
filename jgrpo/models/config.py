"""What a decoder-only transformer is made of, read from a Hugging Face `config.json`.

One `ModelConfig` covers every supported family; what differs between families is data in `FAMILIES`,
never a branch in the model. Field names are Hugging Face's without their prefixes (`num_layers` for
`num_hidden_layers`). Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`
(transformers 4) and `rope_parameters` (transformers 5).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jgrpo.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with Llama 3.1's frequency scaling."""

    theta: float = 10000.0
    kind: str = "default"
    """"default" or "llama3"."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one model; hashable, so that it can be a static argument of `jit`."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in positions (None: full attention); empty: full attention everywhere."""

    @property
    def qkv_splits(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused projection."""
        return (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )

    @property
    def uniform_window(self) -> int | None:
        """The window that every layer shares; meaningful only where `mixed_windows` is false."""
        return self.windows[0] if self.windows else None

    @property
    def mixed_windows(self) -> bool:
        """Whether layers differ in their window."""
        return len(set(self.windows)) > 1


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers departs from Llama."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    biases_from_config: bool = False
    """`attention_bias` and `mlp_bias` of the config decide about biases."""
    window_always_on: bool = False
    """`sliding_window` applies to every layer without `use_sliding_window`."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", biases_from_config=True),
    "mistral": Family("MistralForCausalLM", window_always_on=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, biases_from_config=True),
}


def model_config_from_hf(config: Mapping[str, Any], path: str = "config.json") -> ModelConfig:
    """Translate the dictionary of a `config.json`; `path` is named in errors.

    Raises `UserError` for a family or a rotary scaling that is not supported and for missing fields.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"{path}: model_type {name!r} is not supported (supported: {', '.join(sorted(FAMILIES))}; "
            f"nearest: {near}); choose a checkpoint of one of these families"
        )
    family = FAMILIES[name]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act {config['hidden_act']!r} is not supported, expected 'silu'")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if not isinstance(config.get(key), int)]:
        raise UserError(f"{path}: {', '.join(missing)} missing or not an integer; the file is incomplete")
    heads = config["num_attention_heads"]
    attention_bias = family.biases_from_config and bool(config.get("attention_bias", False))
    return ModelConfig(
        family=name,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config.get("max_position_embeddings", 32768),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope(config, path),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or attention_bias,
        out_bias=attention_bias,
        mlp_bias=family.biases_from_config and bool(config.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        windows=_windows(config, family),
    )


def _rope(config: Mapping[str, Any], path: str) -> RopeConfig:
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: rope type {kind!r} is not supported, expected 'default' or 'llama3'")
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"{path}: partial_rotary_factor {partial} is not supported, expected 1.0")
    return RopeConfig(
        theta=float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=kind,
        factor=float(settings.get("factor", 1.0)),
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_max_position=int(settings.get("original_max_position_embeddings", 8192)),
    )


def _windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if window is None or not (family.window_always_on or config.get("use_sliding_window", False)):
        return ()
    if kinds := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    # transformers' rule for Qwen: the first `max_window_layers` layers attend to everything.
    full = 0 if family.window_always_on else config.get("max_window_layers", layers)
    return (None,) * min(full, layers) + (window,) * max(0, layers - full)
