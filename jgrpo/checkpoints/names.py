"""Where each Hugging Face tensor lies in the base pytree: one table per family, to load and, backwards, to export.

A row of a table is `(tensor name, leaf, modules)`. A leaf that several tensors share (q, k, v; gate, up) holds them
below each other in the order of the table; `modules` names the linear modules whose rows the tensor brings, so that
a family whose checkpoints store them fused is one row with several modules. Rows whose leaf the model does not have
(biases, QK-norm, an untied head) are left out by `placements`: families that differ only in those share a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from jgrpo.lora import module_shapes
from jgrpo.models import ModelConfig, base_shapes

Leaf = tuple[str, ...]
"""Path of a leaf in the base pytree: ("embed",) or ("layers", "qkv")."""

Row = tuple[str, str, tuple[str, ...]]

_LAYER = "model.layers.{}."
LLAMA: tuple[Row, ...] = (
    ("model.embed_tokens.weight", "embed", ()),
    (_LAYER + "input_layernorm.weight", "layers/input_norm", ()),
    (_LAYER + "self_attn.q_proj.weight", "layers/qkv", ("q_proj",)),
    (_LAYER + "self_attn.k_proj.weight", "layers/qkv", ("k_proj",)),
    (_LAYER + "self_attn.v_proj.weight", "layers/qkv", ("v_proj",)),
    (_LAYER + "self_attn.q_proj.bias", "layers/qkv_bias", ("q_proj",)),
    (_LAYER + "self_attn.k_proj.bias", "layers/qkv_bias", ("k_proj",)),
    (_LAYER + "self_attn.v_proj.bias", "layers/qkv_bias", ("v_proj",)),
    (_LAYER + "self_attn.q_norm.weight", "layers/q_norm", ()),
    (_LAYER + "self_attn.k_norm.weight", "layers/k_norm", ()),
    (_LAYER + "self_attn.o_proj.weight", "layers/out", ("o_proj",)),
    (_LAYER + "self_attn.o_proj.bias", "layers/out_bias", ("o_proj",)),
    (_LAYER + "post_attention_layernorm.weight", "layers/post_norm", ()),
    (_LAYER + "mlp.gate_proj.weight", "layers/gate_up", ("gate_proj",)),
    (_LAYER + "mlp.up_proj.weight", "layers/gate_up", ("up_proj",)),
    (_LAYER + "mlp.gate_proj.bias", "layers/gate_up_bias", ("gate_proj",)),
    (_LAYER + "mlp.up_proj.bias", "layers/gate_up_bias", ("up_proj",)),
    (_LAYER + "mlp.down_proj.weight", "layers/down", ("down_proj",)),
    (_LAYER + "mlp.down_proj.bias", "layers/down_bias", ("down_proj",)),
    ("model.norm.weight", "final_norm", ()),
    ("lm_head.weight", "head", ()),
)


def _replace(table: tuple[Row, ...], **rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """`table` with all rows of a leaf (`layers/<name>`) replaced by others."""
    leaves = {f"layers/{name}": new for name, new in rows.items()}
    kept = tuple(row for row in table if row[1] not in leaves)
    return kept + tuple(row for new in leaves.values() for row in new)


PHI3 = _replace(
    LLAMA,
    qkv=((_LAYER + "self_attn.qkv_proj.weight", "layers/qkv", ("qkv_proj",)),),
    gate_up=((_LAYER + "mlp.gate_up_proj.weight", "layers/gate_up", ("gate_up_proj",)),),
)
GEMMA = (
    *_replace(LLAMA, post_norm=((_LAYER + "pre_feedforward_layernorm.weight", "layers/post_norm", ()),)),
    (_LAYER + "post_attention_layernorm.weight", "layers/attention_out_norm", ()),
    (_LAYER + "post_feedforward_layernorm.weight", "layers/mlp_out_norm", ()),
)
TABLES: Mapping[str, tuple[Row, ...]] = {"phi3": PHI3, "gemma2": GEMMA, "gemma3_text": GEMMA}
"""Of the families whose tensors are not named like Llama's."""

MATRICES: frozenset[Leaf] = frozenset(
    {("embed",), ("head",), *(("layers", name) for name in ("qkv", "out", "gate_up", "down"))}
)
"""Leaves that can be stored in four bits."""


@dataclass(frozen=True)
class Placement:
    """One tensor of a checkpoint and its place."""

    name: str
    """Hugging Face tensor name."""
    leaf: Leaf
    layer: int | None
    """Index on axis 0 of a stacked leaf; None for embedding, head and final norm."""
    start: int
    """First row of the tensor within the leaf (of that layer)."""
    shape: tuple[int, ...]
    """The tensor's own shape."""
    modules: tuple[str, ...]
    """Linear modules whose rows these are; empty for the others."""

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.shape[0]

    @property
    def module(self) -> str:
        """Leaf name of the Hugging Face module, as in `skip_modules`: q_proj, embed_tokens, lm_head, ..."""
        return self.name.split(".")[-2]


def leaf_shapes(config: ModelConfig) -> dict[Leaf, tuple[int, ...]]:
    """Unquantized shape of every leaf of the base pytree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(base_shapes(config))
    return {tuple(key.key for key in path): struct.shape for path, struct in flat}


def placements(config: ModelConfig) -> dict[Leaf, list[Placement]]:
    """Every tensor that a checkpoint of this model holds, by leaf, in the order of the layers and rows."""
    shapes = leaf_shapes(config)
    by_leaf: dict[Leaf, list[Row]] = {}
    for row in TABLES.get(config.family, LLAMA):
        leaf = tuple(row[1].split("/"))
        if leaf in shapes:
            by_leaf.setdefault(leaf, []).append(row)
    return {leaf: _place(leaf, rows, shapes[leaf], config) for leaf, rows in by_leaf.items()}


def in_order_of_layers(config: ModelConfig) -> list[Placement]:
    """Every tensor, those without a layer first: the order in which a merged model is written, as it is computed."""
    placed = [placement for group in placements(config).values() for placement in group]
    return sorted(placed, key=lambda placement: -1 if placement.layer is None else placement.layer)


def _place(leaf: Leaf, rows: list[Row], shape: tuple[int, ...], config: ModelConfig) -> list[Placement]:
    outs = {module: out for module, (out, _) in module_shapes(config).items()}
    layers: list[int | None] = list(range(shape[0])) if leaf[0] == "layers" else [None]
    matrix = shape if leaf[0] != "layers" else shape[1:]
    placed = []
    for layer in layers:
        start = 0
        for name, _, modules in rows:
            own = (sum(outs[m] for m in modules) or matrix[0], *matrix[1:])
            placed.append(Placement(name.format(layer), leaf, layer, start, own, modules))
            start += own[0]
    return placed


def modules_of(leaf: Leaf, config: ModelConfig) -> set[str]:
    """Hugging Face module names that share a leaf: {"gate_proj", "up_proj"}; a tied embedding is the head too."""
    names = {placement.module for placement in placements(config)[leaf]}
    return names | {"lm_head"} if leaf == ("embed",) and config.tie_embeddings else names


def adapter_prefixes(config: ModelConfig) -> dict[str, list[str]]:
    """`{module: [its Hugging Face name in layer 0, 1, …]}` of the linear modules: where PEFT puts adapters."""
    prefixes: dict[str, list[str]] = {}
    for leaf, placed in placements(config).items():
        for placement in placed:
            if leaf in MATRICES and placement.modules:
                (module,) = placement.modules
                prefixes.setdefault(module, []).append(placement.name.removesuffix(".weight"))
    return prefixes
