"""Write base + adapter as one GGUF file, for llama.cpp, Ollama and LM Studio, one tensor at a time; and read it back.

Names, metadata keys and block formats come from the package `gguf`, llama.cpp's own. What its converter does to tensors is
done here too: q and k of the "llama" architecture are reordered for interleaved rotation, Gemma's norm scales are stored
as 1 + w, vectors stay in float32, and rotary scaling that is no single factor is stored as a tensor of factors.
Deviation from llama.cpp's "Q4_0": embedding and head are Q8_0 instead of Q4_0 and Q6_K.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jgrpo.checkpoints.calibrated import CalibratedRounding
from jgrpo.checkpoints.gguf_metadata import add_metadata, architecture, check_expressible, rope_tensors
from jgrpo.checkpoints.gguf_tokenizer import add_tokenizer, model_name
from jgrpo.checkpoints.merged import Rows, check_space
from jgrpo.checkpoints.names import Placement, in_order_of_layers, leaf_shapes, placements
from jgrpo.errors import UserError
from jgrpo.models import ModelConfig
from jgrpo.quantization import Int4Weight

TYPES = ("F16", "Q8_0", "Q4_0")
Q4_0_GROUP = 32
"""Elements that share a scale in Q4_0."""


def write_gguf(
    file: Path,
    source: Path,
    rows: Rows,
    model_config: ModelConfig,
    kind: str,
    rounding: CalibratedRounding | None = None,
) -> None:
    """Write `file`, its matrices as `kind` ("F16", "Q8_0" or "Q4_0"); the tokenizer is that of the checkpoint `source`.

    `rounding` chooses the levels of what is stored as Q4_0; without it they are the nearest.

    Raises UserError if `gguf` is not installed, or the family, its rotary scaling or its tokenizer cannot be expressed.
    """
    gguf = _package()
    check_expressible(model_config)
    placed = in_order_of_layers(model_config)
    writer = gguf.GGUFWriter(file, architecture(model_config))
    add_metadata(gguf, writer, model_config, kind)
    tokens = add_tokenizer(gguf, writer, source, model_config.vocab_size)
    writer.add_name(model_name(model_config.family, tokens))
    names = _names(gguf, model_config)
    extra = dict(rope_tensors(gguf, model_config))
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
        stored = _stored_type(gguf, placement, kind)
        if rounding is not None and stored == gguf.GGMLQuantizationType.Q4_0:
            writer.write_tensor_data(_q4_0(placement, rounding(placement, rows, Q4_0_GROUP, np.float16), model_config))
            continue
        values = _forward(placement, rows(placement, 0, placement.shape[0]).astype(np.float32), model_config)
        writer.write_tensor_data(gguf.quants.quantize(values, stored).view(np.uint8))
    writer.close()


def _q4_0(placement: Placement, weight: Int4Weight, model_config: ModelConfig) -> np.ndarray:
    """Blocks of Q4_0, uint8 [N, K/32 · 18]: a float16 scale, then 32 levels, packed as an `Int4Weight` packs them."""
    scales = weight.scales[..., None].view(np.uint8)
    levels = weight.packed.reshape(*scales.shape[:2], Q4_0_GROUP // 2)
    blocks = np.concatenate([scales, levels], axis=-1)
    return _forward(placement, blocks.reshape(len(blocks), -1), model_config)


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


def _package() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF export needs the package gguf, which is not installed: pip install 'jgrpo[gguf]'")
    import gguf

    return gguf


def _names(gguf: Any, config: ModelConfig) -> Callable[[Placement], str]:
    known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture(config))
    table = gguf.get_tensor_name_map(known, config.num_layers)

    def name(placement: Placement) -> str:
        found = table.get_name(placement.name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp's {architecture(config)!r} models have no place for {placement.name}")
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
    if architecture(config) != "llama":
        return None
    module = placement.modules[0] if placement.modules else ""
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(module)
