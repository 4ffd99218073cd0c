"""Identities of the transformer: every path through it is the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from jgrpo import quantization
from jgrpo.config import LoraConfig
from jgrpo.lora import fuse, init_lora, module_delta
from jgrpo.models import KVCache, ModelConfig, Transformer, decoding, init_base
from jgrpo.models.config import RopeConfig
from jgrpo.quantization import matmul_parts, quantize

CONFIG = ModelConfig(
    "qwen3", 97, 64, 128, 2, 4, 2, 32, qk_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=False
)
LORA = LoraConfig(lora_rank=4, lora_alpha=12.0)
LENGTHS = jnp.array([5, 8, 7])


def _randomized(tree, scale=0.05):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return treedef.unflatten(
        [leaf + scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )


def _setup(config=CONFIG, quantized=False):
    base = _randomized(init_base(jax.random.key(0), config))
    if quantized:
        layers = {name: quantize(w, 32) if w.ndim == 3 else w for name, w in base["layers"].items()}
        base = {**base, "layers": layers}
    lora = _randomized(init_lora(jax.random.key(1), LORA, config))
    tokens = jax.random.randint(jax.random.key(2), (3, 12), 0, config.vocab_size)
    return Transformer(config, LORA), {"params": base, "lora": lora}, tokens


def _decode_all(model, variables, tokens, steps):
    """Hidden states of `steps` tokens after each prompt, for two identical rows of every question."""
    _, kv = model.apply(variables, tokens[:, :8], LENGTHS, method=model.prefill)
    cache = KVCache.create(kv, LENGTHS, 2, steps + 1)
    for t in range(steps):
        token = jnp.repeat(jnp.take_along_axis(tokens, (LENGTHS + t)[:, None], 1), 2, axis=1)
        hidden, cache = model.apply(variables, token, cache, method=model.decode)
        yield hidden


def _decode_once(model, prefill_variables, decode_variables, tokens):
    _, kv = model.apply(prefill_variables, tokens[:, :8], LENGTHS, method=model.prefill)
    token = jnp.repeat(jnp.take_along_axis(tokens, LENGTHS[:, None], 1), 2, axis=1)
    cache = KVCache.create(kv, LENGTHS, 2, 2)
    return model.apply(decode_variables, token, cache, method=model.decode)[0]


@pytest.mark.parametrize("windows", [(), (3, 3), (3, None)])
@pytest.mark.parametrize("quantized", [False, True])
def test_cached_decoding_is_the_full_forward(windows, quantized):
    model, variables, tokens = _setup(dataclasses.replace(CONFIG, windows=windows), quantized)
    full = model.apply(variables, tokens, LENGTHS + 4)
    last, _ = model.apply(variables, tokens[:, :8], LENGTHS, method=model.prefill)
    np.testing.assert_allclose(last, jnp.take_along_axis(full, (LENGTHS - 1)[:, None, None], 1)[:, 0], atol=2e-5)
    for t, hidden in enumerate(_decode_all(model, variables, tokens, 4)):
        expected = jnp.take_along_axis(full, (LENGTHS + t)[:, None, None], 1)
        np.testing.assert_allclose(hidden, jnp.broadcast_to(expected, hidden.shape), atol=2e-5)


def test_window_limits_what_a_token_sees():
    windowed, variables, tokens = _setup(dataclasses.replace(CONFIG, windows=(3, 3)))
    changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % 97)
    whole = jnp.full(3, 12)
    same = windowed.apply(variables, tokens, whole) - windowed.apply(variables, changed, whole)
    # Two layers of window 3 carry information over at most 4 positions.
    assert jnp.abs(same[:, 4]).max() > 0
    assert jnp.abs(same[:, 5:]).max() == 0


def test_padding_does_not_reach_valid_positions():
    model, variables, tokens = _setup()
    garbage = jnp.where(jnp.arange(12) < LENGTHS[:, None], tokens, 3)
    difference = model.apply(variables, tokens, LENGTHS) - model.apply(variables, garbage, LENGTHS)
    assert jnp.abs(jnp.where((jnp.arange(12) < LENGTHS[:, None])[..., None], difference, 0)).max() == 0


def test_weights_of_single_layers_decode_like_the_stack():
    model, variables, tokens = _setup()
    layers = {name: tuple(w) if w.ndim == 3 else w for name, w in variables["params"]["layers"].items()}
    split = {"params": {**variables["params"], "layers": layers}, "lora": variables["lora"]}
    one, other = _decode_once(model, variables, variables, tokens), _decode_once(model, variables, split, tokens)
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(norm_offset=1.0, sandwich_norms=True, activation="gelu_tanh"),
        dict(rope=RopeConfig(partial=0.5), qk_norm=False),
    ],
    ids=["qwen3", "gemma", "partial rotation"],
)
def test_decoding_adds_partial_sums_and_hands_on_permuted_rows(monkeypatch, changes):
    """What kernels on a GPU make of products: parts that add up, from rows whose columns are permuted where they ask."""
    model, variables, tokens = _setup(dataclasses.replace(CONFIG, **changes), quantized=True)
    want = _decode_once(model, variables, variables, tokens)
    read_permuted = []

    def parts(rows, weight, layer, adapter):
        read_permuted.append(rows.permuted is not None)
        if rows.permuted is not None:
            m, k = rows.plain.shape
            restored = rows.permuted.reshape(m, k // 16, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(m, k)
            rows = pallas_kernels.Rows(restored)
        whole = matmul_parts(rows, weight, layer, adapter)
        noise = jax.random.normal(jax.random.key(0), (2, *whole.shape[1:]))
        return jnp.concatenate([noise, whole - noise.sum(0)])

    monkeypatch.setattr(decoding, "matmul_parts", parts)
    monkeypatch.setattr(quantization.linear, "matmul_parts", parts)  # in front of the gate
    monkeypatch.setattr(decoding, "reads_permuted", lambda *_: True)
    np.testing.assert_allclose(_decode_once(model, variables, variables, tokens), want, atol=2e-5)
    assert read_permuted == [True] * 4  # the loop traces one layer


def test_adapter_fused_before_the_loop_decodes_the_same():
    model, variables, tokens = _setup(quantized=True)
    fused = {"params": variables["params"], "lora": fuse(variables["lora"], CONFIG, LORA.scale, jnp.float32)}
    one, other = _decode_once(model, variables, variables, tokens), _decode_once(model, variables, fused, tokens)
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj"), ("down_proj",)])
def test_adapter_equals_weights_with_the_delta_added(targets):
    model, variables, tokens = _setup()
    base = variables["params"]
    lora = {name: variables["lora"][name] for name in targets}
    layers = dict(base["layers"])
    offsets = {"q_proj": ("qkv", 0), "k_proj": ("qkv", 128), "v_proj": ("qkv", 192), "o_proj": ("out", 0)}
    offsets |= {"gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 128), "down_proj": ("down", 0)}
    for name in targets:
        matrix, row = offsets[name]
        delta = module_delta(lora, name, LORA.scale)
        layers[matrix] = layers[matrix].at[:, row : row + delta.shape[1]].add(delta)
    merged = model.apply({"params": {**base, "layers": layers}, "lora": {}}, tokens, LENGTHS + 4)
    np.testing.assert_allclose(model.apply({"params": base, "lora": lora}, tokens, LENGTHS + 4), merged, atol=5e-5)


def test_fresh_adapter_is_the_base_model_exactly():
    model, variables, tokens = _setup(quantized=True)
    fresh = init_lora(jax.random.key(5), LORA, CONFIG)
    policy = model.apply({"params": variables["params"], "lora": fresh}, tokens, LENGTHS)
    reference = model.apply({"params": variables["params"], "lora": {}}, tokens, LENGTHS)
    assert jnp.array_equal(policy, reference)


def test_remat_changes_no_gradient():
    model, variables, tokens = _setup(quantized=True)

    def loss(lora, remat):
        return (model.apply({"params": variables["params"], "lora": lora}, tokens, LENGTHS, remat=remat) ** 2).mean()

    plain, recomputed = (jax.grad(loss)(variables["lora"], remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, recomputed)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))


def test_differentiating_the_quantized_base_fails_loudly():
    model, variables, tokens = _setup(quantized=True)

    def loss(base):
        return model.apply({"params": base, "lora": {}}, tokens, LENGTHS).sum()

    with pytest.raises(TypeError):
        jax.grad(loss)(variables["params"])


def test_dropout_is_off_unless_asked_for_and_unbiased():
    model, variables, tokens = _setup()
    dropping = Transformer(CONFIG, dataclasses.replace(LORA, lora_dropout=0.5))
    plain = model.apply(variables, tokens, LENGTHS)
    assert jnp.array_equal(dropping.apply(variables, tokens, LENGTHS), plain)

    def sample(key):
        return dropping.apply(variables, tokens, LENGTHS, dropout=True, rngs={"dropout": key})

    one, two = sample(jax.random.key(0)), sample(jax.random.key(1))
    assert jnp.abs(one - two).max() > 1e-3
    assert jnp.array_equal(one, sample(jax.random.key(0)))


def test_linen_init_makes_the_tree_that_apply_takes():
    model, variables, tokens = _setup()
    created = model.init(jax.random.key(0), tokens, LENGTHS)["params"]
    assert jax.tree.structure(created) == jax.tree.structure(variables["params"])
    assert jax.tree.map(jnp.shape, created) == jax.tree.map(jnp.shape, variables["params"])


def test_quantized_embedding_and_tied_head():
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    model, variables, tokens = _setup(config)
    base = dict(variables["params"])
    base["embed"] = quantize(base["embed"], 32)
    hidden = model.apply({"params": base, "lora": {}}, tokens, LENGTHS)
    logits = model.apply({"params": base}, hidden, method=model.logits)
    assert logits.shape == (3, 12, 97)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize("windows", [(), (3, None)])
def test_packed_sequences_do_not_see_each_other(windows):
    """Three sequences in one row, with padding after them, give the hidden states of three rows."""
    model, variables, tokens = _setup(dataclasses.replace(CONFIG, windows=windows))
    row = jnp.concatenate([*(tokens[b, :n] for b, n in enumerate(LENGTHS)), jnp.zeros(4, jnp.int32)])[None]
    segments = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([*LENGTHS, 4]))[None]
    packed = model.apply(variables, row, LENGTHS.sum()[None], segments=segments)[0]
    apart = model.apply(variables, tokens, LENGTHS)
    ends = np.cumsum(LENGTHS)
    for b, (end, length) in enumerate(zip(ends, LENGTHS, strict=True)):
        np.testing.assert_allclose(packed[end - length : end], apart[b, :length], atol=2e-5)
    assert np.all(np.isfinite(packed))
