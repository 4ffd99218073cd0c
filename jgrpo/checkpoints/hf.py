"""Load a Hugging Face checkpoint into the base pytree, quantizing while it streams in.

Leaf by leaf: a stacked host array is allocated, every tensor of the leaf is read a block of rows at a time, quantized
group-wise and written at its layer and row offset (q, k and v share a matrix, so do gate and up), and the leaf is
moved to the device. Besides that leaf the host holds one block for each reading thread; on a CPU the device takes
the host array over without a copy. Names and shapes of all tensors are checked before any data is read.
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from jgrpo.lora import module_shapes, own_modules
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
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Reading and NumPy release the interpreter lock; each thread holds one block.
_THREADS = min(8, os.cpu_count() or 1)
_BLOCK_BYTES = 2**19


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
    group_sizes = {leaf: leaf_group_size(leaf, model_config, quantization) for leaf in plan}
    base: Params = {"layers": {}}
    for leaf, shape in leaf_shapes(model_config).items():
        parent = base["layers"] if leaf[0] == "layers" else base
        host = _allocate(shape, group_sizes[leaf], jnp.dtype(dtype))
        with ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(_store, host, *block) for block in _blocks(index, plan[leaf])]:
                done.result()
        parent[leaf[-1]] = jax.tree.map(put, host)
    return base


def leaf_group_size(leaf: Leaf, model_config: ModelConfig, quantization: QuantizationConfig) -> int | None:
    """Group size of a leaf stored in four bits; None for one that stays in the compute dtype.

    A leaf stays unquantized when any module that shares it is in `skip_modules`.
    """
    skipped = skipped_modules(quantization, model_config)
    if quantization.quantization == "none" or leaf not in MATRICES:
        return None
    if modules_of(leaf, model_config) & skipped:
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


def skipped_modules(quantization: QuantizationConfig, model_config: ModelConfig) -> set[str]:
    """`skip_modules` in the checkpoint's own names; UserError for one that does not exist."""
    known = (*LINEAR_MODULES, *module_shapes(model_config), "lm_head", "embed_tokens")
    for name in quantization.skip_modules:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"skip_modules: {name!r} is not a module (did you mean {nearest!r}?)")
    linear = [name for name in quantization.skip_modules if name not in ("lm_head", "embed_tokens")]
    return {*own_modules(linear, model_config), *(set(quantization.skip_modules) & {"lm_head", "embed_tokens"})}


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
    unknown = [n for n in index if n not in expected and not any(fnmatch(n, pattern) for pattern in _IGNORED)]
    if model_config.tie_embeddings and _HEAD in unknown:
        _check_tied(index, path)
        unknown.remove(_HEAD)
    if unknown:
        raise UserError(
            f"{path}: tensor {unknown[0]} ({len(unknown)} such) has no place in a {model_config.family} model with "
            "this config.json; leaving it out would change the model"
        )


def _check_tied(index: dict[str, TensorInfo], path: Path) -> None:
    """A tied model may store its head once more, but not another one (transformers unties such a model)."""
    embed, head = index[_EMBED], index[_HEAD]
    same = (embed.shape, embed.dtype) == (head.shape, head.dtype)
    blocks = row_blocks(embed.shape[0], embed.row_bytes, _BLOCK_BYTES)
    if not same or any((read_rows(embed, *rows) != read_rows(head, *rows)).any() for rows in blocks):
        raise UserError(
            f"{path}: config.json ties head and embedding, but {_HEAD} differs from {_EMBED}; set "
            "tie_word_embeddings to false in config.json"
        )


def _allocate(shape: tuple[int, ...], group_size: int | None, dtype: np.dtype) -> np.ndarray | Int4Weight:
    if group_size is None:
        return _empty(shape, dtype)
    # Host arrays in a pytree whose fields are annotated for the device.
    packed: Any = _empty((*shape[:-1], shape[-1] // 2), np.dtype(np.uint8))
    scales: Any = _empty((*shape[:-1], shape[-1] // group_size), SCALE_DTYPE)
    return Int4Weight(packed, scales)


def _store(host: Any, window: Any, info: TensorInfo, start: int, stop: int) -> None:
    """Read rows [start, stop) of a tensor into `host[window]`, quantizing them if `host` is an `Int4Weight`."""
    rows = read_rows(info, start, stop)
    if isinstance(host, Int4Weight):
        part = quantize(rows, host.group_size, SCALE_DTYPE)
        host.packed[window], host.scales[window] = part.packed, part.scales
    else:
        host[window] = rows


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array on a 64-byte boundary, which is what lets the CPU backend take it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _blocks(
    index: dict[str, TensorInfo], placed: list[Placement]
) -> Iterator[tuple[slice | tuple[int, slice], TensorInfo, int, int]]:
    """(place in the stacked leaf, tensor, first row, last row + 1) of every block of a leaf."""
    for placement in placed:
        info = index[placement.name]
        for start, stop in row_blocks(info.shape[0], info.row_bytes, _BLOCK_BYTES):
            rows = slice(placement.start + start, placement.start + stop)
            yield rows if placement.layer is None else (placement.layer, rows), info, start, stop
