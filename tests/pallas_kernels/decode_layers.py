"""A random layer's inputs for `decode_layer`, and what it computes in float64."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import AttentionParts, LayerMatrix, interleave_gate
from pallas_kernels.codes import fast8_levels

EPS = 1e-5
LAYERS = 3


class Layer(NamedTuple):
    """Arrays in bfloat16, and the matrices in float64."""

    attended: Any
    parts: AttentionParts | None
    """What is to be merged to `attended`; None: it was never in parts."""
    residual: Any
    norms: tuple[Any, Any]
    matrices: list[LayerMatrix]
    weights: list[np.ndarray]


def random_layer(
    rng, m: int, width: int, heads: int, ffn: int, qkv: int | None, depth: int | None = None, group: int = 64
) -> Layer:
    """`heads` columns of attention, in heads of `depth` where they are in parts; qkv None: the last layer."""
    shapes = [(width, heads), (2 * ffn, width), (width, ffn), *([(qkv, width)] if qkv else [])]
    pairs = [_matrix(rng, n, k, group, gate=i == 1) for i, (n, k) in enumerate(shapes)]
    matrices, weights = map(list, zip(*pairs, strict=True))
    parts = None if depth is None else _parts(rng, m * heads // depth, depth)
    attended = rng.normal(size=(m, heads)) if parts is None else _merged(parts).reshape(m, heads)
    attended, residual = (jnp.asarray(a, jnp.bfloat16) for a in (attended, rng.normal(size=(m, width))))
    scales = [jnp.asarray(rng.uniform(0.5, 1.5, (LAYERS, width)), jnp.bfloat16) for _ in range(2)]
    return Layer(attended, parts, residual, (scales[0], scales[1]), matrices, weights)


def expected(layer: Layer, number: int, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """(residual, qkv or normed rows) with the kernel's roundings to bfloat16 between operations."""
    out, gate_up, down, *qkv = layer.weights
    attended, residual, *norms = (np.asarray(a, np.float64) for a in (layer.attended, layer.residual, *layer.norms))
    residual = _rounded(residual + attended @ out.T)
    gate, up = np.split(_norm(residual, norms[0][number]) @ gate_up.T, 2, axis=-1)
    inner = gate if activation == "silu" else 2 * (2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    residual = _rounded(residual + _rounded(gate / (1 + np.exp(-inner)) * up) @ down.T)
    rows = _norm(residual, norms[1][number])
    return residual, rows @ qkv[0].T if qkv else rows


def _matrix(rng, n: int, k: int, group: int, gate: bool) -> tuple[LayerMatrix, np.ndarray]:
    packed = rng.integers(0, 256, (1, n, k)).astype(np.uint8)
    signs = rng.choice([-1, 1], (1, n, k // group))
    scales = jnp.asarray(signs * rng.uniform(0.5, 1.0, signs.shape) / (150 * k**0.5), jnp.bfloat16)
    weight = fast8_levels(packed[0], np).astype(np.float64) * np.repeat(
        np.asarray(scales, np.float64)[0], group, axis=1
    )
    packed, scales = (interleave_gate(a) if gate else a for a in (jnp.asarray(packed), scales))
    return LayerMatrix(packed, jnp.swapaxes(scales, 1, 2)), weight


def _parts(rng, heads: int, depth: int, splits: int = 3) -> AttentionParts:
    """The first part of some heads saw nothing, and its values are NaN."""
    stats = np.stack([rng.normal(size=(heads, splits)), rng.uniform(0.5, 2, (heads, splits))], axis=-1)
    values = rng.normal(size=(heads, splits, depth))
    stats[::3, 0], values[::3, 0] = (-np.inf, 0), np.nan
    return AttentionParts(jnp.asarray(stats, jnp.float32), jnp.asarray(values, jnp.float32))


def _merged(parts: AttentionParts) -> np.ndarray:
    (highest, total), values = (
        np.moveaxis(np.asarray(parts.stats, np.float64), 2, 0),
        np.asarray(parts.values, np.float64),
    )
    weights = np.exp2(highest - highest.max(axis=1, keepdims=True))
    summed = np.where(weights[..., None] > 0, values, 0) * weights[..., None]
    return summed.sum(axis=1) / (total * weights).sum(axis=1, keepdims=True)


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return _rounded(_rounded(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)) * scale)
