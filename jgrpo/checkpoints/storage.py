"""How the base's leaves lie in host memory while they are filled: which form each layer has, and writing blocks into it.

A leaf whose layers all have one form is a stack; one whose layers differ (a checkpoint or a memory budget keeps some of
them wide) is a `MixedWeight` of one stack for each form.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jgrpo.quantization import Int4Weight, Int8Weight, MixedWeight, NF4Weight, dequantize, quantize, quantize_int8

Columns = tuple[int, int]
"""[first, last + 1) input elements."""


@dataclass(frozen=True)
class Storage:
    """The form of one layer of a leaf."""

    code: Literal["dense", "int4", "nf4", "int8"] = "dense"
    group_size: int = 0
    zeros: bool = False
    """Int4 with a zero-point for each group."""
    scale_dtype: str = "bfloat16"


DENSE = Storage()
_FORMS: dict[str, Any] = {"int4": Int4Weight, "nf4": NF4Weight, "int8": Int8Weight}
_ROUND: dict[str, Any] = {"int4": quantize, "int8": quantize_int8}


def storage_dtype(name: str) -> np.dtype:
    """The dtype of a name, bfloat16 included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def allocate(storage: Storage, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """Host arrays of a matrix or a stack `shape`; `dtype` is that of the dense form."""
    if storage.code == "dense":
        return empty(shape, dtype)
    *lead, width = shape
    groups = (*lead, width // storage.group_size)
    scales = empty(groups, storage_dtype(storage.scale_dtype))
    if storage.code == "int8":
        return Int8Weight(_host(empty(shape, np.dtype(np.int8))), _host(scales))
    packed = empty((*lead, width // 2), np.dtype(np.uint8))
    if storage.zeros:
        return Int4Weight(_host(packed), _host(scales), _host(empty(groups, np.dtype(np.uint8))))
    return _FORMS[storage.code](packed, scales)


def _host(array: np.ndarray) -> Any:
    """Host arrays in a pytree whose fields are annotated for the device."""
    return array


def allocate_leaf(storages: list[Storage], shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """Host arrays of a leaf, whose `storages` are those of its layers (of the leaf itself where it is no stack)."""
    forms = list(dict.fromkeys(storages))
    if len(forms) == 1:
        return allocate(forms[0], shape, dtype)
    members = [[i for i, storage in enumerate(storages) if storage == form] for form in forms]
    parts = tuple(allocate(form, (len(m), *shape[1:]), dtype) for form, m in zip(forms, members, strict=True))
    part_of = [forms.index(storage) for storage in storages]
    return MixedWeight(parts, tuple((part, members[part].index(i)) for i, part in enumerate(part_of)))


def write(host: Any, layer: int | None, rows: slice, columns: Columns, values: Any) -> None:
    """Store a block, an array or a packed form, at its place in a leaf, rounding or dequantizing it where forms differ."""
    if isinstance(host, MixedWeight):
        assert layer is not None
        part, layer = host.where[layer]
        host = host.parts[part]
    packed = not isinstance(host, np.ndarray)
    if packed and isinstance(values, np.ndarray):
        values = _ROUND[host.code](values, host.group_size, host.scales.dtype)
    if not packed:
        values = values if isinstance(values, np.ndarray) else dequantize(values, np.float32)
        _put(host, layer, rows, columns, host.shape[-1], values)
        return
    width = host.shape[-1]
    _put(host.packed, layer, rows, columns, width, values.packed)
    _put(host.scales, layer, rows, columns, width, values.scales)
    if host.zeros is not None:
        _put(host.zeros, layer, rows, columns, width, 8 if values.zeros is None else values.zeros)


def _put(array: np.ndarray, layer: int | None, rows: slice, columns: Columns, width: int, values: Any) -> None:
    """Write `values` over input elements `columns` of `width`; an array of groups or bytes has fewer columns."""
    target = array if layer is None else array[layer]
    if target.ndim == 1:
        target[rows] = values
        return
    first, last = (column * target.shape[-1] // width for column in columns)
    target[rows, first:last] = values


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array on a 64-byte boundary, which is what lets the CPU backend take it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def common_storage(storages: list[Storage]) -> Storage:
    """The form that holds the rows of several tensors exactly: their own where they share it, else dense."""
    first = storages[0]
    if any((s.code, s.group_size) != (first.code, first.group_size) for s in storages) or first.code == "dense":
        return DENSE
    dtypes = {s.scale_dtype for s in storages}
    scale_dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return dataclasses.replace(first, zeros=any(s.zeros for s in storages), scale_dtype=scale_dtype)
