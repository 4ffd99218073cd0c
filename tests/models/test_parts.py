"""Attention, rotary embedding, configuration and quantization against independent NumPy computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.errors import UserError
from jgrpo.models.attention import blockwise_attention
from jgrpo.models.config import RopeConfig, model_config_from_hf
from jgrpo.models.rope import apply_rope, inverse_frequencies
from jgrpo.quantization import (
    Fast8Weight,
    Int4Weight,
    Int8Weight,
    MixedWeight,
    NF4Weight,
    dequantize,
    embed,
    gated_matmul,
    matmul,
    matmul_parts,
    quantize,
    quantize_fast8,
    quantize_int8,
    take_layer,
)
from pallas_kernels import Rows
from pallas_kernels.codes import fast8_levels
from pallas_kernels.rows import permute_columns

HF = dict(
    model_type="llama", vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
)


def _attention_oracle(q, k, v, lengths, window):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        keys = slice(first, min(t + 1, lengths[b]))
        scores = k[b, keys, h // group] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, keys, h // group]
    return out


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("block", [3, 8, 64])
def test_blockwise_attention(window, block):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 11, 6, 8))
    k, v = (jax.random.normal(key, (2, 11, 2, 8)) for key in keys[1:])
    lengths = jnp.array([11, 7])
    out = blockwise_attention(q, k, v, lengths, window, block)
    expected = _attention_oracle(q[:1], k[:1], v[:1], [11], window)
    np.testing.assert_allclose(out[0], expected[0], atol=2e-6)
    expected = _attention_oracle(q[1:, :7], k[1:], v[1:], [7], window)
    np.testing.assert_allclose(out[1, :7], expected[0], atol=2e-6)
    assert jnp.isfinite(out).all()


def test_rope_depends_on_relative_position_only():
    freqs = inverse_frequencies(RopeConfig(theta=100.0), 16)
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 16))
    dots = [
        float((apply_rope(x, jnp.array(p), freqs) * apply_rope(y, jnp.array(p + 3), freqs)).sum()) for p in (0, 5, 90)
    ]
    np.testing.assert_allclose(dots, dots[0], rtol=1e-4)


def test_llama3_scaling_leaves_high_and_divides_low_frequencies():
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 128)
    scaled = inverse_frequencies(
        RopeConfig(500000.0, "llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0), 128
    )
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 32, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="gpt2"), ("gpt2", "supported", "llama")),
        (dict(rope_scaling=dict(rope_type="axial", factor=4.0)), ("axial", "llama3")),
        (dict(rope_scaling=dict(rope_type="yarn")), ("yarn", "factor")),
        (dict(rope_scaling=dict(rope_type="longrope", short_factor=[1.0] * 8)), ("longrope", "long_factor")),
        (dict(hidden_act="gelu"), ("gelu", "silu")),
        (dict(use_bidirectional_attention=True), ("use_bidirectional_attention", "causal")),
        (dict(num_hidden_layers=None), ("num_hidden_layers", "missing")),
    ],
)
def test_unreadable_configs_are_refused_in_one_line(change, words):
    with pytest.raises(UserError) as error:
        model_config_from_hf({**HF, **change}, "somewhere/config.json")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("somewhere/config.json")
    assert all(word in message for word in words)


def test_config_defaults_and_windows():
    config = model_config_from_hf(HF)
    assert (config.num_kv_heads, config.head_dim, config.windows) == (4, 16, ())
    assert model_config_from_hf({**HF, "model_type": "mistral", "sliding_window": 7}).windows == (7, 7, 7)
    qwen = {**HF, "model_type": "qwen2", "sliding_window": 7, "max_window_layers": 1}
    assert model_config_from_hf(qwen).windows == ()
    assert model_config_from_hf({**qwen, "use_sliding_window": True}).windows == (None, 7, 7)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_quantization_error_is_at_most_one_step(group, kind):
    weight = np.random.default_rng(0).normal(size=(3, 5, 256)).astype(np.float32)
    quantized = quantize(weight if kind == "numpy" else jnp.asarray(weight), group)
    assert isinstance(quantized.packed, np.ndarray) == (kind == "numpy")
    assert (quantized.shape, quantized.group_size) == (weight.shape, group)
    error = np.abs(np.asarray(dequantize(quantized)) - weight).reshape(3, 5, -1, group)
    step = np.abs(np.asarray(quantized.scales))[..., None]
    # Half a step, except above 7.5 steps on the side opposite to the extreme element.
    assert (error <= step * 1.0001).all()
    assert (error <= step * 0.5001).mean() > 0.97


def test_packing_is_split_half():
    levels = np.tile(np.arange(16, dtype=np.float32) - 8, 4)[None]  # scale 1: -8 is in every group
    packed = quantize(levels, 64).packed[0]
    assert packed[3] & 0xF == 3
    assert packed[3] >> 4 == (32 + 3) % 16


def test_zero_groups_stay_zero():
    assert not np.asarray(dequantize(quantize(np.zeros((2, 64), np.float32), 32))).any()


def test_group_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"group_size 64 .* 96"):
        quantize(np.zeros((2, 96), np.float32), 64)


def test_matmul_is_the_same_for_every_storage():
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(2, 40, 64)), jnp.float32)
    quantized = quantize(weight, 32)
    x = jnp.asarray(rng.normal(size=(2, 3, 64)), jnp.float32)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 64), (2, 40, 4)))
    dense = dequantize(quantized)
    expected = np.asarray(x, np.float64) @ (np.asarray(dense[1], np.float64) + np.asarray(b[1] @ a[1], np.float64)).T
    mixed = MixedWeight((jax.tree.map(lambda leaf: leaf[1:], quantized), dense[:1]), ((1, 0), (0, 0)))
    for stored in (quantized, dense, tuple(dense), mixed):
        np.testing.assert_allclose(matmul(x, stored, 1, (a, b)), expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(matmul(x, stored, 1, (a[1], b[1])), expected, rtol=1e-4, atol=1e-3)


def random_packed(code: str, rng: np.random.Generator):
    packed = rng.integers(0, 256, (2, 40, 32), dtype=np.uint8)
    scales = jnp.asarray(rng.uniform(0.1, 0.3, (2, 40, 2)), jnp.float32)
    if code == "int4":
        return Int4Weight(jnp.asarray(packed), scales, jnp.asarray(rng.integers(0, 17, (2, 40, 2), dtype=np.uint8)))
    if code == "nf4":
        return NF4Weight(jnp.asarray(packed), scales)
    if code == "fast8":
        return Fast8Weight(jnp.asarray(rng.integers(0, 256, (2, 40, 64), dtype=np.uint8)), -scales)
    return Int8Weight(jnp.asarray(rng.integers(-127, 128, (2, 40, 64), dtype=np.int8)), scales)


def random_weight(kind: str, rng: np.random.Generator):
    dense = jnp.asarray(rng.normal(size=(2, 40, 64)), jnp.float32)
    forms = {
        "dense": lambda: dense,
        "layers": lambda: tuple(dense),
        "mixed": lambda: MixedWeight((random_packed("int8", rng), dense), ((0, 1), (1, 0))),
    }
    return forms[kind]() if kind in forms else random_packed(kind, rng)


@pytest.mark.parametrize("code", ["int4", "nf4", "int8", "fast8"])
def test_matmul_and_its_gradients_are_those_of_the_dequantized_weight(code):
    """Int4 with zero-points, NF4, int8 and fast8; by a Python index and by a traced one; alone, and in a mixed stack."""
    rng = np.random.default_rng(3)
    weight = random_packed(code, rng)
    dense = dequantize(weight)
    assert weight.shape == dense.shape == (2, 40, 64)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 64), (2, 4, 64), (2, 40, 4)))
    cotangent = jnp.asarray(rng.normal(size=(3, 40)), jnp.float32)

    def loss(x, a, b, weight, layer):
        return (cotangent * matmul(x, weight, layer, (a, b))).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnames=())
    mixed = MixedWeight((dense[1:], jax.tree.map(lambda leaf: leaf[:1], weight)), ((1, 0), (0, 0)))
    for layer in (0, 1):
        expected = gradient(x, a, b, dense, layer)
        for stored in (weight, mixed):
            jax.tree.map(
                lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-3),
                gradient(x, a, b, stored, layer),
                expected,
            )
            static = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, a, b, stored, layer)
            jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-3), static, expected)
        np.testing.assert_allclose(matmul(x, weight, layer), x @ dense[layer].T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "fast8", "dense", "layers", "mixed"])
def test_partial_sums_of_a_product_are_the_product(kind, with_adapter):
    rng = np.random.default_rng(5)
    weight = random_weight(kind, rng)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(3, 64), (2, 4, 64), (2, 40, 4)])
    adapter = (a, b) if with_adapter else None
    for layer in (0, 1):
        parts = matmul_parts(Rows(x), weight, layer, adapter)
        np.testing.assert_array_equal(parts, matmul(x, weight, layer, adapter)[None])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("kind", ["int4", "dense", "layers", "mixed"])
def test_gate_of_a_product(kind, with_adapter, biased):
    """The same numbers whether product and gate are one operation or two."""
    rng = np.random.default_rng(6)
    weight = random_weight(kind, rng)
    shapes = [(3, 64), (2, 4, 64), (2, 40, 4), (2, 40)]
    x, a, b, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    adapter, bias = (a, b) if with_adapter else None, bias if biased else None
    for layer in (0, 1):
        rows = gated_matmul(Rows(x), weight, layer, adapter, activation="silu", bias=bias)
        gate, up = jnp.split(matmul(x, weight, layer, adapter) + (0 if bias is None else bias[layer]), 2, axis=1)
        np.testing.assert_array_equal(rows.plain, jax.nn.silu(gate) * up)
        assert rows.permuted is None


def test_gate_of_a_product_whose_consumer_reads_permuted_columns():
    rng = np.random.default_rng(7)
    weight = jnp.asarray(rng.normal(size=(2, 64, 64)), jnp.float32)
    x = Rows(jnp.asarray(rng.normal(size=(3, 64)), jnp.float32))
    rows = gated_matmul(x, weight, 1, activation="gelu_tanh", permuted=True)
    np.testing.assert_array_equal(rows.plain, gated_matmul(x, weight, 1, activation="gelu_tanh").plain)
    np.testing.assert_array_equal(rows.permuted, permute_columns(rows.plain))


def test_levels_of_int8_are_within_half_a_step():
    weight = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    quantized = quantize_int8(weight, 32)
    error = np.abs(dequantize(quantized) - weight).reshape(5, 4, 32)
    assert (error <= 0.5001 * quantized.scales[..., None]).all()
    assert np.abs(quantized.packed).max() == 127


@pytest.mark.parametrize("xp", [np, jnp])
def test_levels_of_fast8_are_the_nearest_on_the_better_side(xp):
    """Steps of one below 0 and of two above it, times a scale of the sign that makes it smaller."""
    weight = np.random.default_rng(0).normal(size=(40, 128)).astype(np.float32)
    weight[0, :32] = 0
    quantized = quantize_fast8(xp.asarray(weight), 32)
    scales = np.asarray(quantized.scales)[..., None]
    steps, levels = weight.reshape(40, 4, 32) / np.where(scales, scales, 1), fast8_levels(np.arange(256), np)
    nearest = levels[np.abs(steps[..., None] - levels).argmin(axis=-1)]
    got = np.asarray(dequantize(quantized)).reshape(40, 4, 32)
    np.testing.assert_allclose(np.abs(got - steps * scales), np.abs(nearest - steps) * np.abs(scales), atol=1e-5)
    assert {-1, 1} <= set(np.sign(scales).ravel())
    error, coarse = (dequantize(q(weight, 32)) - weight for q in (quantize_fast8, quantize_int8))
    assert np.sqrt(np.mean(error**2) / np.mean(coarse**2)) < 1.4


def test_take_layer_of_a_mixed_stack():
    weight = random_packed("nf4", np.random.default_rng(4))
    wide = jnp.ones((1, 40, 64))
    mixed = MixedWeight((weight, wide), ((0, 1), (1, 0), (0, 0)))
    assert mixed.shape == (3, 40, 64)
    np.testing.assert_array_equal(dequantize(take_layer(mixed, 0)), dequantize(weight)[1])
    np.testing.assert_array_equal(take_layer(mixed, 1), wide[0])


def test_embedding_rows_of_a_quantized_table():
    table = jnp.asarray(np.random.default_rng(2).normal(size=(20, 64)), jnp.float32)
    quantized = quantize(table, 32)
    assert isinstance(quantized, Int4Weight)
    tokens = jnp.array([[3, 19], [0, 3]])
    np.testing.assert_array_equal(embed(quantized, tokens, jnp.float32), dequantize(quantized)[tokens])
