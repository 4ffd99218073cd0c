"""The tensors of a checkpoint, in the formats that they come in, read a block at a time.

Every reader gives blocks as they are stored, in jgrpo's packing: an array, or an `Int4Weight` or `NF4Weight` with exactly the
format's values. The definitions followed:

- bitsandbytes NF4 (https://github.com/bitsandbytes-foundation/bitsandbytes, functional.py, `QuantState`): the matrix is
  flattened; byte i holds element 2i in its high and 2i + 1 in its low nibble; blocks of `blocksize` elements share
  `absmax`, which double quantization stores as one of 256 levels times a scale for each 256 blocks, plus an offset.
- GPTQ (https://github.com/AutoGPTQ/AutoGPTQ, `qlinear_cuda_old.py`): `qweight` int32 [K/8, N], eight inputs a word, low
  nibble first; `qzeros` int32 [K/g, N/8]; `scales` [K/g, N]; w = (q - (zero + 1 mod 16)) · scale; `checkpoint_format`
  "gptq_v2" stores the zero itself. `g_idx` names the group of each input.
- AWQ (https://github.com/casper-hansen/AutoAWQ, `packing_utils.py`), version "gemm": `qweight` int32 [K, N/8], eight outputs
  a word in the order 0 2 4 6 1 3 5 7, `qzeros` likewise, w = (q - zero) · scale.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jgrpo.checkpoints.names import MATRICES, Placement
from jgrpo.checkpoints.safetensors_io import TensorInfo, read_rows, row_blocks
from jgrpo.checkpoints.storage import DENSE, Columns, Storage
from jgrpo.errors import UserError
from jgrpo.quantization import NF4, Int4Weight, NF4Weight, pack_nibbles

Index = Mapping[str, TensorInfo]
READABLE = ("F32", "F16", "BF16", "F64")
BLOCK_BYTES = 2**19
_SCALES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Tensor:
    """A tensor in the checkpoint's ordinary form: one array."""

    def __init__(self, index: Index, placement: Placement) -> None:
        self.index, self.placement = index, placement
        self.info = self.part("")

    def part(self, suffix: str) -> TensorInfo:
        """Header entry of a stored tensor; UserError if it is missing."""
        name = self.placement.name + suffix
        if name not in self.index:
            shape = list(self.placement.shape)
            raise UserError(
                f"{_directory(self.index)}: tensor {name} is missing, expected shape {shape} from config.json"
            )
        return self.index[name]

    @property
    def names(self) -> set[str]:
        """Stored tensors that it consists of."""
        return {self.placement.name}

    @property
    def storage(self) -> Storage:
        """The form it has in the file."""
        return DENSE

    def check(self) -> None:
        """UserError unless shape and dtype are those of the model."""
        expect(self.info, self.placement.name, self.placement.shape, READABLE)

    def blocks(self) -> Iterator[tuple[slice, Columns]]:
        """Windows (rows, columns) that cover it; columns are (0, 0) for a vector."""
        width = self.placement.shape[-1] if len(self.placement.shape) > 1 else 0
        for start, stop in row_blocks(self.info.shape[0], self.info.row_bytes, BLOCK_BYTES):
            yield slice(start, stop), (0, width)

    def read(self, rows: slice, columns: Columns) -> Any:
        """One window: an array, or a packed form."""
        return read_rows(self.info, rows.start, rows.stop)


class NF4Tensor(Tensor):
    """bitsandbytes' NF4, with or without double quantization."""

    @property
    def names(self) -> set[str]:  # noqa: D102
        return {
            name for name in self.index if name == self.placement.name or name.startswith(self.placement.name + ".")
        }

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """bitsandbytes' settings of this tensor."""
        name = self.placement.name + ".quant_state.bitsandbytes__nf4"
        if name not in self.index:
            kinds = [n.rsplit("__", 1)[-1] for n in self.names if ".quant_state." in n]
            raise UserError(
                f"{self.info.file}: tensor {self.placement.name} is quantized as {', '.join(kinds) or 'an unknown type'}, "
                "expected nf4; give the 16-bit checkpoint it was made from (jgrpo quantizes while loading)"
            )
        return json.loads(read_rows(self.index[name]).tobytes())

    @property
    def storage(self) -> Storage:  # noqa: D102
        return Storage("nf4", self.state["blocksize"], scale_dtype="float32")

    def check(self) -> None:  # noqa: D102
        (rows, width), block = self.placement.shape, self.state["blocksize"]
        if tuple(self.state["shape"]) != (rows, width):
            raise UserError(
                f"{self.info.file}: tensor {self.placement.name} has shape {list(self.state['shape'])}, "
                f"expected {[rows, width]} from config.json"
            )
        if width % block:
            raise UserError(
                f"{self.info.file}: blocks of {block} elements of {self.placement.name} run over the ends of its rows of "
                f"{width}, which jgrpo cannot read; give the 16-bit checkpoint it was made from"
            )
        expect(self.info, self.placement.name, (rows * width // 2, 1), ("U8",))
        expect(self.part(".absmax"), self.placement.name + ".absmax", (rows * width // block,), ("U8", "F32"))
        table = read_rows(self.part(".quant_map"))
        if table.shape != NF4.shape or np.abs(table - NF4).max() > 1e-6:
            raise UserError(f"{self.info.file}: {self.placement.name}.quant_map is not the table of NF4")

    def blocks(self) -> Iterator[tuple[slice, Columns]]:  # noqa: D102
        rows, width = self.placement.shape
        for start, stop in row_blocks(rows, width // 2, BLOCK_BYTES):
            yield slice(start, stop), (0, width)

    def read(self, rows: slice, columns: Columns) -> Any:  # noqa: D102
        width, block = columns[1], self.state["blocksize"]
        stored = read_rows(self.info, rows.start * width // 2, rows.stop * width // 2).reshape(-1, width // 2)
        nibbles = np.stack([stored >> 4, stored & 0xF], axis=-1).reshape(-1, width)
        scales = self._absmax(rows.start * width // block, rows.stop * width // block)
        packed: Any = pack_nibbles(nibbles, block)  # host arrays in a pytree annotated for the device
        return NF4Weight(packed, scales.reshape(-1, width // block))  # type: ignore[arg-type]

    def _absmax(self, start: int, stop: int) -> np.ndarray:
        stored = read_rows(self.part(".absmax"), start, stop)
        if stored.dtype != np.uint8:
            return stored
        levels, scales = self._nested
        block = np.arange(start, stop) // self.state["nested_blocksize"]
        return levels[stored] * scales[block] + np.float32(self.state["nested_offset"])

    @functools.cached_property
    def _nested(self) -> tuple[np.ndarray, np.ndarray]:
        return read_rows(self.part(".nested_quant_map")), read_rows(self.part(".nested_absmax"))


@dataclass(frozen=True)
class _Int4Layout:
    """What differs between GPTQ and AWQ."""

    zero_step: int
    """Added to a stored zero-point, modulo 16."""
    order: tuple[int, ...] = tuple(range(8))
    """Output that nibble i of a word along the outputs holds."""
    packs_inputs: bool = True
    """`qweight` packs eight inputs into a word (GPTQ), else eight outputs (AWQ)."""


class Int4Tensor(Tensor):
    """GPTQ's and AWQ's four bits; blocks are ranges of groups, because the files hold the transpose."""

    def __init__(self, index: Index, placement: Placement, layout: _Int4Layout, group_size: int) -> None:
        self.index, self.placement, self.layout = index, placement, layout
        self.group = placement.shape[1] if group_size == -1 else group_size
        self.info = self.part("qweight")

    def part(self, suffix: str) -> TensorInfo:  # noqa: D102
        name = self._name(suffix)
        if name not in self.index:
            raise UserError(f"{_directory(self.index)}: tensor {name} is missing; download the checkpoint again")
        return self.index[name]

    def _name(self, suffix: str) -> str:
        return f"{self.placement.name.removesuffix('weight')}{suffix}"

    @property
    def names(self) -> set[str]:  # noqa: D102
        return {self._name(suffix) for suffix in ("qweight", "qzeros", "scales", "g_idx")} & set(self.index)

    @functools.cached_property
    def zeros(self) -> np.ndarray:
        """The level that stands for 0, uint8 [groups, N]."""
        words = read_rows(self.part("qzeros"))
        nibbles = np.empty((*words.shape, 8), np.uint8)
        for i, output in enumerate(self.layout.order):
            nibbles[..., output] = (words >> (4 * i)) & 0xF
        return (nibbles.reshape(words.shape[0], -1) + self.layout.zero_step) & 0xF

    @property
    def storage(self) -> Storage:  # noqa: D102
        return Storage("int4", self.group, bool((self.zeros != 8).any()), _SCALES[self.part("scales").dtype])

    def check(self) -> None:  # noqa: D102
        rows, width = self.placement.shape
        if width % self.group or self.group % 8 or rows % 8:
            raise UserError(
                f"{self.info.file}: {self._name('qweight')} of shape {[rows, width]} does not divide into words of 8 and "
                f"groups of {self.group}; give the 16-bit checkpoint it was made from"
            )
        words = (width // 8, rows) if self.layout.packs_inputs else (width, rows // 8)
        expect(self.info, self._name("qweight"), words, ("I32",))
        expect(self.part("qzeros"), self._name("qzeros"), (width // self.group, rows // 8), ("I32",))
        expect(self.part("scales"), self._name("scales"), (width // self.group, rows), tuple(_SCALES))
        self._check_order(width)

    def _check_order(self, width: int) -> None:
        name = self._name("g_idx")
        if name in self.index and (read_rows(self.index[name]) != np.arange(width) // self.group).any():
            raise UserError(
                f"{self.info.file}: {name} is not in order: quantized with act-order (desc_act), which jgrpo does not read; "
                "give one made with desc_act=False, or the 16-bit checkpoint"
            )

    def blocks(self) -> Iterator[tuple[slice, Columns]]:  # noqa: D102
        rows, width = self.placement.shape
        for start, stop in row_blocks(width // self.group, self.group * rows // 2, BLOCK_BYTES):
            yield slice(0, rows), (start * self.group, stop * self.group)

    def read(self, rows: slice, columns: Columns) -> Any:  # noqa: D102
        start, stop = columns
        if self.layout.packs_inputs:
            words = read_rows(self.info, start // 8, stop // 8)
            nibbles = np.stack([((words >> (4 * i)) & 0xF).astype(np.uint8) for i in range(8)], axis=1)
            nibbles = nibbles.reshape(stop - start, -1)
        else:
            words = read_rows(self.info, start, stop)
            nibbles = np.empty((*words.shape, 8), np.uint8)
            for i, output in enumerate(self.layout.order):
                nibbles[..., output] = (words >> (4 * i)) & 0xF
            nibbles = nibbles.reshape(stop - start, -1)
        groups = slice(start // self.group, stop // self.group)
        scales = read_rows(self.part("scales"), groups.start, groups.stop)
        packed: Any = pack_nibbles(np.ascontiguousarray(nibbles.T), self.group)
        return Int4Weight(packed, scales.T, self.zeros[groups].T)  # type: ignore[arg-type]


def expect(info: TensorInfo, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """UserError unless a stored tensor has this shape and one of these dtypes."""
    if info.shape != shape:
        raise UserError(
            f"{info.file}: tensor {name} has shape {list(info.shape)}, expected {list(shape)} from config.json"
        )
    if info.dtype not in dtypes:
        raise UserError(f"{info.file}: tensor {name} is {info.dtype}, expected one of {', '.join(dtypes)}")


def _directory(index: Index) -> str:
    return str(next(iter(index.values())).file.parent) if index else "checkpoint"


@dataclass(frozen=True)
class Scheme:
    """How the matrices of an already quantized checkpoint are stored; a module without such tensors is an ordinary one."""

    method: str
    layout: _Int4Layout | None = None
    group_size: int = 0

    def tensor(self, index: Index, placement: Placement) -> Tensor:
        """The reader of one matrix."""
        if self.layout is not None and placement.name.removesuffix("weight") + "qweight" in index:
            return Int4Tensor(index, placement, self.layout, self.group_size)
        if self.method == "bitsandbytes" and placement.name + ".absmax" in index:
            return NF4Tensor(index, placement)
        return Tensor(index, placement)


def read_scheme(config: Mapping[str, Any], path: str) -> Scheme | None:
    """The scheme that `config.json` states, None for an ordinary checkpoint; UserError for one that is not read."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "unknown")
    problem = _PROBLEMS.get(method, lambda _: f"the scheme {method!r}")(settings)
    if problem:
        raise UserError(
            f"{path}: already quantized, with {problem}, which jgrpo does not read (it reads bitsandbytes nf4, gptq and awq "
            "of 4 bits); give the 16-bit checkpoint it was made from (jgrpo quantizes while loading)"
        )
    if method == "bitsandbytes":
        return Scheme(method)
    if method == "awq":
        return Scheme(method, _Int4Layout(0, _AWQ_ORDER, packs_inputs=False), settings.get("group_size", 128))
    step = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return Scheme(method, _Int4Layout(step), settings.get("group_size", 128))


def _bitsandbytes_problem(settings: Mapping[str, Any]) -> str | None:
    if settings.get("load_in_8bit"):
        return "bitsandbytes int8"
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    return None if kind == "nf4" else f"bitsandbytes {kind}"


def _gptq_problem(settings: Mapping[str, Any]) -> str | None:
    if settings.get("bits") != 4:
        return f"gptq of {settings.get('bits')} bits"
    layout = settings.get("checkpoint_format") or "gptq"
    return None if layout in ("gptq", "gptq_v2") else f"gptq in the layout {layout!r}"


def _awq_problem(settings: Mapping[str, Any]) -> str | None:
    if (bits := settings.get("bits", settings.get("w_bit"))) != 4:
        return f"awq of {bits} bits"
    version = str(settings.get("version", "gemm")).lower()
    return None if version == "gemm" else f"awq in the layout {version!r}"


_PROBLEMS = {"bitsandbytes": _bitsandbytes_problem, "gptq": _gptq_problem, "awq": _awq_problem}


def readers(index: Index, plan: Mapping[Any, list[Placement]], scheme: Scheme | None) -> dict[str, Tensor]:
    """`{tensor name: its reader}` of every placement; shapes and dtypes are checked, no weights are read."""
    made = {}
    for leaf, placed in plan.items():
        for placement in placed:
            packed = scheme is not None and leaf in MATRICES
            made[placement.name] = scheme.tensor(index, placement) if packed and scheme else Tensor(index, placement)
            made[placement.name].check()
    return made
