"""The one decoder-only transformer: rollout, old policy, reference and training forward are all this module.

`model.apply({"params": base, "lora": lora}, …)`: with an adapter it is the policy, with `lora = {}` the reference. Layers are
stacked `[L, …]`, and a layer reads its weights by index: whole-sequence forwards scan over the index; decoding
loops over it and hands stacks and index to the kernels, which add an offset instead of slicing a copy.
Weights that come as one array for each layer (a tuple), or in forms that differ between layers (`MixedWeight`), are
decoded in an unrolled loop: nothing to slice, nothing to choose at run time.

Linen is used for what it gives here, the split of the collections and a hashable module; parameters are plain
pytrees (`base_shapes` states them), because `Int4Weight` leaves and stacked layers are not Linen's own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

import pallas_kernels
from jgrpo.config import LoraConfig
from jgrpo.gradient_sums import Summed, scan_layers
from jgrpo.lora import fuse, layer_slice
from jgrpo.models.attention import causal_attention
from jgrpo.models.cache import KVCache
from jgrpo.models.config import ModelConfig
from jgrpo.models.decoding import ROTATIONS, DecodeAttend, DecodeLayers, FusedDecodeLayers, rotations
from jgrpo.models.linear import PRODUCT, LayerProducts, Observe, of_layer
from jgrpo.models.packed_rows import PackedRows
from jgrpo.models.parameters import init_base
from jgrpo.models.rope import apply_rope, check_positions, inverse_frequencies, rope_tables
from jgrpo.models.shared_prompt import SharedPrompt
from jgrpo.quantization import LAYERS, MixedWeight, Weight, embed, matmul
from pallas_kernels import (
    ACTIVATIONS,
    BegunStep,
    NewTokens,
    Positions,
    Rotations,
    Rows,
    joined,
    rms_norm,
    unpermute_columns,
)
from pallas_kernels.rope_cache import write as write_slot

Attend = Callable[[Array], tuple[Array, Any]]
"""q, k and v of one layer as projected -> (attention output, whatever the caller keeps of k and v)."""

PROPOSAL_HEAD = "proposal_head"
"""The key, among the base's parameters in a rollout, of a copy of the head in 8 bits (`Transformer.proposal_logits`)."""
LAYER_INPUT = "layer_input"
"""What remat keeps of a layer, by its name for checkpoint policies."""
OFFLOAD_LAYER_INPUTS = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[LAYER_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)
"""Without remat: the backward repeats what memory bandwidth pays for (norms, gates, the attention), and no matrix product.
Keeping every activation instead would be three times the memory and, on an H200, no faster: writing them costs as much."""


def positions_in_segments(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Distance of every position to the start of its run of equal segment numbers."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    starts = segments != jnp.roll(segments, 1, axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


class Transformer(nn.Module):
    """Hashable, so a static argument of `jit`; `lora` gives the adapter's scale and dropout, `dtype` the compute dtype."""

    config: ModelConfig
    lora: LoraConfig = LoraConfig()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        *,
        segments: Int[Array, "B T"] | None = None,
        shared: SharedPrompt | PackedRows | None = None,
        remat: bool = False,
        offload: bool = False,
        dropout: bool = False,
    ) -> Float[Array, "B T D"]:
        """Final hidden states (normed) of right-padded rows, each starting at position 0.

        `segments` numbers the sequences packed into a row, neighbours differently: none sees another, and each starts at
        position 0. With `shared`, tokens and result are `[Q, P + G·C]` (a prompt, its completions), or all of them without
        padding in one row, and `lengths` those of the rows (prompt and completion) that they stand for. `remat` recomputes
        each layer in the backward from its input, which `offload` keeps in pinned host memory, and without it products are
        kept; `dropout` draws the adapter's mask from the rng "dropout".
        """
        base, lora = self._base(), self._lora()
        positions = self._positions(tokens, segments, shared)
        key = self.make_rng("dropout") if dropout and self.lora.lora_dropout > 0 else None

        # What a layer reads of these is an input of the scan, so that their gradient is an output of its backward, or added to a
        # sum, a layer at a time; of an array that the body indexed, every layer would add a gradient of all layers. Packed
        # weights have no gradient, and the kernels read them at their place in the stack.
        sliced = {name: leaf for name, leaf in base["layers"].items() if isinstance(leaf, Array | Summed)}

        def body(x: Array, layer: Array, slices: tuple[Any, Any]) -> Array:
            own, own_lora = slices
            weights = {**base["layers"], **own}

            def attend(qkv: Array) -> tuple[Array, None]:
                q, k, v = self._heads(qkv, positions, weights, layer)
                if shared is None:
                    return self._attention(q, k, v, lengths, layer, segments), None
                q, k, v = (shared.rows(part) for part in (q, k, v))
                return shared.sequences(self._attention(q, k, v, lengths, layer)), None

            x = checkpoint_name(x, LAYER_INPUT)
            layer_key = None if key is None else jax.random.fold_in(key, layer)
            adapter = fuse(own_lora, self.config, self.lora.scale, self.dtype)
            return self._layer(x, weights, layer, adapter, attend, layer_key)[0]

        recomputed = OFFLOAD_LAYER_INPUTS if offload else jax.checkpoint_policies.nothing_saveable
        body = jax.checkpoint(body, prevent_cse=False, policy=recomputed if remat else KEEP_PRODUCTS)
        x = scan_layers(body, self._embed(base, tokens), (sliced, lora), self.config.num_layers)
        return self._norm(x, base["final_norm"])

    @nn.compact
    def layer_inputs(
        self, x: Float[Array, "B T D"], lengths: Int[Array, " B"], weights: Any, layer: int | Array
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T K"]]]:
        """One layer of right-padded rows: its output, and the input of each of its matrices.

        `weights` are the base's `layers`, or one layer's own, whose leaves then have no axis of layers; nothing else of the base is read.
        """
        positions, inputs = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), {}

        def attend(qkv: Array) -> tuple[Array, None]:
            q, k, v = self._heads(qkv, positions, weights, layer)
            return self._attention(q, k, v, lengths, layer), None

        x, _ = self._layer(x, weights, layer, {}, attend, observe=inputs.__setitem__)
        return x, inputs

    @nn.compact
    def input_moments(self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> dict[str, Float[Array, "L K"]]:
        """Mean square of every input of every linear layer, over the tokens of the rows: what rounding errors meet."""
        base = self._base()
        real = (jnp.arange(tokens.shape[1]) < lengths[:, None])[..., None]

        def moment(x: Array) -> Array:
            return jnp.where(real, jnp.square(x.astype(jnp.float32)), 0).sum((0, 1)) / real.sum()

        def body(x: Array, layer: Array) -> tuple[Array, dict[str, Array]]:
            x, inputs = self.layer_inputs(x, lengths, base["layers"], layer)
            return x, jax.tree.map(moment, inputs)

        return jax.lax.scan(body, self._embed(base, tokens), jnp.arange(self.config.num_layers))[1]

    @nn.compact
    def prefill(
        self, tokens: Int[Array, "Q P"], lengths: Int[Array, " Q"]
    ) -> tuple[Float[Array, "Q D"], tuple[Float[Array, "L Q K P Hd"], Float[Array, "L Q K P Hd"]]]:
        """Hidden state (normed) of each prompt's last token, and the keys and values of every layer."""
        base, lora = self._base(), self._lora()
        self._check_positions(tokens.shape[1])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def body(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
            def attend(qkv: Array) -> tuple[Array, tuple[Array, Array]]:
                q, k, v = self._heads(qkv, positions, base["layers"], layer)
                kept = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
                return self._attention(q, k, v, lengths, layer), kept

            adapter = fuse(layer_slice(lora, layer), self.config, self.lora.scale, self.dtype)
            return self._layer(x, base["layers"], layer, adapter, attend)

        x, kv = jax.lax.scan(body, self._embed(base, tokens), jnp.arange(self.config.num_layers))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._norm(last, base["final_norm"]), kv

    @nn.compact
    def decode(
        self, tokens: Int[Array, "Q G"], cache: KVCache, step: Int[Array, ""] | None = None, *, unroll: bool = False
    ) -> tuple[Float[Array, "Q G D"], KVCache]:
        """One more token for every row: hidden states (normed) and the cache with slot `cache.length` written.

        In a loop whose counter is `step` that slot is `cache.length + step`, and the length is left as it is, for the caller to
        add all steps at once. `unroll` writes the layers out instead of looping over them; so do weights with one array or form
        for each layer.
        """
        base, lora = self._base(), self._lora()
        self._check_positions(cache.positions)
        if LAYERS in base["layers"]:
            layers: Any = FusedDecodeLayers(self.config, base, self.dtype)
        else:
            adapter = lora if _is_fused(lora) else fuse(lora, self.config, self.lora.scale, self.dtype)
            layers = DecodeLayers(self.config, base, adapter, self.dtype)
        unroll = unroll or any(isinstance(weight, tuple | MixedWeight) for weight in base["layers"].values())
        begun = self._begin(base, tokens, cache, step, layers.first_permuted(tokens.size))
        length = cache.length + 1 if step is None else cache.length
        cache = dataclasses.replace(cache, length=begun.slot)
        attention = self._decode_attention(base["layers"], cache, begun.rotations)
        left, cache = layers.run(begun.residual, begun.rows, cache, attention, unroll)
        return left.reshape(*tokens.shape, -1), dataclasses.replace(cache, length=length)

    @nn.compact
    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits; for a handful of positions only, never for `[B, T]`."""
        logits = matmul(hidden, self.head_weight(), out_dtype=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @nn.compact
    def proposal_logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The same by the head in 8 bits that a rollout's copy brings (`PROPOSAL_HEAD`), without a soft-cap.

        Its columns are laid out so that the kernel which reads rows in another order of columns takes these as they are.
        """
        head, rows = self._base()[PROPOSAL_HEAD], hidden.reshape(-1, hidden.shape[-1])
        given = Rows(unpermute_columns(rows), permuted=rows)
        parts = pallas_kernels.int4_partial_sums(given, head.packed, head.scales, code=head.code, out_dtype=jnp.float32)
        return joined(parts, jnp.float32).reshape(*hidden.shape[:-1], -1)

    @nn.compact
    def head_weight(self) -> Weight:
        """The output matrix `[V, D]`, which is the embedding where the two are tied."""
        base = self._base()
        return base["embed"] if self.config.tie_embeddings else base["head"]

    def _layer(
        self,
        x: Array,
        weights: Any,
        layer: int | Array,
        adapter: dict[str, tuple[Array, Array]],
        attend: Attend,
        dropout_key: Array | None = None,
        observe: Observe | None = None,
    ) -> tuple[Array, Any]:
        """x + attention(norm x), then x + mlp(norm x), with x `[…, D]`."""
        linear = LayerProducts(weights, layer, adapter, self.lora.lora_dropout, dropout_key, observe)

        h = self._norm(x, weights["input_norm"], layer)
        attended, kept = attend(linear("qkv", h))
        x = x + self._out_norm(linear("out", attended.reshape(*x.shape[:-1], -1)), weights, "attention_out_norm", layer)

        h = self._norm(x, weights["post_norm"], layer)
        gate, up = jnp.split(linear("gate_up", h), 2, axis=-1)
        mlp = linear("down", ACTIVATIONS[self.config.activation](gate) * up)
        return x + self._out_norm(mlp, weights, "mlp_out_norm", layer), kept

    def _begin(
        self, base: Any, tokens: Int[Array, "Q G"], cache: KVCache, step: Array | None, permuted: bool
    ) -> BegunStep:
        """The tokens' rows, normed for the first layer too, with the rotations of their positions unless layers differ in them."""
        table, rows, factor = base["embed"], tokens.reshape(-1), self.config.embedding_scale
        if not isinstance(table, Array) or table.dtype != self.dtype:
            table, rows, factor = self._embed(base, rows), jnp.arange(rows.size), 1.0
        made = base["layers"].get(ROTATIONS)
        made = rotations(self.config, cache.positions) if made is None else made
        return pallas_kernels.begin_step(
            rows,
            table,
            base["layers"]["input_norm"],
            Positions(cache.prompt_lengths, cache.length, 0 if step is None else step, made),
            eps=self.config.rms_norm_eps,
            offset=self.config.norm_offset,
            factor=factor,
            permuted=permuted,
        )

    def _decode_attention(
        self, weights: Any, cache: KVCache, rotations: Rotations | None
    ) -> Callable[[KVCache, int | Array], DecodeAttend]:
        """(cache, layer) -> its attention, which writes slot `cache.length`; `rotations` [Q, R] are those of all layers, or None.

        One operation with rotation and cache write where that covers the family: heads that are rotated whole, norms without an offset.
        """
        positions, bias = cache.prompt_lengths + cache.length, weights.get("qkv_bias")
        norms = (weights["q_norm"], weights["k_norm"]) if self.config.qk_norm else None
        ropes = (self.config.rope, self.config.local_rope or self.config.rope)
        fused = all(rope.partial == 1.0 for rope in ropes) and not (norms and self.config.norm_offset)
        alike = rotations is not None and not self.config.mixed_windows

        def of_layer(cache: KVCache, layer: int | Array) -> DecodeAttend:
            prompt, kv, slot = (cache.prompt_k, cache.prompt_v, cache.prompt_lengths), (cache.k, cache.v), cache.length
            how: dict[str, Any] = dict(scale=self.config.score_scale, window=self._window(layer))
            how |= dict(softcap=self.config.attention_softcap)

            def of_group(qkv: Array) -> Array:
                return qkv.reshape(qkv.shape[0], *cache.k.shape[1:3], -1)

            def new_tokens() -> NewTokens:
                cos, sin = rotations or rope_tables(positions, *self._rope(layer))
                return NewTokens(cos, sin, *prompt, *kv, slot, norms, bias, cache.all_scales)

            def rows(qkv: Array, permuted: bool) -> tuple[Rows, KVCache]:
                if fused:
                    given: dict[str, Any] = dict(eps=self.config.rms_norm_eps, dtype=self.dtype)
                    given |= new_tokens()._asdict()
                    out, k, v, scales = pallas_kernels.rope_attention(
                        of_group(qkv), **given, layer=layer, permuted=permuted, **how
                    )
                    return out, cache.written(k, v, scales)
                whole = joined(of_group(qkv), self.dtype)
                whole = whole if bias is None else whole + bias[layer].astype(self.dtype)
                at = jnp.broadcast_to(positions[:, None], whole.shape[:2])
                q, *new = self._heads(whole, at, weights, layer)
                after = cache.written(*write_slot(kv, (new[0], new[1]), slot, layer, cache.scales))
                given = dict(layer=layer, scales=after.all_scales, permuted=permuted)
                return pallas_kernels.decode_attention_rows(
                    q, *prompt, after.k, after.v, slot + 1, **given, **how
                ), after

            return DecodeAttend(rows, new_tokens if fused and alike else None, how, cache.written)

        return of_layer

    def _heads(self, qkv: Array, positions: Array, weights: Any, layer: int | Array) -> tuple[Array, Array, Array]:
        """Split the fused projection into heads `[…, heads, Hd]`, norm q and k where the family does, and rotate them."""
        cfg = self.config
        q_rows, k_rows, _ = cfg.qkv_splits
        heads = (
            part.reshape(*part.shape[:-1], -1, cfg.head_dim)
            for part in jnp.split(qkv, [q_rows, q_rows + k_rows], axis=-1)
        )
        q, k, v = heads
        if cfg.qk_norm:
            q = self._norm(q, weights["q_norm"], layer)
            k = self._norm(k, weights["k_norm"], layer)
        rope = self._rope(layer)
        return apply_rope(q, positions, *rope), apply_rope(k, positions, *rope), v

    def _embed(self, base: Any, tokens: Array) -> Array:
        x = embed(base["embed"], tokens, self.dtype)
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, self.dtype)

    def _norm(self, x: Array, scale: Array, layer: int | Array | None = None) -> Array:
        return rms_norm(x, of_layer(scale, layer), self.config.rms_norm_eps, self.config.norm_offset)

    def _out_norm(self, y: Array, weights: Any, name: str, layer: int | Array) -> Array:
        return self._norm(y, weights[name], layer) if self.config.sandwich_norms else y

    def _attention(
        self, q: Array, k: Array, v: Array, lengths: Array, layer: int | Array, segments: Array | None = None
    ) -> Array:
        scale, softcap = self.config.score_scale, self.config.attention_softcap
        return causal_attention(q, k, v, lengths, self._window(layer), segments, scale, softcap)

    def _rope(self, layer: int | Array) -> tuple[Any, Any]:
        """Frequencies of the layer and the factor of cos and sin; arrays only where layers differ."""
        cfg = self.config
        tables = [
            (inverse_frequencies(rope, cfg.head_dim, cfg.context_length), rope.attention_factor)
            for rope in (cfg.rope, cfg.local_rope or cfg.rope)
        ]
        if cfg.local_rope is None:
            return tables[0]
        if isinstance(layer, int):
            return tables[cfg.windows[layer] is not None]
        local = jnp.asarray([window is not None for window in cfg.windows], jnp.int32)[layer]
        freqs, factors = zip(*tables, strict=True)
        return jnp.asarray(freqs)[local], jnp.asarray(factors)[local]

    def _positions(self, tokens: Array, segments: Array | None, shared: SharedPrompt | PackedRows | None) -> Array:
        """Where each token stands in its sequence."""
        length = tokens.shape[1]
        self._check_positions(length if shared is None else shared.width + shared.completion_length(length))
        if shared is not None:
            return shared.positions(length)
        if segments is not None:
            return positions_in_segments(segments)
        return jnp.broadcast_to(jnp.arange(length), tokens.shape)

    def _check_positions(self, positions: int) -> None:
        for rope in (self.config.rope, self.config.local_rope or self.config.rope):
            check_positions(rope, self.config.context_length, positions)

    def _window(self, layer: int | Array) -> int | Array | None:
        """Sliding window of the layer; an array only where layers differ and the index is traced."""
        if not self.config.mixed_windows:
            return self.config.uniform_window
        if isinstance(layer, int):
            return self.config.windows[layer]
        unlimited = jnp.iinfo(jnp.int32).max
        return jnp.asarray([unlimited if w is None else w for w in self.config.windows], jnp.int32)[layer]

    def _base(self) -> Any:
        if self.has_variable("params", "embed"):
            return self.variables["params"]
        created = init_base(self.make_rng("params"), self.config, self.dtype)
        return {name: self.param(name, lambda _, value=value: value) for name, value in created.items()}

    def _lora(self) -> Any:
        return self.variables.get("lora", {})


def _is_fused(lora: Any) -> bool:
    """Whether the rollout has already fused the adapter (`jgrpo.lora.fuse`), as it does once before its loop."""
    return bool(lora) and all(isinstance(part, tuple) for part in lora.values())
