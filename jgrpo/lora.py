"""The adapter: y = W x + scale · B A x (Hu et al. 2021, arXiv:2106.09685), with PEFT's init, scale and layout.

An adapter is a plain pytree `{module: {"a": [L, R, in], "b": [L, out, R]}}`, separate from the frozen base; `{}` is the
base model itself. q, k and v (and gate and up) read the same input and are one matrix in the base, so `fuse`
stacks their A's and lays their B's out block-diagonally: one adapter matmul for each base matmul. Deviation
from PEFT: modules fused this way share one dropout mask.

In full fine-tuning what is trained is the model itself: wherever a policy is given by its adapter, it may be given by
`{"weights": …}` instead, a whole base tree that takes the place of the frozen one (`variables_of`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from jgrpo.config import LINEAR_MODULES, LoraConfig
from jgrpo.errors import UserError
from jgrpo.gradient_sums import entered

if TYPE_CHECKING:  # `jgrpo.models` stands above this module and imports it
    from jgrpo.models.config import ModelConfig

Params = Mapping[str, Any]
WEIGHTS = "weights"
"""Key of a policy that is a whole model and no adapter; not the name of a module."""

_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_FUSED_IN_CHECKPOINT = _FUSED | {"qkv": ("qkv_proj",), "gate_up": ("gate_up_proj",)}
ALL_MODULES = (*LINEAR_MODULES, "qkv_proj", "gate_up_proj")
"""Names that linear layers have in checkpoints."""


def variables_of(base: Params, policy: Params) -> dict[str, Params]:
    """What a `Transformer` is applied to: the base with the policy's adapter, or the policy's own weights.

    What is `Summed` of the policy (`jgrpo.gradient_sums`) stays so in the layers only, which the training forward scans.
    """
    if WEIGHTS in policy:
        weights = policy[WEIGHTS]
        outside = {name: leaf for name, leaf in weights.items() if name != "layers"}
        return {"params": {**entered(outside), "layers": weights["layers"]}, "lora": {}}
    return {"params": base, "lora": policy}


def matrix_modules(config: "ModelConfig") -> Mapping[str, tuple[str, ...]]:
    """The base's matrices and the checkpoint's linear modules in each, in the order of their rows."""
    return _FUSED_IN_CHECKPOINT if config.fused_projections else _FUSED


def module_shapes(config: "ModelConfig") -> dict[str, tuple[int, int]]:
    """`(out, in)` of every linear module of the checkpoint, which is what adapters are attached to."""
    q, k, v = config.qkv_splits
    width, mlp = config.hidden_size, config.intermediate_size
    shapes = ((q, width), (k, width), (v, width), (width, q), (mlp, width), (mlp, width), (width, mlp))
    single: dict[str, tuple[int, int]] = dict(zip(LINEAR_MODULES, shapes, strict=True))
    return {
        module: single[module] if module in single else (sum(single[part][0] for part in parts), width)
        for (matrix, modules), parts in zip(matrix_modules(config).items(), _FUSED.values(), strict=True)
        for module in modules
    }


def own_modules(names: Iterable[str], config: "ModelConfig") -> tuple[str, ...]:
    """The checkpoint's modules that `names` stand for: q_proj is qkv_proj where a family stores q, k and v as one.

    Raises UserError for a name that is no linear layer.
    """
    renamed: dict[str, str] = {name: name for name in (*LINEAR_MODULES, *module_shapes(config))}
    for matrix, modules in matrix_modules(config).items():
        if len(modules) == 1:
            renamed |= dict.fromkeys(_FUSED[matrix], modules[0])
    if unknown := [name for name in names if name not in renamed]:
        raise UserError(
            f"target_modules: {unknown[0]!r} is not a linear layer; expected some of {', '.join(module_shapes(config))}"
        )
    wanted = {renamed[name] for name in names}
    return tuple(name for name in module_shapes(config) if name in wanted)


def init_lora(key: Array, lora_config: LoraConfig, config: "ModelConfig") -> dict[str, dict[str, Array]]:
    """A fresh float32 adapter: A Kaiming-uniform as in PEFT, B zero, so that policy == reference at step 0."""
    shapes = module_shapes(config)
    rank = lora_config.lora_rank

    def module(key: Array, out: int, width: int) -> dict[str, Array]:
        # kaiming_uniform_(a=√5) is uniform in ±1/√fan_in.
        bound = 1 / math.sqrt(width)
        a = jax.random.uniform(key, (config.num_layers, rank, width), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((config.num_layers, out, rank), jnp.float32)}

    targets = own_modules(lora_config.target_modules, config)
    keys = jax.random.split(key, len(targets))
    return {name: module(k, *shapes[name]) for name, k in zip(targets, keys, strict=True)}


def fuse(lora: Params, config: "ModelConfig", scale: float, dtype: Any) -> dict[str, tuple[Array, Array]]:
    """`{matrix: (a [..., ΣR, in], b [..., N, ΣR])}` for the base's matrices, with `scale` in `a`.

    Works on the stacked adapter and on one layer's slice of it alike.
    """
    shapes = module_shapes(config)
    fused = {}
    for matrix, names in matrix_modules(config).items():
        present = [name for name in names if name in lora]
        if present:
            a = jnp.concatenate([lora[name]["a"] for name in present], axis=-2)
            b = _block_diagonal([(lora.get(name), shapes[name][0]) for name in names])
            fused[matrix] = ((scale * a).astype(dtype), b.astype(dtype))
    return fused


def _block_diagonal(parts: list[tuple[Params | None, int]]) -> Array:
    """B's of the modules below each other, each in its own columns; rows of an untargeted module are zero."""
    ranks = [0 if part is None else part["b"].shape[-1] for part, _ in parts]
    blocks, before = [], 0
    lead = next(part["b"].shape[:-2] for part, _ in parts if part is not None)
    for (part, rows), rank in zip(parts, ranks, strict=True):
        body = jnp.zeros((*lead, rows, 0)) if part is None else part["b"]
        pad = [(0, 0)] * (body.ndim - 1) + [(before, sum(ranks) - before - rank)]
        blocks.append(jnp.pad(body, pad))
        before += rank
    return jnp.concatenate(blocks, axis=-2)


def layer_slice(lora: Params, layer: int | Array) -> Params:
    """The adapter of one layer."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), lora)


def module_delta(lora: Params, name: str, scale: float) -> Array:
    """scale · B A `[L, out, in]` of one module in float32: what merging adds to its weight."""
    return scale * jnp.einsum("lnr,lrk->lnk", lora[name]["b"], lora[name]["a"], precision=jax.lax.Precision.HIGHEST)
