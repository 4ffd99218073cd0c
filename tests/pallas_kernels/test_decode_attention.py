"""decode_attention (reference path) against a float64 oracle that loops over rows and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, decode_attention_rows
from tests.pallas_kernels.oracles import attention, relative_error
from tests.pallas_kernels.test_add_rms_norm import permuted

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}


def random_case(
    rng, dtype, *, questions=3, generations=2, heads=4, kv_heads=2, head_dim=16, prompt=7, suffix=9, layers=2
):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    prompt_shape = (layers, questions, kv_heads, prompt, head_dim)
    suffix_shape = (layers, questions, generations, kv_heads, suffix, head_dim)
    q = normal(questions, generations, heads, head_dim)
    lengths = jnp.asarray(rng.integers(1, prompt + 1, questions), jnp.int32)
    return q, normal(*prompt_shape), normal(*prompt_shape), lengths, normal(*suffix_shape), normal(*suffix_shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("length", [1, 5, 9])
def test_matches_float64(length, window, dtype):
    case = random_case(np.random.default_rng(length), dtype)
    out = decode_attention(*case, length, layer=1, scale=0.3, window=window)
    assert out.dtype == dtype
    assert relative_error(out, attention(*case, length, 1, 0.3, window)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (7, 1), (14, 2)])
def test_head_layouts(heads, kv_heads):
    case = random_case(np.random.default_rng(heads), jnp.float32, heads=heads, kv_heads=kv_heads)
    out = decode_attention(*case, 3, layer=0, scale=0.25)
    assert relative_error(out, attention(*case, 3, 0, 0.25)) < 2e-6


def test_rows_for_the_next_product():
    case = random_case(np.random.default_rng(3), jnp.float32)
    want = np.asarray(decode_attention(*case, 5, layer=1, scale=0.25)).reshape(6, -1)
    rows = decode_attention_rows(*case, 5, layer=1, scale=0.25, permuted=True)
    np.testing.assert_array_equal(rows.plain, want)
    np.testing.assert_array_equal(rows.permuted, permuted(want))
    assert decode_attention_rows(*case, 5, layer=1, scale=0.25, permuted=False).permuted is None
    odd = random_case(np.random.default_rng(3), jnp.float32, head_dim=8)
    with pytest.raises(ValueError, match="sixteens"):
        decode_attention_rows(*odd, 5, layer=1, scale=0.25, permuted=True)


def test_layer_and_length_may_be_traced():
    case = random_case(np.random.default_rng(0), jnp.float32)
    run = jax.jit(lambda length, layer: decode_attention(*case, length, layer=layer, scale=0.25))
    for length, layer in [(1, 0), (6, 1)]:
        assert relative_error(run(length, layer), attention(*case, length, layer, 0.25)) < 2e-6


def test_slots_out_of_use_have_no_influence():
    q, prompt_k, prompt_v, lengths, k, v = random_case(np.random.default_rng(1), jnp.float32)
    want = decode_attention(q, prompt_k, prompt_v, lengths, k, v, 4, layer=0, scale=0.25)
    unused = (jnp.arange(prompt_k.shape[3]) >= lengths[:, None])[None, :, None, :, None]
    poisoned = [jnp.where(unused, 1e9, side) for side in (prompt_k, prompt_v)]
    suffix = [side.at[..., 4:, :].set(1e9) for side in (k, v)]
    got = decode_attention(q, *poisoned, lengths, *suffix, 4, layer=0, scale=0.25)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bad_shapes_and_implementations_raise():
    q, prompt_k, prompt_v, lengths, k, v = random_case(np.random.default_rng(2), jnp.float32)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        decode_attention(q, prompt_k, prompt_v, lengths, k, v, 1, layer=0, scale=1.0, implementation="triton")
    with pytest.raises(ValueError, match="unknown"):
        decode_attention(q, prompt_k, prompt_v, lengths, k, v, 1, layer=0, scale=1.0, implementation="cudnn")
    with pytest.raises(ValueError, match="wants prompt_k"):
        decode_attention(q, prompt_k[:1], prompt_v, lengths, k, v, 1, layer=0, scale=1.0)
    with pytest.raises(ValueError, match="must divide"):
        decode_attention(q[:, :, :3], prompt_k, prompt_v, lengths, k, v, 1, layer=0, scale=1.0)
