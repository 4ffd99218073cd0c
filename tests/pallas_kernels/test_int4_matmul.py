"""int4_matmul (reference path) against float64, its gradients, its errors, and what XLA makes of it inside loops."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Rows, dequantized, dispatch, int4_matmul, int4_partial_sums, reads_permuted, reference
from tests.pallas_kernels.oracles import random_int4, relative_error

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k", "group"),
    [(1, 7, 64, 32), (5, 130, 128, 64), (16, 65, 896, 128), (33, 24, 1536, 64), (200, 33, 256, 128), (5, 9, 3584, 128)],
)
def test_matches_float64(m, n, k, group, dtype):
    rng = np.random.default_rng(m * n + k)
    packed, scales, weight = random_int4(rng, n, k, group)
    x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    out = int4_matmul(x, packed, scales)
    assert out.dtype == dtype
    assert out.shape == (m, n)
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T) < TOLERANCE[dtype]


@pytest.mark.parametrize(("n", "k"), [(96, 64), (24, 128)], ids=["adapter's columns in the product", "added"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantized_product(n, k, dtype):
    rng = np.random.default_rng(n)
    packed, scales, weight = random_int4(rng, n, k, 32, layers=(3,))
    x, xa, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in [(33, k), (33, 4), (n, 4)])
    out = jax.jit(lambda layer: dequantized.matmul(x, packed, scales, layer, xa, b, dtype))(jnp.asarray(2))
    assert out.dtype == dtype
    want = np.asarray(x, np.float64) @ weight[2].T + np.asarray(xa, np.float64) @ np.asarray(b, np.float64).T
    assert relative_error(out, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("stacked_b", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_takes_the_stack_and_a_layer_index(traced, stacked_b):
    rng = np.random.default_rng(0)
    packed, scales, weight = random_int4(rng, 12, 64, 32, layers=(3,))
    x, xa, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(5, 64), (5, 4), (3, 12, 4)])

    def run(layer):
        lora_b = b if stacked_b else b[1]
        return int4_matmul(x, packed, scales, layer=layer, xa=xa, lora_b=lora_b)

    out = jax.jit(run)(1) if traced else run(1)
    want = np.asarray(x, np.float64) @ weight[1].T + np.asarray(xa, np.float64) @ np.asarray(b[1], np.float64).T
    assert relative_error(out, want) < 2e-6


def test_out_dtype_is_rounded_once_from_float32():
    rng = np.random.default_rng(1)
    packed, scales, weight = random_int4(rng, 40, 256, 64)
    x = jnp.asarray(rng.normal(size=(9, 256)), jnp.bfloat16)
    out = int4_matmul(x, packed, scales, out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    # The weights are rounded to bfloat16 once; nothing else is, so the error lies under that of a bfloat16 result.
    assert relative_error(out, np.asarray(x, np.float64) @ weight.T) < 3e-3


@pytest.mark.parametrize("traced", [True, False])
def test_partial_sums_of_the_reference_are_the_product(traced):
    rng = np.random.default_rng(1)
    packed, scales, _ = random_int4(rng, 12, 64, 32, layers=(3,))
    x, xa, b = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in [(5, 64), (5, 4), (3, 12, 4)])

    def run(layer):
        parts = int4_partial_sums(Rows(x), packed, scales, layer=layer, xa=xa, lora_b=b)
        return parts, int4_matmul(x, packed, scales, layer=layer, xa=xa, lora_b=b)

    parts, want = jax.jit(run)(1) if traced else run(1)
    assert parts.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(parts), np.float32(want)[None])
    noise = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    xa_parts = jnp.concatenate([noise, xa - noise.sum(0, keepdims=True)])
    split = int4_partial_sums(Rows(x), packed, scales, layer=1, xa=xa_parts, lora_b=b)
    assert relative_error(split, parts) < 3e-3


def test_only_the_wgmma_form_reads_permuted_columns(monkeypatch):
    packed, scales = jnp.zeros((2, 1536, 768), jnp.uint8), jnp.zeros((2, 1536, 24))
    assert not reads_permuted(64, jnp.bfloat16, packed, scales)
    for capability, rows, want in [((9, 0), 64, True), ((9, 0), 16, False), ((8, 0), 64, False), ((9, 0), 4096, False)]:
        device = dispatch.Device("gpu", capability, True, "a GPU without measured blocks")
        monkeypatch.setattr(dispatch, "current_device", lambda device=device: device)
        assert reads_permuted(rows, jnp.bfloat16, packed, scales) == want


def test_the_mosaic_form_reads_permuted_columns_of_more_rows(monkeypatch):
    """Where it takes the shape: groups of 32 are Triton's."""
    device = dispatch.Device("gpu", (9, 0), True, "a GPU without measured blocks", has_mosaic=True)
    monkeypatch.setattr(dispatch, "current_device", lambda: device)
    packed = jnp.zeros((2, 1536, 768), jnp.uint8)
    for group, rows, want in [(64, 2048, True), (64, 2049, False), (32, 257, False), (32, 256, True)]:
        scales = jnp.zeros((2, 1536, 1536 // group), jnp.bfloat16)
        assert reads_permuted(rows, jnp.bfloat16, packed, scales) == want, (group, rows)


@pytest.mark.parametrize("stacked_b", [True, False])
def test_gradients_match_float64(stacked_b):
    rng = np.random.default_rng(2)
    packed, scales, weight = random_int4(rng, 12, 64, 32, layers=(3,))
    x, xa, b, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(5, 64), (5, 4), (3, 12, 4), (5, 12)])
    lora_b = b if stacked_b else b[2]

    def loss(x, xa, lora_b):
        return jnp.sum(g * int4_matmul(x, packed, scales, layer=2, xa=xa, lora_b=lora_b))

    dx, dxa, db = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, xa, lora_b)
    g64, db64 = np.asarray(g, np.float64), np.zeros(b.shape)
    db64[2] = g64.T @ np.asarray(xa)
    assert relative_error(dx, g64 @ weight[2]) < 2e-6
    assert relative_error(dxa, g64 @ np.asarray(b[2])) < 2e-6
    assert relative_error(db, db64 if stacked_b else db64[2]) < 2e-6


def test_gradients_inside_scan_with_remat():
    rng = np.random.default_rng(3)
    packed, scales, weight = random_int4(rng, 64, 64, 32, layers=(3,))
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(3, 4, 64), (3, 64, 4)])
    x = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)

    @jax.checkpoint
    def layer(h, xs):
        index, a, b = xs
        return jnp.tanh(int4_matmul(h, packed, scales, layer=index, xa=h @ a.T, lora_b=b)), None

    def loss(a, b):
        return jnp.sum(jax.lax.scan(layer, x, (jnp.arange(3), a, b))[0] ** 2)

    def dense_loss(a, b):
        h = x
        for i in range(3):
            h = jnp.tanh(h @ jnp.asarray(weight[i], jnp.float32).T + (h @ a[i].T) @ b[i].T)
        return jnp.sum(h**2)

    got, want = jax.jit(jax.grad(loss, (0, 1)))(a, b), jax.jit(jax.grad(dense_loss, (0, 1)))(a, b)
    assert relative_error(got[0], want[0]) < 1e-4
    assert relative_error(got[1], want[1]) < 1e-4


def test_differentiating_the_base_raises():
    rng = np.random.default_rng(4)
    packed, scales, _ = random_int4(rng, 8, 64, 32)
    x = jnp.ones((2, 64))
    with pytest.raises(TypeError, match="frozen"):
        jax.grad(lambda s: int4_matmul(x, packed, s).sum())(scales)
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(lambda p: int4_matmul(x, p, scales).sum())(packed)


def test_residuals_of_the_backward_are_the_packed_weights():
    rng = np.random.default_rng(5)
    packed, scales, _ = random_int4(rng, 48, 64, 32)
    _, pullback = jax.vjp(lambda x: int4_matmul(x, packed, scales), jnp.ones((2, 64)))
    floats = [leaf for leaf in jax.tree.leaves(pullback) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(leaf.size for leaf in floats) <= scales.size


@pytest.mark.parametrize("stacked", [True, False])
def test_no_full_precision_copy_lives_through_a_decoding_loop(stacked):
    layers, n, k = 6, 48, 64
    rng = np.random.default_rng(6)
    packed, scales, _ = random_int4(rng, n, k, 32, layers=(layers,))

    def run(x, packed, scales):
        def layer(i, h):
            if stacked:
                return jnp.pad(jnp.tanh(int4_matmul(h, packed, scales, layer=i)), ((0, 0), (0, k - n)))
            return jnp.pad(jnp.tanh(int4_matmul(h, packed[0], scales[0])), ((0, 0), (0, k - n)))

        return jax.lax.fori_loop(0, 10, lambda _, h: jax.lax.fori_loop(0, layers, layer, h), x)

    hlo = jax.jit(run).lower(jnp.ones((2, k)), packed, scales).compile().as_text()
    loops = re.findall(r"= \(([^)]*)\) while\(", hlo)
    assert loops
    carried = [shape for loop in loops for shape in re.findall(r"(?:f32|bf16|s8|s32)\[([\d,]+)\]", loop)]
    sizes = [int(np.prod([int(dim) for dim in shape.split(",")])) for shape in carried]
    assert max(sizes) < n * k, carried
    stack_sized = [
        dims for kind, dims in re.findall(r"(f32|bf16|s8)\[([\d,]+)\]", hlo) if _size(dims) >= layers * n * k
    ]
    assert not stack_sized


def _size(dims: str) -> int:
    return int(np.prod([int(dim) for dim in dims.split(",")]))


def test_bad_shapes_and_implementations_raise():
    rng = np.random.default_rng(7)
    packed, scales, _ = random_int4(rng, 8, 64, 32)
    x = jnp.ones((2, 64))
    for arguments, message in [
        ({"layer": 0}, "L, N"),
        ({"xa": jnp.ones((2, 3))}, "together"),
        ({"xa": jnp.ones((2, 3)), "lora_b": jnp.ones((8, 4))}, "do not fit"),
        ({"implementation": "cuda"}, "unknown"),
        ({"implementation": "triton"}, "needs an NVIDIA GPU"),
    ]:
        with pytest.raises(ValueError, match=message):
            int4_matmul(x, packed, scales, **arguments)
    with pytest.raises(ValueError, match="x must be"):
        int4_matmul(jnp.ones((2, 32)), packed, scales)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_blocks_of_a_large_matrix_are_the_whole(monkeypatch, stacked, adapter):
    """130 rows in blocks of 48, the last of which repeats a part: product and gradients against float64, and what exists."""
    rng = np.random.default_rng(11)
    packed, scales, weight = random_int4(rng, 130, 64, 32, layers=(3,) if stacked else ())
    weight = weight[1] if stacked else weight
    x, xa, b, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(9, 64), (9, 4), (130, 4), (9, 130)])
    monkeypatch.setattr(reference, "BLOCK_MULTIPLE", 16)

    def run(packed, scales, layer, *trained):
        def product(x, xa=None, b=None):
            return int4_matmul(x, packed, scales, layer=layer if stacked else None, xa=xa, lora_b=b)

        out, pull = jax.vjp(product, *trained)
        return out, pull(g)

    trained = (x, xa, b) if adapter else (x,)

    def compiled(limit):
        monkeypatch.setattr(reference, "DEQUANTIZED_BYTES", limit)
        program = jax.jit(lambda *args: run(*args)).lower(packed, scales, jnp.int32(1), *trained).compile()
        sizes = [
            np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", program.as_text())
        ]
        return program(packed, scales, jnp.int32(1), *trained), max(sizes)

    (out, gradients), largest = compiled(48 * 64 * 4)
    assert 48 * 64 <= largest < 130 * 64
    assert compiled(2**20)[1] >= 130 * 64
    x64, g64, xa64, b64 = (np.asarray(a, np.float64) for a in (x, g, xa, b))
    want = [g64 @ weight, g64 @ b64, g64.T @ xa64] if adapter else [g64 @ weight]
    assert relative_error(out, x64 @ weight.T + (xa64 @ b64.T if adapter else 0)) < 2e-6
    assert all(relative_error(got, expected) < 2e-6 for got, expected in zip(gradients, want, strict=True))


@pytest.mark.parametrize(
    ("rows", "width", "block"),
    [
        (17_920, 1536, 17_920),  # Qwen2.5-1.5B's largest, and Llama-3.1-8B's: whole, as fast as without the rule
        (28_672, 4096, 28_672),
        (35_840, 5120, 17_920),  # 14B, 32B and 70B
        (55_296, 5120, 18_432),
        (57_344, 8192, 14_336),
        (8192, 28_672, 4096),
        (128_256, 4096, 32_128),
        (100, 2**28, 100),
        (1000, 2**28, 128),
    ],
)
def test_blocks_are_even_parts_of_at_most_256_mib(rows, width, block):
    assert reference.row_block(rows, width, 2) == block
    assert block == rows or block % 128 == 0
