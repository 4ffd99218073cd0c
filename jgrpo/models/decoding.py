"""The layers of one decode step, for rows that each hold one token.

The same layer as `Transformer._layer`, cut differently. With few rows a launch costs more than most operations between two
products do, so products leave partial sums (`pallas_kernels.rows`) and what comes next adds them: the rotation and cache
write after qkv, the residual with the following norm after out and down, the gate after gate_up, unless their product and the
gate are one kernel. A layer therefore takes its input normed already and leaves the normed input of the next one. Where no
kernel runs, the jnp twins compute exactly what `_layer` does.

Of a copy that is laid out for it (`LayerWeights`), an attention and all up to the next layer's qkv is one operation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from jgrpo.models.config import ModelConfig
from jgrpo.quantization import LAYERS, LayerWeights, gated_matmul, matmul_parts, reads_permuted
from pallas_kernels import NewTokens, Rows, add_rms_norm, decode_layer, layer_counter

Adapter = dict[str, tuple[Array, Array]]


class DecodeAttend(NamedTuple):
    """The attention of one layer, over a cache."""

    rows: Callable[[Float[Array, "S M N"], bool], tuple[Rows, Any]]
    """Partial sums of qkv, without its bias, and whether to permute the columns of the result -> (the heads' outputs, the cache)."""
    new_tokens: Callable[[Float[Array, "S M N"]], NewTokens] | None
    """The same sums -> what a kernel that begins with the attention is given; None: these heads have no such kernel."""
    how: dict[str, Any]
    """The scale of scores, their soft-cap, and the window."""
    written: Callable[..., Any]
    """Keys, values and their scales -> the cache."""


FOLLOWING_NORM = "following_norm"
"""The key of `following_norms` among a base's layers, where the caller has made them."""


def following_norms(base: Any) -> Float[Array, "L D"]:
    """What follows layer i: the norm in front of layer i + 1, and after the last one the final norm."""
    return jnp.concatenate([base["layers"]["input_norm"][1:], base["final_norm"][None]])


class DecodeLayers:
    """One step's layers; `adapter` is fused (`jgrpo.lora.fuse`), `dtype` the compute dtype."""

    def __init__(self, config: ModelConfig, base: Any, adapter: Adapter, dtype: Any) -> None:
        self.config, self.weights, self.adapter, self.dtype = config, base["layers"], adapter, dtype
        made = self.weights.get(FOLLOWING_NORM)
        self.following_norm = following_norms(base) if made is None else made

    def enter(self, residual: Float[Array, "M D"]) -> Rows:
        """The normed input of the first layer."""
        return self._add(residual, None, None, self.weights["input_norm"], 0, self._permuted("qkv", 0, residual))[1]

    def layer(
        self,
        index: int | Array,
        residual: Float[Array, "M D"],
        rows: Rows,
        attend: DecodeAttend,
    ) -> tuple[Float[Array, "M D"], Rows, Any]:
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
    def leave(rows: Rows) -> Float[Array, "M D"]:
        """What the last layer left."""
        return rows.plain

    def _product(self, name: str, index: int | Array, rows: Rows) -> Float[Array, "S M N"]:
        return matmul_parts(rows, self.weights[name], index, self.adapter.get(name))

    def _permuted(self, name: str, index: int | Array, residual: Array) -> bool:
        return reads_permuted(self.weights[name], index, residual.shape[0], self.dtype)

    def _add(
        self,
        residual: Float[Array, "M D"],
        name: str | None,
        parts: Float[Array, "S M D"] | None,
        scale: Float[Array, "L D"],
        index: int | Array,
        permuted: bool,
    ) -> tuple[Float[Array, "M D"], Rows]:
        """Add the product `name` to the residual and norm it by row `index` of `scale`."""
        own_norm = {"out": "attention_out_norm", "down": "mlp_out_norm"}.get(name or "")
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
    """The same from `LayerWeights`; its layers are unrolled, and there is no adapter beside them."""

    def __init__(self, config: ModelConfig, base: Any, dtype: Any) -> None:
        copy: LayerWeights = base["layers"][LAYERS]
        super().__init__(config, {**base, "layers": {**base["layers"], "qkv": copy.first_qkv}}, {}, dtype)
        self.copy = copy

    def enter(self, residual: Float[Array, "M D"]) -> Ahead:
        """The qkv of the first layer."""
        return Ahead(self._product("qkv", 0, super().enter(residual)), layer_counter())

    def layer(
        self, index: int, residual: Float[Array, "M D"], ahead: Ahead, attend: DecodeAttend
    ) -> tuple[Float[Array, "M D"], Ahead, Any]:
        """(residual, what the next layer begins with, whatever `attend` keeps)."""
        if attend.new_tokens is None:
            attended, kept = attend.rows(ahead.parts, True)
        else:
            attended, kept = attend.new_tokens(ahead.parts), None
        residual, parts, counter, caches = decode_layer(
            attended,
            residual,
            (self.weights["post_norm"], self.following_norm),
            self.copy.layers[index],
            ahead.counter,
            layer=index,
            eps=self.config.rms_norm_eps,
            activation=self.config.activation,
            **attend.how,
        )
        return residual, Ahead(parts, counter), kept if caches is None else attend.written(*caches)

    @staticmethod
    def leave(ahead: Ahead) -> Float[Array, "M D"]:
        """What the last layer left."""
        return ahead.parts
