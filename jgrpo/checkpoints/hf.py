"""Load a Hugging Face checkpoint into the base pytree, quantizing while it streams in.

Leaf by leaf: a stacked host array is allocated, every tensor of the leaf is read a block of rows at a time, quantized
group-wise and written at its layer and row offset (q, k and v share a matrix, so do gate and up), and the leaf is
moved to the device. The host never holds more than the result, one leaf in flight and one block; on a CPU the device
takes the host array over without a copy. Names and shapes of all tensors are checked before any data is read.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jgrpo.checkpoints.names import MATRICES, Leaf, Placement, leaf_shapes, modules_of, placements
from jgrpo.checkpoints.safetensors_io import TensorInfo, read_rows, row_blocks
from jgrpo.checkpoints.source import load_model_config, resolve_checkpoint, tensor_index
from jgrpo.checkpoints.tokenizer import eos_ids, load_tokenizer
from jgrpo.config import LINEAR_MODULES, QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.models import ModelConfig
from jgrpo.quantization import Int4Weight, quantize

__all__ = ["eos_ids", "load_base", "load_model_config", "load_tokenizer", "resolve_checkpoint"]

Params: TypeAlias = dict[str, Any]

SCALE_DTYPE = np.dtype(ml_dtypes.bfloat16)
"""Of the int4 scales, whatever the compute dtype: an adapter trained on a GPU in bfloat16 finds the same quantized
base when it is exported or used on a CPU in float32. The nibbles are chosen for the rounded scale."""

_READABLE = ("F32", "F16", "BF16", "F64")
# Buffers that old checkpoints store although they follow from the config.
_IGNORED = ("*.rotary_emb.inv_freq", "*.attn.masked_bias")
_BLOCK_BYTES = 4 * 2**20


def load_base(
    path: str | Path,
    model_config: ModelConfig,
    quantization: QuantizationConfig,
    dtype: Any = jnp.float32,
    *,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
) -> Params:
    """The frozen base pytree (`jgrpo.models.base_shapes`) of a local directory, a hub id or "demo".

    Matrices become `Int4Weight` unless `quantization` says "none" or skips them; everything else has `dtype`.
    `put` moves one finished host array to the device. Raises UserError naming the file or tensor that is missing,
    damaged, of the wrong shape, or not divisible by the group size.
    """
    directory = resolve_checkpoint(path)
    index = tensor_index(directory)
    plan = placements(model_config)
    check_tensors(index, plan, model_config, directory)
    base: Params = {"layers": {}}
    for leaf, shape in leaf_shapes(model_config).items():
        group_size = leaf_group_size(leaf, model_config, quantization)
        parent = base["layers"] if leaf[0] == "layers" else base
        parent[leaf[-1]] = _load_leaf(_blocks(index, plan[leaf]), shape, group_size, jnp.dtype(dtype), put)
    return base


def leaf_group_size(leaf: Leaf, model_config: ModelConfig, quantization: QuantizationConfig) -> int | None:
    """Group size of a leaf stored in four bits; None for one that stays in the compute dtype.

    A leaf stays unquantized when any module that shares it is in `skip_modules`.
    """
    known = (*LINEAR_MODULES, "lm_head", "embed_tokens")
    for name in quantization.skip_modules:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"skip_modules: {name!r} is not a module (did you mean {nearest!r}?)")
    if quantization.quantization == "none" or leaf not in MATRICES:
        return None
    if modules_of(leaf, model_config) & set(quantization.skip_modules):
        return None
    width = placements(model_config)[leaf][0].shape[-1]
    if width % quantization.group_size:
        fitting = [str(size) for size in (32, 64, 128) if width % size == 0]
        names = ", ".join(sorted(modules_of(leaf, model_config)))
        way_out = f"use group_size {' or '.join(fitting)}, or " if fitting else ""
        raise UserError(
            f"group_size {quantization.group_size} does not divide the input width {width} of {names}; "
            f"{way_out}add them to skip_modules"
        )
    return quantization.group_size


def check_tensors(
    index: dict[str, TensorInfo], plan: dict[Leaf, list[Placement]], model_config: ModelConfig, path: Path
) -> None:
    """UserError unless the checkpoint holds exactly the tensors of the model, each of its shape."""
    expected = {placement.name: placement for placed in plan.values() for placement in placed}
    for name, placement in expected.items():
        if name not in index:
            raise UserError(
                f"{path}: tensor {name} is missing, expected shape {list(placement.shape)} from config.json"
            )
        info = index[name]
        if info.shape != placement.shape:
            raise UserError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, "
                f"expected {list(placement.shape)} from config.json"
            )
        if info.dtype not in _READABLE:
            raise UserError(f"{info.file}: tensor {name} is {info.dtype}, expected one of {', '.join(_READABLE)}")
    # Transformers' own loader ignores a stored head of a tied model; so do we.
    ignored = (*_IGNORED, "lm_head.weight") if model_config.tie_embeddings else _IGNORED
    unknown = [n for n in index if n not in expected and not any(fnmatch(n, pattern) for pattern in ignored)]
    if unknown:
        raise UserError(
            f"{path}: tensor {unknown[0]} ({len(unknown)} such) has no place in a {model_config.family} model with "
            "this config.json; leaving it out would change the model"
        )


def _load_leaf(
    blocks: Iterator[tuple[Any, np.ndarray]],
    shape: tuple[int, ...],
    group_size: int | None,
    dtype: np.dtype,
    put: Callable,
) -> Any:
    if group_size is None:
        host = _empty(shape, dtype)
        for window, block in blocks:
            host[window] = block.astype(dtype)
        return put(host)
    packed = _empty((*shape[:-1], shape[-1] // 2), np.dtype(np.uint8))
    scales = _empty((*shape[:-1], shape[-1] // group_size), SCALE_DTYPE)
    for window, block in blocks:
        part = quantize(block, group_size, SCALE_DTYPE)
        packed[window], scales[window] = part.packed, part.scales
    return Int4Weight(put(packed), put(scales))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array on a 64-byte boundary, which is what lets the CPU backend take it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _blocks(index: dict[str, TensorInfo], placed: list[Placement]) -> Iterator[tuple[Any, np.ndarray]]:
    """(index into the stacked leaf, the rows that belong there) of every block of a leaf's tensors."""
    for placement in placed:
        info = index[placement.name]
        for start, stop in row_blocks(info.shape[0], info.row_bytes, _BLOCK_BYTES):
            rows = slice(placement.start + start, placement.start + stop)
            yield rows if placement.layer is None else (placement.layer, rows), read_rows(info, start, stop)
