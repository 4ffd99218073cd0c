"""Write base + adapter as an ordinary Hugging Face checkpoint, one matrix at a time.

Every tensor is W + scale · B A, summed in float32 and rounded once. W comes from one of two places:
- the base pytree: quantized leaves are dequantized, so the merged model is the policy that was trained;
- the original checkpoint: full-precision weights, on which the adapter was *not* trained. The quantization error that the
  adapter learned to live with is gone, which usually helps a little and is never exact.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.checkpoints.atomic import atomic_directory
from jgrpo.checkpoints.names import MATRICES, Placement, in_order_of_layers
from jgrpo.checkpoints.safetensors_io import SafetensorsWriter, TensorSpec, read_rows, row_blocks
from jgrpo.checkpoints.source import INDEX, SINGLE, read_config, resolve_checkpoint, tensor_index
from jgrpo.config import LoraConfig
from jgrpo.errors import UserError
from jgrpo.lora import Params
from jgrpo.models import ModelConfig
from jgrpo.quantization import PackedWeight, dequantize, take_layer

Rows: TypeAlias = Callable[[Placement, int, int], np.ndarray]
"""(tensor, start, stop) -> those rows of its base weight."""

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "LICENSE*",
)
_BLOCK_BYTES = 8 * 2**20


class Encoding:
    """How tensors are stored: as they are, in one dtype."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    def specs(self, placement: Placement) -> list[TensorSpec]:
        """The stored tensors of one tensor, in the order in which they are written."""
        return [TensorSpec(placement.name, placement.shape, self.dtype)]

    def write(self, writer: SafetensorsWriter, placement: Placement, rows: Rows) -> None:
        """Write those tensors."""
        for start, stop in blocks_of(placement):
            writer.write(rows(placement, start, stop).astype(self.dtype))

    def config(self) -> dict[str, Any]:
        """What `config.json` says about it."""
        return {"dtype": self.dtype.name}


def blocks_of(placement: Placement) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of a few megabytes in float32."""
    return row_blocks(placement.shape[0], 4 * math.prod(placement.shape[1:]), _BLOCK_BYTES)


def export_merged(
    out: str | Path,
    checkpoint: str | Path,
    lora: Params,
    lora_config: LoraConfig,
    model_config: ModelConfig,
    *,
    base: Params | None = None,
    dtype: Any = jnp.bfloat16,
    encoding: Encoding | None = None,
    max_shard_bytes: int = 5 * 10**9,
    replace: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint in `dtype` to the directory `out`, with config, generation config and tokenizer of `checkpoint`.

    `base` is the pytree to merge into; None merges into the weights of `checkpoint`. An `encoding` other than the plain one
    (`jgrpo.checkpoints.gptq`) decides how matrices are stored. `replace` overwrites what is there. `verify` gets the finished directory before it takes the
    name `out`, and refuses it by raising. Raises UserError if `out` is taken or the disk is full; then nothing of it is
    left.
    """
    source = resolve_checkpoint(checkpoint)
    encoding = encoding or Encoding(np.dtype(dtype))
    rows = merged_rows(source, base, lora, lora_config)
    ordered = in_order_of_layers(model_config)
    with atomic_directory(out, replace=replace) as directory:
        needed = sum(spec.nbytes for placement in ordered for spec in encoding.specs(placement))
        check_space(directory, needed)
        _write_shards(directory, ordered, rows, encoding, max_shard_bytes)
        _copy_files(source, directory, encoding)
        if verify is not None:
            verify(directory)
    return Path(out)


def merged_rows(source: Path, base: Params | None, lora: Params, lora_config: LoraConfig) -> Rows:
    """Rows of base + adapter in float32; the base is a pytree, or the weights of the checkpoint `source`."""
    return _merge(_checkpoint_rows(source) if base is None else _base_rows(base), lora, lora_config.scale)


def _merge(rows: Rows, lora: Params, scale: float) -> Rows:
    def merged(placement: Placement, start: int, stop: int) -> np.ndarray:
        weight = rows(placement, start, stop).astype(np.float32)
        if placement.leaf not in MATRICES or placement.module not in lora:
            return weight
        a, b = factors(placement.module, placement.layer)
        return weight + np.float32(scale) * (b[start:stop] @ a)

    @functools.lru_cache(maxsize=1)
    def factors(module: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        part = lora[module]
        return np.asarray(part["a"][layer], np.float32), np.asarray(part["b"][layer], np.float32)

    return merged


def _checkpoint_rows(path: Path) -> Rows:
    index = tensor_index(path)

    def rows(placement: Placement, start: int, stop: int) -> np.ndarray:
        return read_rows(index[placement.name], start, stop)

    return rows


def _base_rows(base: Params) -> Rows:
    # One layer of one leaf is on the host at a time. The copy is made on the device, because JAX keeps the host
    # copy of an array alive with the array.
    @jax.jit
    def copy_of(leaf: Any) -> Any:
        return jax.tree.map(jnp.copy, leaf)

    @functools.lru_cache(maxsize=1)
    def fetch(leaf: tuple[str, ...], layer: int | None) -> Any:
        stored = functools.reduce(lambda tree, key: tree[key], leaf, base)
        return jax.tree.map(np.asarray, copy_of(stored) if layer is None else take_layer(stored, layer))

    def rows(placement: Placement, start: int, stop: int) -> np.ndarray:
        window = slice(placement.start + start, placement.start + stop)
        part = jax.tree.map(lambda x: x[window], fetch(placement.leaf, placement.layer))
        return dequantize(part, np.float32) if isinstance(part, PackedWeight) else part

    return rows


def check_space(directory: Path, needed: int) -> None:
    """UserError unless the disk of `directory` has room for `needed` bytes."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"output {directory.parent}: the merged model needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space or choose another disk"
        )


def _write_shards(
    directory: Path, ordered: list[Placement], rows: Rows, encoding: Encoding, max_shard_bytes: int
) -> None:
    shards = list(_split(ordered, encoding, max_shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    weight_map, total = {}, 0
    for name, shard in zip(names, shards, strict=True):
        specs = [spec for placement in shard for spec in encoding.specs(placement)]
        weight_map |= {spec.name: name for spec in specs}
        total += sum(spec.nbytes for spec in specs)
        with SafetensorsWriter(directory / name, specs) as writer:
            for placement in shard:
                encoding.write(writer, placement, rows)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(ordered: list[Placement], encoding: Encoding, max_shard_bytes: int) -> Iterator[list[Placement]]:
    """Consecutive runs of tensors of at most `max_shard_bytes` (a larger tensor is a shard of its own)."""
    shard: list[Placement] = []
    size = 0
    for placement in ordered:
        nbytes = sum(spec.nbytes for spec in encoding.specs(placement))
        if shard and size + nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(placement)
        size += nbytes
    yield shard


def _copy_files(source: Path, directory: Path, encoding: Encoding) -> None:
    config = {key: value for key, value in read_config(source).items() if key != "quantization_config"}
    config |= encoding.config()
    # transformers 5 writes `dtype`; where the original has transformers 4's name, its readers look for that.
    config |= {"torch_dtype": config["dtype"]} if "torch_dtype" in config else {}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in side_files(source):
        shutil.copyfile(file, directory / file.name)


def side_files(source: Path) -> list[Path]:
    """Generation config, tokenizer and licence of a checkpoint."""
    return sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()})
