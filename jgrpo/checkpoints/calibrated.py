"""Round the matrices of a merged model to four bits one layer at a time, each against the inputs that it will meet.

Rows of tokens run through two models side by side: the exact one (base + adapter) and the one being written. A layer's matrices
are rounded in the order in which they are applied, by `jgrpo.checkpoints.gptq_rounding`; a matrix's inputs are computed when all
before it are rounded (the paper's code calls that true_sequential), so that it makes up for their errors too.

In memory at a time, in float32: one layer's weights twice, the rows' activations twice ([tokens, D]), those inside one layer for
`CHUNK_TOKENS` tokens, and up to nine matrices [K, K] of the widest input K (H and D of both halves of the tokens and of all, three while
H is factored): 7.4 GB where K is 14,336 (Llama 8B), 2.9 GB where it is 8,960 (Qwen2.5 1.5B).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from jgrpo.checkpoints.gptq_rounding import Moments, round_to_inputs
from jgrpo.checkpoints.merged import Rows, blocks_of
from jgrpo.checkpoints.names import Placement, placements
from jgrpo.models import ModelConfig, Transformer
from jgrpo.models.rope import for_positions
from jgrpo.quantization import Int4Weight, dequantize

MATRICES_IN_ORDER = ("qkv", "out", "gate_up", "down")
CHUNK_TOKENS = 4096
"""Tokens that are computed together."""
LENGTH_STEP = 128
"""Rows are padded to a multiple of this, so that few programs are compiled."""

Layer = dict[str, Any]
Halves = tuple[Moments, Moments]


@dataclass(frozen=True)
class Chunk:
    """A few rows of similar length."""

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]
    second: Bool[np.ndarray, " B"]
    """Rows of the second half."""

    @property
    def real(self) -> Bool[np.ndarray, "B T"]:
        """Where the tokens are."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def halves(self) -> tuple[Bool[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Where the tokens of either half are."""
        second = self.second[:, None]
        return self.real & ~second, self.real & second


def chunks_of(rows: Sequence[Sequence[int]]) -> list[Chunk]:
    """Rows of tokens, padded and put together by their lengths; what fills up a chunk are rows of length 0.

    Of rows of about the same length every other one is of the second half, and rows that are the same are of the same half.
    """
    by_width: dict[int, list[tuple[Sequence[int], bool]]] = {}
    distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
    second = {row: number % 2 == 1 for number, row in enumerate(distinct)}
    for row in sorted(rows, key=len):
        width = -(-len(row) // LENGTH_STEP) * LENGTH_STEP
        by_width.setdefault(width, []).append((row, second[tuple(row)]))
    return [
        _chunk(members[start : start + size], width, size)
        for width, members in by_width.items()
        for size in [min(len(members), max(1, CHUNK_TOKENS // width))]
        for start in range(0, len(members), size)
    ]


def _chunk(rows: Sequence[tuple[Sequence[int], bool]], width: int, size: int) -> Chunk:
    chunk = Chunk(np.zeros((size, width), np.int32), np.zeros(size, np.int32), np.zeros(size, np.bool_))
    for i, (row, is_second) in enumerate(rows):
        chunk.tokens[i, : len(row)], chunk.lengths[i], chunk.second[i] = row, len(row), is_second
    return chunk


class CalibratedRounding:
    """Rounds the matrices of one model on some rows of tokens; to be asked for them in the order of the layers."""

    def __init__(self, model_config: ModelConfig, rows: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, rows))
        self.model = Transformer(for_positions(model_config, longest), dtype=jnp.float32)
        self.chunks = chunks_of(rows)
        self.plan = placements(model_config)
        self.layer = -1
        self.exact: list[Array] = []
        self.rounded: list[Array] = []
        self.weights: dict[str, Int4Weight] = {}

    def __call__(self, placement: Placement, rows: Rows, group_size: int, scale_dtype: Any) -> Int4Weight:
        """The tensor in four bits, on the host; computes its layer if it is the next one.

        Raises UserError where the inputs of a matrix are not finite.
        """
        assert placement.layer is not None
        if placement.layer != self.layer:
            assert placement.layer == self.layer + 1, "layers are rounded in their order"
            self._next_layer(rows, group_size, scale_dtype)
        window = slice(placement.start, placement.stop)
        return jax.tree.map(lambda part: np.asarray(part[window]), self.weights[placement.leaf[-1]])

    def _next_layer(self, rows: Rows, group_size: int, scale_dtype: Any) -> None:
        if self.layer < 0:
            self.exact = list(self._embedded(rows))
            self.rounded = list(self.exact)
        self.layer += 1
        exact = self._layer_weights(rows)
        rounded = dict(exact)
        for name in MATRICES_IN_ORDER:
            if exact[name].shape[1] % group_size:
                continue  # stays as it is
            halves = self._moments(name, exact, rounded)
            self.weights[name] = round_to_inputs(exact[name], halves, group_size, scale_dtype)
            rounded[name] = dequantize(self.weights[name], jnp.float32)
        for xs, weights in ((self.exact, exact), (self.rounded, rounded)):
            for i, chunk in enumerate(self.chunks):
                xs[i] = _output(self.model, xs[i], chunk.lengths, weights, self.layer)

    def _embedded(self, rows: Rows) -> Iterator[Float[Array, "B T D"]]:
        """Embeddings of every chunk; the table is read a block at a time."""
        (table,) = self.plan["embed",]
        used = np.unique(np.concatenate([chunk.tokens.reshape(-1) for chunk in self.chunks]))
        found = np.concatenate(
            [
                rows(table, start, stop)[used[(used >= start) & (used < stop)] - start]
                for start, stop in blocks_of(table)
            ]
        ).astype(np.float32)
        for chunk in self.chunks:
            yield jnp.asarray(found[np.searchsorted(used, chunk.tokens)]) * self.model.config.embedding_scale

    def _layer_weights(self, rows: Rows) -> Layer:
        """The exact weights of the layer, without an axis of layers."""
        layer: Layer = {}
        for leaf, placed in self.plan.items():
            own = [placement for placement in placed if leaf[0] == "layers" and placement.layer == self.layer]
            if own:
                parts = [rows(placement, 0, placement.shape[0]).astype(np.float32) for placement in own]
                layer[leaf[-1]] = jnp.asarray(np.concatenate(parts))
        return layer

    def _moments(self, name: str, exact: Layer, rounded: Layer) -> Halves:
        """Of the inputs of one matrix."""
        width = exact[name].shape[1]
        first, second = (Moments(*(jnp.zeros((width, width)) for _ in range(2))) for _ in range(2))
        halves = first, second
        for chunk, *xs in zip(self.chunks, self.exact, self.rounded, strict=True):
            halves = _add_moments(
                self.model, name, halves, xs, chunk.lengths, chunk.halves, (exact, rounded), self.layer
            )
        return halves


@functools.partial(jax.jit, static_argnames=("model", "name"), donate_argnames="sums")
def _add_moments(
    model: Transformer,
    name: str,
    sums: Halves,
    xs: Sequence[Array],
    lengths: Array,
    halves: tuple[Array, Array],
    weights: tuple[Layer, Layer],
    layer: Array,
) -> Halves:
    """H + x̂ x̂ᵀ and D + (x - x̂) x̂ᵀ over each half of a chunk's tokens; what stands behind the matrix is not computed."""

    def added(sums: Moments, tokens: Array) -> Moments:
        exact, rounded = (jnp.where(tokens[..., None], x, 0).reshape(-1, x.shape[-1]) for x in inputs)
        return Moments(sums.inputs + rounded.T @ rounded, sums.drift + (exact - rounded).T @ rounded)

    with jax.default_matmul_precision("highest"):
        inputs = [_applied(model, x, lengths, own, layer)[1][name] for x, own in zip(xs, weights, strict=True)]
        return added(sums[0], halves[0]), added(sums[1], halves[1])


@functools.partial(jax.jit, static_argnames="model")
def _output(model: Transformer, x: Array, lengths: Array, weights: Layer, layer: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return _applied(model, x, lengths, weights, layer)[0]


def _applied(model: Transformer, x: Array, lengths: Array, weights: Layer, layer: Array) -> Any:
    # No row is empty to the model: what fills up a chunk has a token, which `halves` leaves out.
    return model.apply({}, x, jnp.maximum(lengths, 1), weights, layer, method="layer_inputs")
