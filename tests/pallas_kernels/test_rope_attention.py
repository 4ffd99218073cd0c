"""Rotation, cache write and attention in one: the op against its two parts, the kernel's own code against float64."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import cache_codes, dispatch
from pallas_kernels.tuning import AttentionConfig
from tests.pallas_kernels.oracles import attention, relative_error
from tests.pallas_kernels.test_rope_cache import EPS, LAYER, SLOT, case, oracle, split_with_bias

SCALE = 0.25
TOLERANCE = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}
PARTS = AttentionConfig(64, 32, 4, 2, 4, 3)


def prompts(questions: int, kv_heads: int, depth: int, slots: int = 40):
    """(keys, values, lengths) of three layers; slots out of use hold NaN."""
    rng = np.random.default_rng(questions + depth)
    stacks = rng.normal(size=(2, 3, questions, kv_heads, slots, depth))
    lengths = rng.integers(1, slots + 1, questions).astype(np.int32)
    for question, used in enumerate(lengths):
        stacks[:, :, question, :, used:] = np.nan
    return stacks[0], stacks[1], lengths


@pytest.mark.parametrize("code", [None, "int8"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_twin_is_both_operations(permuted: bool, traced: bool, code: str | None) -> None:
    qkv, cos, sin, k, v, norms = case(True, "float32")
    *stacks, lengths = prompts(2, 2, 16)
    stacks = [np.nan_to_num(stack).astype(np.float32) for stack in stacks]
    caches, scales = [*stacks, k, v], None
    if code:
        caches, scales = zip(*(cache_codes.encode(jnp.asarray(part), code) for part in caches), strict=True)
    sums, bias = split_with_bias(qkv, 3)
    (prompt_k, prompt_v, k, v), norms = map(jnp.asarray, caches), tuple(map(jnp.asarray, norms))
    rotation = dict(norms=norms, eps=EPS, bias=jnp.asarray(bias), dtype=jnp.float32)

    def fused(slot, layer):
        how = dict(layer=layer, scale=SCALE, window=30, permuted=permuted, scales=scales, **rotation)
        return pallas_kernels.rope_attention(sums, cos, sin, prompt_k, prompt_v, lengths, k, v, slot, **how)

    got = (jax.jit(fused) if traced else fused)(SLOT, LAYER)
    how = dict(layer=LAYER, scales=scales and scales[2:], **rotation)
    q, *written = pallas_kernels.rope_and_cache(sums, cos, sin, k, v, SLOT, **how)
    how = dict(layer=LAYER, scale=SCALE, window=30, permuted=permuted, scales=scales and (*scales[:2], *written[2]))
    rows = pallas_kernels.decode_attention_rows(q, prompt_k, prompt_v, lengths, *written[:2], SLOT + 1, **how)
    for one, other in zip(*(jax.tree.leaves(result) for result in (got, (rows, *written))), strict=True):
        np.testing.assert_allclose(*(np.asarray(array, np.float32) for array in (one, other)), rtol=1e-5, atol=1e-5)


def test_what_cannot_run_raises() -> None:
    qkv, cos, sin, k, v, _ = case(False, "float32")
    arguments = (qkv, cos, sin, *prompts(2, 2, 16), k, v, SLOT)
    with pytest.raises(ValueError, match="rope_attention: implementation='triton' cannot run: it needs"):
        pallas_kernels.rope_attention(*arguments, layer=1, scale=1.0, permuted=False, implementation="triton")
    with pytest.raises(ValueError, match="want qkv"):
        pallas_kernels.rope_attention(qkv[..., :-1], *arguments[1:], layer=1, scale=1.0, permuted=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"cache_dtype": jnp.int8}, "keys and values must have"),
        ({"static_window": False}, "window must be a Python int"),
        ({"softcap": 30.0}, "soft-cap"),
        ({"takes_new_tokens": False}, "do not take new tokens"),
        ({"head_dim": 80}, "head_dim must be"),
    ],
)
def test_rule(changes: dict, reason: str | None) -> None:
    given = dict(dtype=jnp.bfloat16, head_dim=128, static_window=True, softcap=None, cache_dtype=jnp.bfloat16)
    given |= dict(takes_new_tokens=True) | changes
    problem = dispatch.rope_attention_problem(dispatch.Device("gpu", (9, 0), True), **given)
    assert problem is None if reason is None else reason in str(problem)


def test_configurations_that_take_new_tokens() -> None:
    whole = AttentionConfig(32, 16, 1, 0, 2, 4, generations=2)
    assert whole.takes_new_tokens(share=3, group=8)
    assert whole.takes_new_tokens(share=6, group=8)  # 12 queries, 2 keys, 2 values: a full tile
    assert not whole.takes_new_tokens(share=7, group=8)
    assert whole.takes_new_tokens(share=7, group=1)
    assert not AttentionConfig(32, 16, 2, 0, 2, 4, generations=2).takes_new_tokens(share=3, group=8)
    assert not PARTS.takes_new_tokens(share=3, group=8)


LAYOUTS = [
    dict(heads=6, kv_heads=2, group=3, depth=64),
    dict(heads=2, kv_heads=2, group=3, depth=64),
    dict(heads=4, kv_heads=1, group=5, depth=128),
    dict(heads=12, kv_heads=2, group=3, depth=64),
    dict(heads=7, kv_heads=1, group=1, depth=64),
    dict(heads=3, kv_heads=1, group=2, depth=256),
]
"""1, 3, 4, 6 and 7 query heads a kv head; two generations a tile leave one over, but where there is one."""


def check_kernel(
    slot: int, window: int | None, layout: dict, *, narrow=False, normed=True, splits=3, pointers=True
) -> None:
    """The kernel's outputs against float64; k and v must be what the kernel of the rotation alone writes."""
    import torch

    from tests.pallas_kernels import launch

    dtype = launch.DTYPES[0 if narrow else -1]
    qkv, cos, sin, k, v, norms = case(normed, dtype, slots=max(slot + 3, 5), **layout)
    k, v = (part.astype(np.float32) for part in (k, v))
    for cache in (k, v):
        cache[:, :, :, :, slot:] = np.nan
    sums, bias = split_with_bias(qkv, splits) if splits else (qkv[None].astype(np.float32), None)
    prompt = prompts(2, layout["kv_heads"], layout["depth"])
    place = lambda array: torch.tensor(array).to(launch.DEVICE)  # noqa: E731
    angles, scales = (place(cos), place(sin)), norms and tuple(map(place, norms))
    stacks = [launch.rounded(stack, dtype) for stack in (*prompt[:2], k, v)]
    alone = [stack.clone() for stack in stacks[2:]]
    how = (scales, None if bias is None else place(bias), EPS)
    generations = 1 if layout["heads"] // layout["kv_heads"] == 7 else 2
    config = AttentionConfig(32, 16, 1, 0, 2, 2, generations)
    assert config.takes_new_tokens(layout["heads"] // layout["kv_heads"], layout["group"])
    out = launch.rope_attention(
        place(sums),
        *angles,
        *stacks[:2],
        place(prompt[2]),
        *stacks[2:],
        slot,
        LAYER,
        *how,
        SCALE,
        window,
        config,
        pointers,
    )
    launch.rope_and_cache(place(sums), *angles, *alone, slot, LAYER, *how)
    eps = float(jnp.finfo(dtype).eps)
    for got, want in zip(stacks[2:], alone, strict=True):
        np.testing.assert_allclose(launch.float64(got), launch.float64(want), rtol=4 * eps, atol=4 * eps)
    q, new_k, new_v = oracle(qkv, cos, sin, k, v, norms, slot=slot)
    exact = [launch.float64(stack) for stack in stacks[:2]]
    want = attention(q, *exact, prompt[2], new_k, new_v, slot + 1, LAYER, SCALE, window)
    assert relative_error(out.reshape(want.shape), want) < TOLERANCE[dtype]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU"
)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("slot", "window"), [(0, None), (33, 20)])
def test_kernel_head_layouts(slot: int, window: int | None, layout: dict) -> None:
    check_kernel(slot, window, layout)


@needs_triton
@pytest.mark.parametrize(
    ("slot", "window"), [(1, None), (31, None), (32, None), (64, None), (0, 1), (40, 1), (32, 32), (5, 8), (9, 500)]
)
def test_kernel_lengths_and_windows(slot: int, window: int | None) -> None:
    check_kernel(slot, window, LAYOUTS[0])


@needs_triton
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("pointers", [False, True])
def test_kernel_inputs(normed: bool, splits: int, pointers: bool) -> None:
    """Without splits there is no bias."""
    check_kernel(17, None, LAYOUTS[0], normed=normed, splits=splits, pointers=pointers)


@needs_triton
def test_kernel_in_half_precision() -> None:
    check_kernel(17, None, LAYOUTS[0], narrow=True)
