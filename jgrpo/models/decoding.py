"""The layers of one decode step, for rows that each hold one token.

The same layer as `Transformer._layer`, cut differently. With few rows a launch costs more than most operations between two
products do, so products leave partial sums (`pallas_kernels.rows`) and what comes next adds them: the rotation and cache
write after qkv, the residual with the following norm after out and down, the gate after gate_up, unless their product and the
gate are one kernel. A layer therefore takes its input normed already and leaves the normed input of the next one. Where no
kernel runs, the jnp twins compute exactly what `_layer` does.

Of a copy that is laid out for it (`pallas_kernels.LayerMatrices`), all layers are one operation, or, where their attentions differ or have none of
that operation's forms, all between two attentions is one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int32

from jgrpo.models.config import ModelConfig
from jgrpo.models.rope import inverse_frequencies, rope_tables
from jgrpo.quantization import LAYERS, gated_matmul, matmul_parts, reads_permuted
from pallas_kernels import (
    LayerMatrices,
    NewTokens,
    Rows,
    add_rms_norm,
    decode_layer,
    decode_layers,
    first_qkv,
    layer_counter,
)

Adapter = dict[str, tuple[Array, Array]]


class DecodeAttend(NamedTuple):
    """The attention of one layer, over a cache."""

    rows: Callable[[Float[Array, "S M N"], bool], tuple[Rows, Any]]
    """Partial sums of qkv, without its bias, and whether to permute the columns of the result -> (the heads' outputs, the cache)."""
    new_tokens: Callable[[], NewTokens] | None
    """What an operation of all layers is given; None: the layers attend differently, or these heads have no such operation."""
    how: dict[str, Any]
    """The scale of scores, their soft-cap, and the window."""
    written: Callable[..., Any]
    """Keys, values and their scales -> the cache."""


Attention: TypeAlias = Callable[[Any, int | Array], DecodeAttend]
"""(cache, layer) -> the layer's attention."""
FOLLOWING_NORM, ROTATIONS = "following_norm", "rotations"
"""The keys of `following_norms` and of `rotations` among a base's layers, where the caller has made them."""


def following_norms(base: Any) -> Float[Array, "L D"]:
    """What follows layer i: the norm in front of layer i + 1, and after the last one the final norm."""
    return jnp.concatenate([base["layers"]["input_norm"][1:], base["final_norm"][None]])


def rotations(config: ModelConfig, positions: int) -> Float32[Array, "2 N R"] | None:
    """cos and sin of so many positions; None where layers rotate differently."""
    if config.local_rope is not None:
        return None
    frequencies = inverse_frequencies(config.rope, config.head_dim, config.context_length)
    return jnp.stack(rope_tables(jnp.arange(positions), frequencies, config.rope.attention_factor))


class DecodeLayers:
    """One step's layers; `adapter` is fused (`jgrpo.lora.fuse`), `dtype` the compute dtype."""

    def __init__(self, config: ModelConfig, base: Any, adapter: Adapter, dtype: Any) -> None:
        self.config, self.weights, self.adapter, self.dtype = config, base["layers"], adapter, dtype
        made = self.weights.get(FOLLOWING_NORM)
        self.following_norm = following_norms(base) if made is None else made

    def run(
        self, residual: Float[Array, "M D"], rows: Rows, cache: Any, attention: Attention, unroll: bool
    ) -> tuple[Float[Array, "M D"], Any]:
        """(normed rows after the last layer, the cache); `rows` are the residual, normed for the first one."""

        def body(layer: int | Array, carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
            residual, ahead, cache = carry
            return self.layer(layer, residual, ahead, attention(cache, layer))

        carry = (residual, self.enter(rows), cache)
        if unroll:
            for layer in range(self.config.num_layers):
                carry = body(layer, carry)
        else:
            carry = lax.fori_loop(0, self.config.num_layers, body, carry)
        _, ahead, cache = carry
        return self.leave(ahead), cache

    def first_permuted(self, rows: int) -> bool:
        """Whether the first layer reads so many rows with permuted columns."""
        return reads_permuted(self.weights["qkv"], 0, rows, self.dtype)

    def enter(self, rows: Rows) -> Any:
        """What the first layer begins with."""
        return rows

    def layer(
        self,
        index: int | Array,
        residual: Float[Array, "M D"],
        rows: Any,
        attend: DecodeAttend,
    ) -> tuple[Float[Array, "M D"], Any, Any]:
        """(residual, its rows normed for what follows, whatever `attend` keeps)."""
        attended, kept = attend.rows(self._product("qkv", index, rows), self._permuted("out", index, residual))
        out = self._product("out", index, attended)
        permuted = self._permuted("gate_up", index, residual)
        residual, rows = self._add(residual, "out", out, self.weights["post_norm"], index, permuted)

        gated = gated_matmul(
            rows,
            self.weights["gate_up"],
            index,
            self.adapter.get("gate_up"),
            activation=self.config.activation,
            bias=self.weights.get("gate_up_bias"),
            permuted=self._permuted("down", index, residual),
        )
        down = self._product("down", index, gated)
        following = min(index + 1, self.config.num_layers - 1) if isinstance(index, int) else index
        permuted = self._permuted("qkv", following, residual)
        return *self._add(residual, "down", down, self.following_norm, index, permuted), kept

    @staticmethod
    def leave(rows: Any) -> Float[Array, "M D"]:
        """What the last layer left."""
        return rows.plain

    def _product(self, name: str, index: int | Array, rows: Rows) -> Float[Array, "S M N"]:
        return matmul_parts(rows, self.weights[name], index, self.adapter.get(name))

    def _permuted(self, name: str, index: int | Array, residual: Array) -> bool:
        return reads_permuted(self.weights[name], index, residual.shape[0], self.dtype)

    def _add(
        self,
        residual: Float[Array, "M D"],
        name: str,
        parts: Float[Array, "S M D"],
        scale: Float[Array, "L D"],
        index: int | Array,
        permuted: bool,
    ) -> tuple[Float[Array, "M D"], Rows]:
        """Add the product `name` to the residual and norm it by row `index` of `scale`."""
        own_norm = {"out": "attention_out_norm", "down": "mlp_out_norm"}.get(name)
        return add_rms_norm(
            residual,
            parts,
            scale,
            layer=index,
            eps=self.config.rms_norm_eps,
            offset=self.config.norm_offset,
            bias=self.weights.get(f"{name}_bias"),
            branch_scale=self.weights[own_norm] if own_norm and self.config.sandwich_norms else None,
            permuted=permuted,
        )


class Ahead(NamedTuple):
    """What a fused layer leaves to the next one."""

    parts: Float[Array, "S M N"] | Float[Array, "M D"]
    """The next layer's qkv as partial sums, or the normed rows after the last."""
    counter: Int32[Array, "2"]
    """Where the kernels' programs meet (`pallas_kernels.decode_layer`)."""


class FusedDecodeLayers(DecodeLayers):
    """The same from `LayerMatrices`; there is no adapter beside them."""

    def __init__(self, config: ModelConfig, base: Any, dtype: Any) -> None:
        super().__init__(config, base, {}, dtype)
        self.matrices: LayerMatrices = self.weights[LAYERS]
        self.norms = (self.weights["post_norm"], self.following_norm)
        self.how: dict[str, Any] = dict(eps=config.rms_norm_eps, activation=config.activation)

    def run(
        self, residual: Float[Array, "M D"], rows: Rows, cache: Any, attention: Attention, unroll: bool
    ) -> tuple[Float[Array, "M D"], Any]:
        """(normed rows after the last layer, the cache); layers that attend apart are written out."""
        attend = attention(cache, 0)
        if attend.new_tokens is None:
            return super().run(residual, rows, cache, attention, unroll=True)
        left, caches = decode_layers(
            attend.new_tokens(), residual, rows, self.norms, self.matrices, **self.how, **attend.how
        )
        return left, attend.written(*caches)

    def first_permuted(self, rows: int) -> bool:
        """Always."""
        return True

    def enter(self, rows: Rows) -> Ahead:
        """The qkv of the first layer."""
        return Ahead(first_qkv(rows, self.matrices), layer_counter())

    def layer(
        self, index: int, residual: Float[Array, "M D"], ahead: Ahead, attend: DecodeAttend
    ) -> tuple[Float[Array, "M D"], Ahead, Any]:
        """(residual, what the next layer begins with, whatever `attend` keeps)."""
        attended, kept = attend.rows(ahead.parts, True)
        residual, *left = decode_layer(
            attended, residual, self.norms, self.matrices, ahead.counter, layer=index, **self.how
        )
        return residual, Ahead(*left), kept

    @staticmethod
    def leave(ahead: Ahead) -> Float[Array, "M D"]:
        """What the last layer left."""
        return ahead.parts
