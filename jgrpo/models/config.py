"""What a decoder-only transformer is made of, read from a Hugging Face `config.json`.

One `ModelConfig` covers every supported family; what differs between families is data in `jgrpo.models.families`,
never a branch in the model. Field names are Hugging Face's without their prefixes (`num_layers` for
`num_hidden_layers`). Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`
(transformers 4) and `rope_parameters` (transformers 5).
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jgrpo.errors import UserError
from jgrpo.models.families import FAMILIES, Family

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of the MLP's activation and ours."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extensions; see `jgrpo.models.rope`."""

    theta: float = 10000.0
    kind: str = "default"
    """"default", "linear", "dynamic", "llama3", "yarn" or "longrope"."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    """Positions of the pretraining, before the extension."""
    partial: float = 1.0
    """Part of each head that is rotated; the rest carries no position."""
    attention_factor: float = 1.0
    """Factor of cos and sin (YaRN, LongRoPE)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """YaRN: whether its ramp starts and ends on whole dimensions."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    """LongRoPE: divisors of the frequencies within and beyond `original_max_position`."""


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
    local_rope: RopeConfig | None = None
    """Rotary embedding of the layers with a window, where it is not `rope`."""
    multimodal: bool = False
    """The checkpoint is that of a model that also sees images; this is its text model."""
    fused_projections: bool = False
    """The checkpoint's modules are `qkv_proj` and `gate_up_proj`: what an adapter is attached to."""
    activation: str = "silu"
    """Of the MLP: "silu" or "gelu_tanh"."""
    norm_offset: float = 0.0
    """Added to every norm scale; where it is not 0, scaling happens in float32."""
    sandwich_norms: bool = False
    """Norms also on the outputs of attention and MLP (`attention_out_norm`, `mlp_out_norm`)."""
    embedding_scale: float = 1.0
    """Factor of the embeddings on their way in, rounded to the compute dtype."""
    attention_scale: float | None = None
    """Factor of the scores; None: 1/√head_dim."""
    attention_softcap: float | None = None
    """c of c · tanh(score / c); None: scores as they are."""
    logit_softcap: float | None = None
    """The same for the logits."""
    context_length: int | None = None
    """Positions of the longest row that will be seen. LongRoPE and dynamic scaling choose their frequencies by it, once,
    because cached keys are already rotated; None: within the pretraining's positions."""

    @property
    def qkv_splits(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused projection."""
        return (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def uniform_window(self) -> int | None:
        """The window that every layer shares; meaningful only where `mixed_windows` is false."""
        return self.windows[0] if self.windows else None

    @property
    def mixed_windows(self) -> bool:
        """Whether layers differ in their window."""
        return len(set(self.windows)) > 1


def model_config_from_hf(
    config: Mapping[str, Any], path: str = "config.json", context_length: int | None = None
) -> ModelConfig:
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
    config = {**family.defaults, **config}
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if not isinstance(config.get(key), int)]:
        raise UserError(f"{path}: {', '.join(missing)} missing or not an integer; the file is incomplete")
    if config.get("use_bidirectional_attention"):
        raise UserError(f"{path}: use_bidirectional_attention is not supported; a policy needs causal attention")
    heads = config["num_attention_heads"]
    rope, local_rope = _ropes(config, family, path)
    attention_bias = family.attention_bias is not None and bool(config.get(family.attention_bias, False))
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
        rope=rope,
        local_rope=local_rope,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias or attention_bias,
        out_bias=attention_bias,
        mlp_bias=family.mlp_bias is not None and bool(config.get(family.mlp_bias, False)),
        qk_norm=family.qk_norm,
        windows=_windows(config, family),
        fused_projections=family.fused_projections,
        activation=_activation(config, family, path),
        context_length=context_length,
        **(_gemma(config) if family.gemma else {}),
    )


def _activation(config: Mapping[str, Any], family: Family, path: str) -> str:
    name = config.get(family.activation_field) or "silu"
    if name not in ACTIVATIONS:
        raise UserError(
            f"{path}: {family.activation_field} {name!r} is not supported, expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "embedding_scale": math.sqrt(config["hidden_size"]),
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        # Gemma 3 has fields for both caps and, in transformers, applies only the one of the logits.
        "attention_softcap": config.get("attn_logit_softcapping") if config["model_type"] == "gemma2" else None,
        "logit_softcap": config.get("final_logit_softcapping"),
    }


def _ropes(config: Mapping[str, Any], family: Family, path: str) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding of full-attention layers, and that of windowed layers where the family has two."""
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if family.local_theta is None:
        return _rope(settings, config, path), None
    # transformers 5 nests one dictionary for each kind of layer.
    full = settings.get("full_attention") or {k: v for k, v in settings.items() if not isinstance(v, dict)}
    local = settings.get("sliding_attention") or {"rope_theta": config[family.local_theta]}
    return _rope(full, config, path), _rope(local, config, path)


def _rope(settings: Mapping[str, Any], config: Mapping[str, Any], path: str) -> RopeConfig:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    # Early Phi-3 checkpoints call LongRoPE "su" or "yarn"; only it has lists of factors.
    kind = "longrope" if kind in ("su", "yarn") and "long_factor" in settings else kind
    if kind not in _REQUIRED:
        raise UserError(f"{path}: rope type {kind!r} is not supported, expected one of {', '.join(_REQUIRED)}")
    if missing := [key for key in _REQUIRED[kind] if settings.get(key) is None]:
        raise UserError(f"{path}: rope type {kind!r} needs {', '.join(missing)}; the file is incomplete")
    limit = config.get("max_position_embeddings", 32768)
    # Phi states the pretraining's positions beside the rotary settings, where they count first.
    original = config.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    original = original or (8192 if kind == "llama3" else limit)
    factor = float(settings.get("factor") or (limit / original if kind == "longrope" else 1.0))
    return RopeConfig(
        theta=float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0),
        kind=kind,
        factor=factor,
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_max_position=int(limit if kind == "dynamic" else original),
        partial=float(settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0),
        attention_factor=_attention_factor(kind, settings, factor, original),
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        truncate=bool(settings.get("truncate", True)),
        short_factor=tuple(settings.get("short_factor") or ()),
        long_factor=tuple(settings.get("long_factor") or ()),
    )


_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""The kinds of rotary embedding and the settings that each cannot do without."""


def _attention_factor(kind: str, settings: Mapping[str, Any], factor: float, original: int) -> float:
    if kind not in ("yarn", "longrope") or factor <= 1.0:
        return 1.0
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    scale, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
    yarn = lambda scale: 0.1 * scale * math.log(factor) + 1.0  # noqa: E731
    return yarn(scale) / yarn(all_dims) if scale and all_dims else yarn(1.0)


def _windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    patterned = family.window_always_on or family.window_pattern > 0
    if window is None or not (patterned or config.get("use_sliding_window", False)):
        return ()
    if kinds := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family.window_pattern:
        period = config.get("sliding_window_pattern") or family.window_pattern
        return tuple(window if (layer + 1) % period else None for layer in range(layers))
    # transformers' rule for Qwen: the first `max_window_layers` layers attend to everything.
    full = 0 if family.window_always_on else config.get("max_window_layers", layers)
    return (None,) * min(full, layers) + (window,) * max(0, layers - full)
