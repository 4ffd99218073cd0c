"""A random layer's inputs for `decode_layer`, and what it computes in float64."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import LayerMatrix, NewTokens, interleave_gate
from pallas_kernels.codes import fast8_levels
from tests.pallas_kernels.oracles import attention

EPS = 1e-5
LAYERS = 3


class Layer(NamedTuple):
    """Arrays in bfloat16, and the matrices in float64."""

    attended: Any
    residual: Any
    norms: tuple[Any, Any]
    matrices: list[LayerMatrix]
    weights: list[np.ndarray]


def random_layer(rng, m: int, width: int, heads: int, ffn: int, qkv: int | None, group: int = 64) -> Layer:
    """`heads` columns of attention; qkv None: the last layer."""
    shapes = [(width, heads), (2 * ffn, width), (width, ffn), *([(qkv, width)] if qkv else [])]
    pairs = [_matrix(rng, n, k, group, gate=i == 1) for i, (n, k) in enumerate(shapes)]
    matrices, weights = map(list, zip(*pairs, strict=True))
    attended, residual = (jnp.asarray(rng.normal(size=(m, columns)), jnp.bfloat16) for columns in (heads, width))
    scales = [jnp.asarray(rng.uniform(0.5, 1.5, (LAYERS, width)), jnp.bfloat16) for _ in range(2)]
    return Layer(attended, residual, (scales[0], scales[1]), matrices, weights)


def expected(
    layer: Layer, number: int, activation: str, attended: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(residual, qkv or normed rows) with the kernel's roundings to bfloat16 between operations; of other rows than the layer's, if given."""
    out, gate_up, down, *qkv = layer.weights
    own, residual, *norms = (np.asarray(a, np.float64) for a in (layer.attended, layer.residual, *layer.norms))
    residual = _rounded(residual + (own if attended is None else attended) @ out.T)
    gate, up = np.split(_norm(residual, norms[0][number]) @ gate_up.T, 2, axis=-1)
    inner = gate if activation == "silu" else 2 * (2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    residual = _rounded(residual + _rounded(gate / (1 + np.exp(-inner)) * up) @ down.T)
    rows = _norm(residual, norms[1][number])
    return residual, rows @ qkv[0].T if qkv else rows


def random_tokens(
    rng,
    questions: int,
    group: int,
    kv_heads: int,
    share: int,
    depth: int,
    prompt_slots: int,
    suffix_slots: int,
    slot: int,
    *,
    parts: int = 2,
    normed: bool = True,
    biased: bool = True,
) -> NewTokens:
    """Of caches whose slots out of use hold NaN; prompts have different lengths, the last one all slots."""
    width = kv_heads * (share + 2) * depth

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    prompt = [normal(LAYERS, questions, kv_heads, prompt_slots, depth) for _ in range(2)]
    suffix = [normal(LAYERS, questions, group, kv_heads, suffix_slots, depth) for _ in range(2)]
    lengths = [*rng.integers(1, prompt_slots + 1, questions - 1), prompt_slots]
    for cache in prompt:
        for question, length in enumerate(lengths):
            cache[:, question, :, length:] = np.nan
    for cache in suffix:
        cache[..., slot:, :] = np.nan
    angles = rng.uniform(0, 6, (questions, depth // 2))

    def narrow(array: np.ndarray) -> jnp.ndarray:
        return jnp.asarray(array, jnp.bfloat16)

    return NewTokens(
        jnp.asarray(normal(parts, questions, group, width), jnp.float32),
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
        *map(narrow, prompt),
        jnp.asarray(lengths, jnp.int32),
        *map(narrow, suffix),
        jnp.asarray(slot, jnp.int32),
        (narrow(1 + 0.1 * normal(LAYERS, depth)), narrow(1 + 0.1 * normal(LAYERS, depth))) if normed else None,
        narrow(normal(LAYERS, width)) if biased else None,
    )


def expected_attention(tokens: NewTokens, number: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows [M, H Hd], keys, values): what new tokens attend to, and the caches with them, rounded where the kernel rounds."""
    _, questions, group, kv_heads, _, depth = tokens.k.shape
    qkv = np.asarray(tokens.qkv, np.float64).sum(axis=0)
    qkv = _rounded(qkv if tokens.bias is None else qkv + np.asarray(tokens.bias, np.float64)[number])
    heads = qkv.reshape(questions, group, -1, depth)
    q, new_k, new_v = np.split(heads, [heads.shape[2] - 2 * kv_heads, heads.shape[2] - kv_heads], axis=2)
    if tokens.norms is not None:
        q, new_k = (_norm(x, np.asarray(s, np.float64)[number]) for x, s in zip((q, new_k), tokens.norms, strict=True))
    cos, sin = (_rounded(np.asarray(table))[:, None, None] for table in (tokens.cos, tokens.sin))

    def rotated(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return _rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))

    slot, caches = int(tokens.slot), [np.array(cache, np.float64) for cache in (tokens.k, tokens.v)]
    for cache, new in zip(caches, (rotated(new_k), new_v), strict=True):
        cache[number, :, :, :, slot] = new
    prompt = [np.asarray(cache, np.float64) for cache in (tokens.prompt_k, tokens.prompt_v)]
    lengths = np.asarray(tokens.prompt_lengths)
    rows = attention(rotated(q), *prompt, lengths, *caches, slot + 1, number, scale)
    return rows.reshape(questions * group, -1), caches[0], caches[1]


def _matrix(rng, n: int, k: int, group: int, gate: bool) -> tuple[LayerMatrix, np.ndarray]:
    packed = rng.integers(0, 256, (1, n, k)).astype(np.uint8)
    signs = rng.choice([-1, 1], (1, n, k // group))
    scales = jnp.asarray(signs * rng.uniform(0.5, 1.0, signs.shape) / (150 * k**0.5), jnp.bfloat16)
    weight = fast8_levels(packed[0], np).astype(np.float64) * np.repeat(
        np.asarray(scales, np.float64)[0], group, axis=1
    )
    packed, scales = (interleave_gate(a) if gate else a for a in (jnp.asarray(packed), scales))
    return LayerMatrix(packed, jnp.swapaxes(scales, 1, 2)), weight


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return _rounded(_rounded(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)) * scale)
