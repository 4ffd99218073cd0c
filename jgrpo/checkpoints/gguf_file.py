"""Write base + adapter as one GGUF file, for llama.cpp, Ollama and LM Studio, one tensor at a time; and read it back.

Names, metadata keys and block formats come from the package `gguf`, llama.cpp's own. What its converter does to tensors is
done here too: q and k of the "llama" architecture are reordered for interleaved rotation, Gemma's norm scales are stored
as 1 + w, vectors stay in float32, and rotary scaling that is no single factor is stored as a tensor of factors.
Deviation from llama.cpp's "Q4_0": embedding and head are Q8_0 instead of Q4_0 and Q6_K.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jgrpo.checkpoints.gguf_tokenizer import add_tokenizer
from jgrpo.checkpoints.merged import Rows, check_space
from jgrpo.checkpoints.names import Placement, leaf_shapes, placements
from jgrpo.errors import UserError
from jgrpo.models import ModelConfig, RopeConfig
from jgrpo.models.rope import inverse_frequencies

TYPES = ("F16", "Q8_0", "Q4_0")
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}
"""llama.cpp's names of the families that it calls differently."""


def write_gguf(file: Path, source: Path, rows: Rows, model_config: ModelConfig, kind: str) -> None:
    """Write `file`, its matrices as `kind` ("F16", "Q8_0" or "Q4_0"); the tokenizer is that of the checkpoint `source`.

    Raises UserError if `gguf` is not installed, or the family, its rotary scaling or its tokenizer cannot be expressed.
    """
    gguf = _package()
    placed = [placement for group in placements(model_config).values() for placement in group]
    writer = gguf.GGUFWriter(file, _architecture(model_config))
    _add_metadata(gguf, writer, model_config, kind)
    add_tokenizer(gguf, writer, source, model_config.vocab_size)
    names = _names(gguf, model_config)
    extra = dict(_rope_tensors(gguf, model_config))
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    needed = 0
    for placement in placed:
        stored = _stored_type(gguf, placement, kind)
        shape = gguf.quant_shape_to_byte_shape(placement.shape, stored)
        needed += int(np.prod(shape))
        writer.add_tensor_info(names(placement), shape, np.dtype(np.uint8), int(np.prod(shape)), stored)
    check_space(file.parent, needed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    for placement in placed:
        values = _forward(placement, rows(placement, 0, placement.shape[0]).astype(np.float32), model_config)
        writer.write_tensor_data(gguf.quants.quantize(values, _stored_type(gguf, placement, kind)).view(np.uint8))
    writer.close()


def read_gguf(file: Path, model_config: ModelConfig, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """The base pytree of a file written by `write_gguf`, dequantized to float32."""
    gguf = _package()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = _names(gguf, model_config)
    base: dict[str, Any] = {"layers": {}}
    shapes = leaf_shapes(model_config)
    for leaf, placed in placements(model_config).items():
        host = np.empty(shapes[leaf], np.float32)
        for placement in placed:
            stored = tensors[names(placement)]
            values = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(placement.shape)
            target = host if placement.layer is None else host[placement.layer]
            target[placement.start : placement.stop] = _backward(placement, values, model_config)
        (base["layers"] if leaf[0] == "layers" else base)[leaf[-1]] = put(host)
    return base


def gguf_note(config: ModelConfig) -> str | None:
    """What llama.cpp will do otherwise than the model; None where it does the same."""
    if _architecture(config) == "llama" and config.windows:
        return f"note: llama.cpp ignores the sliding window of {config.family} models ({max(filter(None, config.windows))} positions)"
    return None


def _package() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF export needs the package gguf, which is not installed: pip install 'jgrpo[gguf]'")
    import gguf

    return gguf


def _architecture(config: ModelConfig) -> str:
    return _ARCHITECTURES.get(config.family, config.family)


def _names(gguf: Any, config: ModelConfig) -> Callable[[Placement], str]:
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == _architecture(config))
    table = gguf.get_tensor_name_map(architecture, config.num_layers)

    def name(placement: Placement) -> str:
        found = table.get_name(placement.name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp's {_architecture(config)!r} models have no place for {placement.name}")
        return found

    return name


def _stored_type(gguf: Any, placement: Placement, kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    if len(placement.shape) == 1:
        return types.F32
    if placement.shape[1] % 32:
        return types.F16
    in_table = placement.leaf[0] in ("embed", "head")
    return types["Q8_0" if in_table and kind == "Q4_0" else kind]


def _forward(placement: Placement, values: np.ndarray, config: ModelConfig) -> np.ndarray:
    """llama.cpp's form of a tensor."""
    if (heads := _rotated_heads(placement, config)) is not None:
        # Within a head: first and second halves become even and odd elements.
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values + np.float32(config.norm_offset) if placement.leaf[-1].endswith("norm") else values


def _backward(placement: Placement, values: np.ndarray, config: ModelConfig) -> np.ndarray:
    if (heads := _rotated_heads(placement, config)) is not None:
        return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values - np.float32(config.norm_offset) if placement.leaf[-1].endswith("norm") else values


def _rotated_heads(placement: Placement, config: ModelConfig) -> int | None:
    if _architecture(config) != "llama":
        return None
    module = placement.modules[0] if placement.modules else ""
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(module)


def _add_metadata(gguf: Any, writer: Any, config: ModelConfig, kind: str) -> None:
    files = {"F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
    writer.add_name(f"{config.family} trained with jgrpo")
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
    if config.windows and _architecture(config) != "llama":
        writer.add_sliding_window(next(window for window in config.windows if window is not None))
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    _add_rope_scaling(gguf, writer, config.rope)


def _add_rope_scaling(gguf: Any, writer: Any, rope: RopeConfig) -> None:
    if rope.kind == "dynamic":
        raise UserError("rope type 'dynamic' has no equivalent in GGUF; export 16 bits instead")
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
    if rope.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)


def _rope_tensors(gguf: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Divisors of the frequencies, where they differ from one dimension to the next."""
    rope = config.rope
    names = {kind: gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[f"ROPE_{kind}"]] + ".weight" for kind in _ROPE_TENSORS}
    if rope.kind == "llama3":
        plain = inverse_frequencies(RopeConfig(rope.theta, partial=rope.partial), config.head_dim)
        yield names["FREQS"], (plain / inverse_frequencies(rope, config.head_dim)).astype(np.float32)
    if rope.kind == "longrope":
        yield names["FACTORS_LONG"], np.asarray(rope.long_factor, np.float32)
        yield names["FACTORS_SHORT"], np.asarray(rope.short_factor, np.float32)


_ROPE_TENSORS = ("FREQS", "FACTORS_LONG", "FACTORS_SHORT")
