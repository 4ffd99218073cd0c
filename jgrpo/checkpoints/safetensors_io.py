"""Read and write safetensors files a few rows at a time, as NumPy arrays.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header size, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the data. It is read and written here instead of through the
`safetensors` package for two reasons: peak host memory has to be one block of rows (the package memory-maps whole
files, whose pages count as resident, and its writer wants all tensors of a file at once), and bfloat16 has
to arrive in NumPy (ml_dtypes). Files written here are loaded by the package in the tests, and the reverse.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from jgrpo.errors import UserError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """Name in the format: F32, BF16, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of axis 0."""
        return math.prod(self.shape[1:]) * _DTYPES[self.dtype].itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of `file`; UserError if it is not a whole safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{file}: corrupt or truncated safetensors header ({size} bytes); download it again")
        text = stream.read(header_bytes)
    try:
        entries = json.loads(text)
        tensors = {name: _tensor_info(file, 8 + header_bytes, e) for name, e in entries.items() if name[:2] != "__"}
        end = 8 + header_bytes + max((e["data_offsets"][1] for n, e in entries.items() if n[:2] != "__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: corrupt safetensors header ({error}); download it again") from error
    if size < end:
        raise UserError(f"{file}: truncated, {size} bytes of {end}; download it again")
    return tensors


def _tensor_info(file: Path, data_start: int, entry: dict[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} {entry['dtype']} in {end - begin} bytes")
    return TensorInfo(file, entry["dtype"], shape, data_start + begin)


def read_rows(tensor: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of axis 0 (all: the whole tensor), in the dtype of the file."""
    if tensor.dtype not in _DTYPES:
        raise UserError(
            f"{tensor.file}: tensor dtype {tensor.dtype} is not supported (supported: {', '.join(_DTYPES)})"
        )
    stop = (tensor.shape[0] if tensor.shape else 1) if stop is None else stop
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    rows = np.fromfile(
        tensor.file, _DTYPES[tensor.dtype], math.prod(shape), offset=tensor.offset + start * tensor.row_bytes
    )
    return rows.reshape(shape)


def row_blocks(rows: int, row_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of at most `block_bytes`, at least one row each."""
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes the data of `specs` in their order, in pieces of any size; the header goes first.

    Used as a context manager; leaving it with a tensor missing raises ValueError.
    """

    def __init__(self, file: Path, specs: Sequence[TensorSpec]):
        self._stream: IO[bytes] = file.open("wb")
        self._remaining = sum(spec.nbytes for spec in specs)
        header = _header(specs)
        self._stream.write(len(header).to_bytes(8, "little") + header)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def write(self, values: np.ndarray) -> None:
        """Append `values` (already in the dtype of their spec)."""
        self._remaining -= values.nbytes
        # A view as bytes: bfloat16 has no buffer protocol.
        self._stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
        if kind is None and self._remaining:
            raise ValueError(f"{self._stream.name}: {self._remaining} bytes of the header's tensors were not written")


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        span = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a small file in one call."""
    with SafetensorsWriter(file, [TensorSpec(name, v.shape, v.dtype) for name, v in tensors.items()]) as writer:
        for values in tensors.values():
            writer.write(values)
