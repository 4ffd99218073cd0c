"""Load a Hugging Face checkpoint into the base pytree, quantizing while it streams in.

Leaf by leaf and, where a stack is large, layer by layer: host arrays are allocated, every tensor is read a block at a
time, quantized group-wise and written at its row offset (q, k and v share a matrix, so do gate and up), and the arrays
are moved into the stack on the device. So the host holds one layer of one leaf (or the embedding or head) and a block for
each reading thread, never a copy of the model. Names and shapes of all tensors are checked before any weights are read.

A checkpoint that is already quantized keeps the form of each of its modules (`quantization: none` dequantizes them).
Where modules that share a matrix of one layer differ in form, that layer is kept dense, with the values of the format.
"""

import difflib
import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.checkpoints.formats import BLOCK_BYTES, Tensor, read_scheme, readers
from jgrpo.checkpoints.names import MATRICES, Leaf, Placement, leaf_shapes, modules_of, placements
from jgrpo.checkpoints.safetensors_io import TensorInfo, read_rows, row_blocks
from jgrpo.checkpoints.source import load_model_config, read_config, resolve_checkpoint, tensor_index
from jgrpo.checkpoints.storage import DENSE, Storage, allocate, common_storage, join_forms, layers_by_form, write
from jgrpo.checkpoints.tokenizer import eos_ids, load_tokenizer
from jgrpo.checkpoints.transfer import PIECE_BYTES, insert, put
from jgrpo.config import LINEAR_MODULES, QuantizationConfig
from jgrpo.errors import UserError
from jgrpo.lora import matrix_modules, module_shapes, own_modules
from jgrpo.models import ModelConfig

__all__ = ["eos_ids", "load_base", "load_model_config", "load_tokenizer", "resolve_checkpoint"]

Params: TypeAlias = dict[str, Any]

SCALE_DTYPE = "bfloat16"
"""Of the int4 scales, whatever the compute dtype: an adapter trained on a GPU in bfloat16 finds the same quantized
base when it is exported or used on a CPU in float32. The nibbles are chosen for the rounded scale."""

# Buffers that old checkpoints store although they follow from the config.
_IGNORED = ("*.rotary_emb.inv_freq", "*.attn.masked_bias")
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Reading and NumPy release the interpreter lock; each thread holds one block.
_THREADS = min(8, os.cpu_count() or 1)


def load_base(
    path: str | Path,
    model_config: ModelConfig,
    quantization: QuantizationConfig,
    dtype: Any = jnp.float32,
) -> Params:
    """The frozen base pytree (`jgrpo.models.base_shapes`) of a local directory, a hub id or "demo".

    Matrices become `Int4Weight` unless `quantization` says "none" or skips them; everything else has `dtype`.
    "dynamic" widens what `wide_matrices` names (`jgrpo.checkpoints.dynamic.resolve_quantization` chooses them). Raises
    UserError naming the file or tensor that is missing, damaged, of the wrong shape, or not divisible by the group size.
    """
    directory = resolve_checkpoint(path)
    index = tensor_index(directory)
    plan = placements(model_config)
    scheme = read_scheme(read_config(directory), str(directory / "config.json"))
    tensors = readers(index, plan, scheme)
    check_unknown(index, {name for tensor in tensors.values() for name in tensor.names}, model_config, directory)
    storages = {leaf: _storages(leaf, placed, tensors, model_config, quantization) for leaf, placed in plan.items()}
    base: Params = {"layers": {}}
    for leaf, shape in leaf_shapes(model_config).items():
        parent = base["layers"] if leaf[0] == "layers" else base
        reader = _LeafReader(plan[leaf], tensors, shape, jnp.dtype(dtype))
        parent[leaf[-1]] = reader.stacks(storages[leaf]) if leaf[0] == "layers" else reader.matrix(storages[leaf][0])
    return base


@dataclass(frozen=True)
class _LeafReader:
    """Brings one leaf to the device."""

    placed: list[Placement]
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    """Unquantized; of a stack, layers first."""
    dtype: np.dtype
    """Of what stays dense."""

    def matrix(self, form: Storage) -> Any:
        """A leaf without layers."""
        return jax.tree.map(put, self._read(allocate(form, self.shape, self.dtype), {None: None}))

    def stacks(self, storages: list[Storage]) -> Any:
        """A leaf whose layers have the forms `storages`: a stack, or a `MixedWeight` of one stack for each form."""
        members = layers_by_form(storages)
        return join_forms(members, tuple(self._stack(form, layers) for form, layers in members.items()))

    def _stack(self, form: Storage, layers: list[int]) -> Any:
        """`layers` of one form: at once where they are small, else one after the other."""
        shape = (len(layers), *self.shape[1:])
        structs = allocate(form, shape, self.dtype, jax.ShapeDtypeStruct)
        if sum(struct.size * struct.dtype.itemsize for struct in jax.tree.leaves(structs)) <= PIECE_BYTES:
            host = allocate(form, shape, self.dtype)
            return jax.tree.map(put, self._read(host, {layer: i for i, layer in enumerate(layers)}))
        stack = jax.tree.map(lambda struct: jnp.zeros(struct.shape, struct.dtype), structs)
        host = allocate(form, shape[1:], self.dtype)
        for i, layer in enumerate(layers):
            stack = jax.tree.map(functools.partial(insert, layer=i), stack, self._read(host, {layer: None}))
        return stack

    def _read(self, host: Any, places: Mapping[int | None, int | None]) -> Any:
        """Fill `host`, in parallel, with the layers that `places` gives a place on its axis 0 (None: it has no such axis)."""

        def store(placement: Placement, rows: slice, columns: tuple[int, int]) -> None:
            values = self.tensors[placement.name].read(rows, columns)
            target = slice(placement.start + rows.start, placement.start + rows.stop)
            write(host, places[placement.layer], target, columns, values)

        placed = [placement for placement in self.placed if placement.layer in places]
        with ThreadPoolExecutor(_THREADS) as pool:
            blocks = ((placement, *window) for placement in placed for window in self.tensors[placement.name].blocks())
            for done in [pool.submit(store, *block) for block in blocks]:
                done.result()
        return host


def _storages(
    leaf: Leaf,
    placed: list[Placement],
    tensors: Mapping[str, Tensor],
    model_config: ModelConfig,
    quantization: QuantizationConfig,
) -> list[Storage]:
    """The form of every layer of a leaf, or of the one matrix that it is."""
    layers = max((placement.layer or 0) for placement in placed) + 1
    if any(type(tensor) is not Tensor for tensor in tensors.values()):
        if quantization.quantization == "none" or leaf[0] != "layers":
            return [DENSE] * layers
        of_layer = [[tensors[p.name].storage for p in placed if (p.layer or 0) == i] for i in range(layers)]
        return [common_storage(storages) for storages in of_layer]
    group_size = leaf_group_size(leaf, model_config, quantization)
    storages = [DENSE if group_size is None else Storage("int4", group_size, scale_dtype=SCALE_DTYPE)] * layers
    if quantization.quantization == "dynamic" and group_size is not None:
        for layer, code in _wide_layers(leaf, model_config, quantization).items():
            storages[layer] = DENSE if code == "dense" else Storage("int8", group_size, scale_dtype=SCALE_DTYPE)
    return storages


def _wide_layers(leaf: Leaf, model_config: ModelConfig, quantization: QuantizationConfig) -> dict[int, str]:
    """{layer: "int8" or "dense"} of the entries of `wide_matrices` that name this leaf."""
    known = {
        f"{layer}.{matrix}={code}": (matrix, layer, code)
        for layer in range(model_config.num_layers)
        for matrix in matrix_modules(model_config)
        for code in ("int8", "dense")
    }
    if unknown := [entry for entry in quantization.wide_matrices if entry not in known]:
        raise UserError(
            f"wide_matrices: {unknown[0]!r} names no matrix of this model, expected LAYER.MATRIX=int8 or =dense with a layer "
            f"below {model_config.num_layers} and one of {', '.join(matrix_modules(model_config))}"
        )
    entries = [known[entry] for entry in quantization.wide_matrices]
    return {layer: code for matrix, layer, code in entries if matrix == leaf[-1]}


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


def check_unknown(index: dict[str, TensorInfo], known: set[str], model_config: ModelConfig, path: Path) -> None:
    """UserError if the checkpoint holds tensors that the model has no place for."""
    unknown = [n for n in index if n not in known and not any(fnmatch(n, pattern) for pattern in _IGNORED)]
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
    blocks = row_blocks(embed.shape[0], embed.row_bytes, BLOCK_BYTES)
    if not same or any((read_rows(embed, *rows) != read_rows(head, *rows)).any() for rows in blocks):
        raise UserError(
            f"{path}: config.json ties head and embedding, but {_HEAD} differs from {_EMBED}; set "
            "tie_word_embeddings to false in config.json"
        )
