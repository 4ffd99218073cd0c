"""Decode layers: their jnp twins against float64, and when their kernel is taken. The kernel: `test_decode_layers_mosaic.py`."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Rows,
    decode_layer,
    decode_layers,
    dispatch,
    first_qkv,
    has_layer_kernel,
    interleave_gate,
    layer_counter,
    tuning,
)
from pallas_kernels.decode_layers import attention_problem
from tests.pallas_kernels.oracles import relative_error
from tests.pallas_kernels.random_layers import EPS, expected, expected_of_all, random_layers, random_tokens

LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
HOPPER = dispatch.Device("gpu", (9, 0), True, "a GPU without measured blocks", True, 132)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_twin_computes_a_layer(activation, number):
    """And what follows it: the next one's qkv, or normed rows."""
    layers = random_layers(np.random.default_rng(0), 6, 128, 256, 160, 192, group=32)
    how = dict(layer=number, eps=EPS, activation=activation)
    residual, result, _ = decode_layer(
        Rows(layers.attended), layers.residual, layers.norms, layers.matrices, layer_counter(), **how
    )
    want_residual, want = expected(layers, number, activation)
    assert relative_error(np.asarray(residual, np.float64), want_residual) < 8e-3
    assert relative_error(np.asarray(result, np.float64).reshape(want.shape), want) < 8e-3


def test_the_twin_computes_all_layers():
    rng = np.random.default_rng(0)
    layers, tokens = (
        random_layers(rng, 6, 128, 256, 160, 512, group=32),
        random_tokens(rng, 2, 3, 2, 2, 64, 9, 20, 7, biased=False),
    )
    finite = tokens._replace(
        **{name: jnp.nan_to_num(getattr(tokens, name)) for name in ("prompt_k", "prompt_v", "k", "v")}
    )
    how = dict(eps=EPS, activation="silu", scale=0.2)
    rows, caches = decode_layers(finite, layers.residual, Rows(layers.rows), layers.norms, layers.matrices, **how)
    want, *want_caches = expected_of_all(layers, tokens, "silu", 0.2)
    for cache, exact in zip(caches[:2], want_caches, strict=True):
        cache, exact = np.asarray(cache, np.float64), np.nan_to_num(exact)
        np.testing.assert_allclose(cache[0], exact[0], rtol=8e-3, atol=8e-3)
        assert relative_error(cache, exact) < 8e-3
    assert caches.scales is None
    assert relative_error(np.asarray(rows, np.float64), want) < 8e-3


def test_gate_and_up_alternate_by_eights():
    rows = jnp.arange(64)[:, None]
    both = interleave_gate(rows)[:, 0].reshape(-1, 2, 8)
    np.testing.assert_array_equal(both[:, 0].ravel(), np.arange(32))
    np.testing.assert_array_equal(both[:, 1].ravel(), np.arange(32, 64))


def test_what_cannot_run_is_said():
    rng = np.random.default_rng(0)
    layers, tokens = random_layers(rng, 5, 128, 128, 128, 256), random_tokens(rng, 1, 5, 1, 2, 64, 9, 20, 7)
    given, rows = (layers.residual, layers.norms, layers.matrices), Rows(layers.attended)
    how = dict(eps=EPS, activation="silu")
    with pytest.raises(ValueError, match="implementation='triton' is unknown"):
        decode_layer(rows, *given, layer_counter(), layer=0, **how, implementation="triton")
    with pytest.raises(ValueError, match=r"the kernel cannot run 5 rows with matrices \(\(256, 128\)"):
        decode_layer(rows, *given, layer_counter(), layer=0, **how, implementation="mosaic")
    with pytest.raises(ValueError, match="first_qkv: implementation='triton' is unknown"):
        first_qkv(rows, layers.matrices, implementation="triton")
    with pytest.raises(ValueError, match="decode_layers: one kernel cannot run here: no GPU"):
        decode_layers(tokens, given[0], rows, *given[1:], scale=1.0, **how, implementation="mosaic")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"tiles": 53}, None),
        ({"head_dim": 64}, None),
        ({"has_window": True}, "no window and no soft-cap"),
        ({"softcap": 30.0}, "no window and no soft-cap"),
        ({"cache_dtype": jnp.int8}, "must be bfloat16, got int8"),
        ({"dtype": jnp.float16}, "bfloat16 rows, got float16"),
        ({"head_dim": 256}, "64 or 128, got 256"),
        ({"share": 33}, "no more than 32 queries, got 33"),
        ({"cache_slots": (16, 12)}, "tiles of eight slots, got 16 of a prompt and 12 of a suffix"),
        ({"tiles": 27}, None),
        ({"tiles": 26}, "26 tiles are not about one for each of 132"),
        ({"tiles": 53, "cache_slots": (512, 520)}, None),
        ({"tiles": 52, "cache_slots": (512, 520)}, "52 tiles are not about one for each of 132"),
        ({"tiles": 133}, "133 tiles are not"),
    ],
)
def test_rule_of_the_attention(changes, reason):
    given = dict(dtype=jnp.bfloat16, head_dim=128, share=6, tiles=128, has_window=False, softcap=None)
    given |= dict(cache_dtype=jnp.bfloat16, cache_slots=(64, 128))
    problem = dispatch.layer_attention_problem(HOPPER, **(given | changes))
    assert problem is None if reason is None else reason in str(problem)


@pytest.mark.parametrize(("window", "reason"), [(None, None), (40, None), (39, "no window")])
def test_a_window_that_holds_every_slot_is_none(monkeypatch, window, reason):
    monkeypatch.setattr(dispatch, "current_device", lambda: HOPPER)
    tokens = random_tokens(np.random.default_rng(0), 8, 8, 2, 6, 64, 16, 24, 7)
    problem = attention_problem(tokens, 2 * (6 + 2) * 64, jnp.bfloat16, window, None)
    assert problem is None if reason is None else reason in str(problem)


@pytest.mark.parametrize(
    ("questions", "group", "kv_heads", "share", "tile"),
    [
        (8, 8, 2, 6, (1, 128)),
        (8, 8, 8, 3, (4, 128)),
        (2, 8, 8, 4, (1, 128)),
        (1, 5, 2, 3, (1, 10)),
        (64, 1, 8, 4, (1, 512)),
        (8, 8, 8, 32, (1, 512)),  # no room for two generations
        (3, 7, 8, 1, (2, 96)),
    ],
)
def test_tiles_are_no_more_than_programs_where_they_have_room(questions, group, kv_heads, share, tile):
    assert tuning.layer_attention_tile(questions, group, kv_heads, share, 132) == tile


@pytest.mark.parametrize(
    ("change", "m", "shapes", "runs"),
    [
        ({}, 64, LLAMA_8B, True),
        ({}, 1, LLAMA_8B, True),
        ({}, 65, LLAMA_8B, False),
        ({"multiprocessors": 114}, 64, LLAMA_8B, True),
        ({"multiprocessors": 16}, 64, LLAMA_8B, False),  # a row has a program of its own
        ({"has_mosaic": False}, 64, LLAMA_8B, False),
        ({"capability": (8, 0)}, 64, LLAMA_8B, False),
        ({}, 64, [(1152, 896), (896, 896), (2 * 4864, 896), (896, 4864)], True),
        ({}, 64, [(1600, 960), (960, 960), (2 * 2560, 960), (960, 2560)], False),  # no multiples of 128
    ],
)
def test_rule(monkeypatch, change, m, shapes, runs):
    device = HOPPER if not change else dispatch.Device(**{**vars(HOPPER), **change})
    monkeypatch.setattr(dispatch, "current_device", lambda: device)
    assert has_layer_kernel(m, shapes, jnp.bfloat16, jnp.bfloat16) == runs
    assert not has_layer_kernel(m, shapes, jnp.float16, jnp.bfloat16)


QWEN_1_5B = ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960))


@pytest.mark.parametrize(("shapes", "splits"), [(tuple(LLAMA_8B), [2, 4, 1, 4]), (QWEN_1_5B, [6, 6, 1, 10])])
def test_every_program_has_something_to_multiply(shapes, splits, monkeypatch):
    """K is split as often as leaves no more units than programs, of the gate's product not at all; less often where no program has more
    blocks for it: 12 in 6 parts instead of 8 or 11, 70 in 10 instead of 11."""
    monkeypatch.setattr(dispatch, "current_device", lambda: HOPPER)
    configs = tuning.decode_layer_configs(64, shapes, 132)
    assert configs is not None
    assert [config.split_k for config in configs] == splits
    assert len({(c.block_m, c.block_n, c.block_k, c.stages) for c in configs}) == 1
