"""Random layers' inputs for `decode_layers` and `decode_layer`, and what they compute in float64."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import LayerMatrices, LayerMatrix, NewTokens, interleave_gate
from pallas_kernels.codes import fast8_levels
from tests.pallas_kernels.oracles import attention

EPS = 1e-5
LAYERS = 3


class Layers(NamedTuple):
    """Arrays in bfloat16, and the matrices of each layer in float64."""

    attended: Any
    residual: Any
    rows: Any
    norms: tuple[Any, Any]
    matrices: LayerMatrices
    weights: list[dict[str, np.ndarray]]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(N, K) of the matrices."""
        return [weight.shape for weight in self.weights[0].values()]


def random_layers(rng, m: int, width: int, heads: int, ffn: int, qkv: int, group: int = 64) -> Layers:
    """`heads` columns of attention. Sums of the first layer's qkv are exact in float32, whatever their order."""
    shapes = {"qkv": (qkv, width), "out": (width, heads), "gate_up": (2 * ffn, width), "down": (width, ffn)}
    pairs = {name: _matrix(rng, *shape, group, name) for name, shape in shapes.items()}
    attended, residual = (jnp.asarray(rng.normal(size=(m, columns)), jnp.bfloat16) for columns in (heads, width))
    rows = jnp.asarray(rng.integers(-2, 3, (m, width)), jnp.bfloat16)
    scales = [jnp.asarray(rng.uniform(0.5, 1.5, (LAYERS, width)), jnp.bfloat16) for _ in range(2)]
    weights = [{name: weight[layer] for name, (_, weight) in pairs.items()} for layer in range(LAYERS)]
    matrices = LayerMatrices(**{name: matrix for name, (matrix, _) in pairs.items()})
    return Layers(attended, residual, rows, (scales[0], scales[1]), matrices, weights)


def expected(
    layers: Layers, number: int, activation: str, attended: np.ndarray | None = None, residual: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(residual, the next layer's qkv or the last one's normed rows) with the kernel's roundings to bfloat16 between operations.

    Of other rows and another residual than `layers` has, if given.
    """
    own, given, *norms = (np.asarray(a, np.float64) for a in (layers.attended, layers.residual, *layers.norms))
    weights, given = layers.weights[number], given if residual is None else residual
    after = _rounded(given + (own if attended is None else attended) @ weights["out"].T)
    gate, up = np.split(_norm(after, norms[0][number]) @ weights["gate_up"].T, 2, axis=-1)
    inner = gate if activation == "silu" else 2 * (2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    after = _rounded(after + _rounded(gate / (1 + np.exp(-inner)) * up) @ weights["down"].T)
    rows = _norm(after, norms[1][number])
    return after, rows if number == len(layers.weights) - 1 else rows @ layers.weights[number + 1]["qkv"].T


def last_two(layers: Layers, tokens: NewTokens) -> tuple[Layers, NewTokens]:
    """The same without the first layer."""

    def cut(array: Any) -> Any:
        return array[LAYERS - 2 :]

    matrices = LayerMatrices(*(LayerMatrix(*map(cut, matrix)) for matrix in layers.matrices))
    norms = (cut(layers.norms[0]), cut(layers.norms[1]))
    kept = {name: cut(getattr(tokens, name)) for name in ("prompt_k", "prompt_v", "k", "v")}
    kept |= {"norms": tokens.norms and tuple(map(cut, tokens.norms))}
    kept |= {"bias": None if tokens.bias is None else cut(tokens.bias)}
    return layers._replace(norms=norms, matrices=matrices, weights=cut(layers.weights)), tokens._replace(**kept)


def expected_of_all(layers: Layers, tokens: NewTokens, activation: str, scale: float) -> tuple[np.ndarray, ...]:
    """(normed rows after the last layer, keys, values) of all layers, which begin with the residual and rows of `layers`."""
    following = np.asarray(layers.rows, np.float64) @ layers.weights[0]["qkv"].T
    residual = None
    for number in range(len(layers.weights)):
        rows, *caches = expected_attention(tokens, following[None], number, scale)
        k, v = (jnp.asarray(cache, jnp.bfloat16) for cache in caches)
        tokens = tokens._replace(k=k, v=v)
        residual, following = expected(layers, number, activation, rows, residual)
    return following, *caches


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
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
        *map(narrow, prompt),
        jnp.asarray(lengths, jnp.int32),
        *map(narrow, suffix),
        jnp.asarray(slot, jnp.int32),
        (narrow(1 + 0.1 * normal(LAYERS, depth)), narrow(1 + 0.1 * normal(LAYERS, depth))) if normed else None,
        narrow(normal(LAYERS, width)) if biased else None,
    )


def expected_attention(
    tokens: NewTokens, parts: Any, number: int, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows [M, H Hd], keys, values): what new tokens attend to, and the caches with them, rounded where the kernel rounds.

    `parts` are partial sums of qkv, [S, M, (H + 2 K) Hd].
    """
    _, questions, group, kv_heads, _, depth = tokens.k.shape
    qkv = np.asarray(parts, np.float64).sum(axis=0)
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


def _matrix(rng, n: int, k: int, group: int, name: str) -> tuple[LayerMatrix, np.ndarray]:
    packed = rng.integers(0, 256, (LAYERS, n, k)).astype(np.uint8)
    signs = rng.choice([-1, 1], (LAYERS, n, k // group))
    sizes = rng.uniform(0.5, 1.0, signs.shape) / (150 * k**0.5)
    scales = jnp.asarray(signs * (2 ** np.floor(np.log2(sizes)) if name == "qkv" else sizes), jnp.bfloat16)
    weight = fast8_levels(packed, np).astype(np.float64) * np.repeat(np.asarray(scales, np.float64), group, axis=2)
    packed, scales = (interleave_gate(a) if name == "gate_up" else a for a in (jnp.asarray(packed), scales))
    return LayerMatrix(packed, jnp.swapaxes(scales, 1, 2)), weight


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return _rounded(_rounded(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)) * scale)
