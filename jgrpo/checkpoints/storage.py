"""How the base's matrices lie in host memory while they are filled: which form each layer has, and writing blocks into it.

A leaf whose layers all have one form is a stack; one whose layers differ (a checkpoint or a memory budget keeps some of
them wide) is a `MixedWeight` of one stack for each form.
"""

import dataclasses
import math
from collections.abc import Callable
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


def allocate(storage: Storage, shape: tuple[int, ...], dtype: np.dtype, make: Callable[..., Any] | None = None) -> Any:
    """Host arrays of a matrix or a stack `shape`; `dtype` is that of the dense form, `make(shape, dtype)` an array.

    By default those are uninitialized host arrays; `jax.ShapeDtypeStruct` allocates nothing.
    """
    make = make or empty
    if storage.code == "dense":
        return make(shape, dtype)
    *lead, width = shape
    groups = (*lead, width // storage.group_size)
    scales = make(groups, storage_dtype(storage.scale_dtype))
    if storage.code == "int8":
        return Int8Weight(make(tuple(shape), np.dtype(np.int8)), scales)
    packed = make((*lead, width // 2), np.dtype(np.uint8))
    if storage.zeros:
        return Int4Weight(packed, scales, make(groups, np.dtype(np.uint8)))
    return _FORMS[storage.code](packed, scales)


def layers_by_form(storages: list[Storage]) -> dict[Storage, list[int]]:
    """The layers that have each form, in the order in which the forms first appear."""
    return {form: [i for i, storage in enumerate(storages) if storage == form] for form in dict.fromkeys(storages)}


def join_forms(members: dict[Storage, list[int]], stacks: tuple[Any, ...]) -> Any:
    """The leaf that consists of one stack for each form, which hold the layers `members`."""
    if len(stacks) == 1:
        return stacks[0]
    where = {layer: (part, i) for part, layers in enumerate(members.values()) for i, layer in enumerate(layers)}
    return MixedWeight(stacks, tuple(where[layer] for layer in sorted(where)))


def write(host: Any, layer: int | None, rows: slice, columns: Columns, values: Any) -> None:
    """Store a block, an array or a packed form, at its place in a matrix or, with `layer`, in a stack of them.

    It is rounded or dequantized where its form is not the one it is stored in.
    """
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
