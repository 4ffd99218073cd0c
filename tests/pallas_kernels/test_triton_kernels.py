"""The Triton kernels' own code against float64; outputs start as NaN. Interpreted on the CPU, compiled on a GPU."""

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, whose interpreter runs the kernels on a CPU", allow_module_level=True)

from pallas_kernels import cache_codes, codes
from pallas_kernels.tuning import MMA, MMA_SWAPPED, WGMMA
from tests.pallas_kernels import launch
from tests.pallas_kernels.launch import DTYPES, TOLERANCE, float64, rounded
from tests.pallas_kernels.oracles import attention, random_int4, relative_error

PLAIN = launch.Int4Config(block_m=16, block_n=32, block_k=64, split_k=1, product=MMA, warps=4, stages=2)


def int4_blocks(**changes) -> launch.Int4Config:
    """PLAIN with changes; wgmma wants 64 rows of weights for a warp group, and four warps would make mma wgmma."""
    if changes.get("product") == WGMMA:
        changes = {"block_n": 64, **changes}
    if changes.get("product") == MMA_SWAPPED:
        changes = {**changes, "warps": 2}
    return launch.Int4Config(**{**vars(PLAIN), **changes})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", [MMA, MMA_SWAPPED, WGMMA])
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "blocks"),
    [
        (1, 7, 64, 32, {"block_k": 32}),
        (5, 70, 128, 64, {"block_k": 128, "block_n": 64}),
        (16, 33, 256, 128, {"block_k": 128}),
        (33, 40, 128, 32, {"block_m": 32}),
        (200, 9, 64, 64, {"block_m": 64}),
        (5, 33, 896, 128, {"block_k": 128, "split_k": 3}),
        (3, 17, 1536, 64, {"block_k": 128, "split_k": 12}),
        (3, 17, 3584, 64, {"block_k": 256, "split_k": 5}),
    ],
)
def test_int4_matmul(m, n, k, group, blocks, product, dtype):
    rng = np.random.default_rng(m + n + k)
    packed, scales, weight = random_int4(rng, n, k, group)
    x = rounded(rng.normal(size=(m, k)), dtype)
    out = launch.int4_matmul(x, packed, scales, 0, None, None, int4_blocks(product=product, **blocks))
    assert relative_error(out, float64(x) @ weight.T) < TOLERANCE[dtype]


@pytest.mark.parametrize("product", [MMA, MMA_SWAPPED, WGMMA])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("pointer", [False, True])
def test_int4_matmul_adds_the_adapter_of_the_layer(pointer, stacked, split_k, product):
    rng, dtype = np.random.default_rng(8), DTYPES[-1]
    packed, scales, weight = random_int4(rng, 20, 128, 32, layers=(3,))
    x, xa = rounded(rng.normal(size=(5, 128)), dtype), rounded(rng.normal(size=(5, 12)), dtype)
    b = rounded(rng.normal(size=(3, 20, 12)), dtype).float()
    for layer in (1, 2):
        blocks = int4_blocks(product=product, split_k=split_k)
        out = launch.int4_matmul(x, packed, scales, layer, xa, b if stacked else b[layer], blocks, pointer)
        want = float64(x) @ weight[layer].T + float64(xa) @ float64(b[layer]).T
        assert relative_error(out, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("product", [MMA, MMA_SWAPPED, WGMMA])
@pytest.mark.parametrize(("split_k", "xa_parts"), [(1, 3), (2, 5), (3, 2)])
def test_int4_matmul_adds_partial_sums_of_the_adapter(split_k, xa_parts, product):
    """Splits share the parts out, also where there are fewer of them than splits."""
    rng, dtype = np.random.default_rng(split_k), DTYPES[-1]
    packed, scales, weight = random_int4(rng, 20, 192, 32, layers=(3,))
    x, xa = rounded(rng.normal(size=(5, 192)), dtype), rounded(rng.normal(size=(xa_parts, 5, 12)), "float32")
    b = rounded(rng.normal(size=(3, 20, 12)), dtype)
    out = launch.int4_matmul(x, packed, scales, 2, xa, b, int4_blocks(product=product, split_k=split_k))
    want = float64(x) @ weight[2].T + float64(xa).sum(0) @ float64(b[2]).T
    assert relative_error(out, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("product", [MMA, MMA_SWAPPED, WGMMA])
@pytest.mark.parametrize("block_k", [128, 256])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_matmul_with_bfloat16_scales(group, block_k, product):
    rng, dtype = np.random.default_rng(9), DTYPES[0]
    packed, scales, weight = random_int4(rng, 70, 512, group)
    exact = np.round(scales * 256) / 256  # few enough bits for bfloat16
    weight *= np.repeat(exact / scales.astype(np.float64), group, axis=-1)
    x = rounded(rng.normal(size=(40, 512)), dtype)
    blocks = int4_blocks(product=product, block_m=64, block_k=block_k)
    out = launch.int4_matmul(x, packed, rounded(exact, "bfloat16"), 0, None, None, blocks)
    assert relative_error(out, float64(x) @ weight.T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", ["int4", "nf4", "int8", "fast8"])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(1, 64, 32), (7, 896, 64), (70, 1536, 128), (33, 3584, 64), (3, 256, 256)]
)
def test_dequantize(n, k, group, code, dtype):
    rng = np.random.default_rng(n + k)
    packed, scales, _ = random_int4(rng, n, k, group, layers=(3,))
    if codes.PER_BYTE[code] == 1:
        packed = rng.integers(0, 256, (3, n, k), dtype=np.uint8).view(np.int8 if code == "int8" else np.uint8)
    want = float64(rounded(codes.dequantize(packed, scales, np.float32, code), dtype))
    for layer, pointer in ((2, True), (0, False), (1, True)):
        np.testing.assert_array_equal(
            launch.dequantize(packed, scales, layer, dtype, code, pointer=pointer), want[layer]
        )


@pytest.mark.parametrize("rank", [1, 12, 32, 96])
def test_dequantize_appends_the_adapter(rank):
    rng, dtype = np.random.default_rng(rank), DTYPES[0]
    packed, scales, weight = random_int4(rng, 530, 128, 64)
    tail = rounded(rng.normal(size=(530, rank)), dtype)
    out = launch.dequantize(packed, scales, 0, dtype, tail=tail)
    np.testing.assert_array_equal(out[:, :128], float64(rounded(weight, dtype)))
    np.testing.assert_array_equal(out[:, 128:], float64(tail))


def attention_case(rng, dtype, length, questions=2, generations=3, heads=4, kv_heads=2, depth=16, prompt=40, suffix=50):
    """Random arguments of decode_attention over two layers; slots out of use hold NaN."""
    q = rng.normal(size=(questions, generations, heads, depth))
    prompts = rng.normal(size=(2, 2, questions, kv_heads, prompt, depth))
    suffixes = rng.normal(size=(2, 2, questions, generations, kv_heads, suffix, depth))
    lengths = rng.integers(1, prompt + 1, questions).astype(np.int32)
    for question, used in enumerate(lengths):
        prompts[:, :, question, :, used:] = np.nan
    suffixes[..., length:, :] = np.nan
    prompts, suffixes = rounded(prompts, dtype), rounded(suffixes, dtype)
    return rounded(q, dtype), prompts[0], prompts[1], lengths, suffixes[0], suffixes[1]


def attention_error(case, length, layer, window, config) -> float:
    """Relative error against the float64 oracle."""
    out = launch.decode_attention(*case, length, layer, 0.25, window, config)
    exact = [a if isinstance(a, np.ndarray) else float64(a) for a in case]
    return relative_error(out, attention(*exact, length, layer, 0.25, window))


def attention_blocks(prompt_splits, suffix_splits, generations=0, prompt_rows=32) -> launch.AttentionConfig:
    """Blocks of 16 slots, of one or, in programs that read prompt and suffix, two warps, a block smaller than prompts."""
    if generations:
        return launch.AttentionConfig(32, prompt_rows, suffix_splits, prompt_splits, 2, 2, generations)
    return launch.AttentionConfig(16, prompt_rows, suffix_splits, prompt_splits, warps=4, stages=2)


FORMS = [(1, 1), (2, 3), (4, 4), (0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 3, 2)]
"""Arguments of `attention_blocks`; two generations a tile leave one of three over."""


@pytest.mark.parametrize("splits", [(2, 3), (1, 1), (0, 1, 2), (0, 3, 2)])
@pytest.mark.parametrize("window", [None, 20])
def test_decode_attention_over_codes(window, splits):
    """int8 keys and values with a scale for each slot and head; scales of slots out of use are NaN."""
    dtype = DTYPES[-1]
    q, prompt_k, prompt_v, lengths, k, v = attention_case(np.random.default_rng(4), dtype, 33)
    codes, scales = [], []
    for stack in (prompt_k, prompt_v, k, v):
        part, scale = cache_codes.encode(np.nan_to_num(stack.float().cpu().numpy()), "int8")
        unused = stack[..., 0].isnan().cpu().numpy()
        codes.append(rounded(part, "int8"))
        scales.append(rounded(np.where(unused, np.nan, scale), "float32"))
    case = (q, *codes[:2], lengths, *codes[2:])
    out = launch.decode_attention(*case, 33, 1, 0.25, window, attention_blocks(*splits), scales=scales)
    exact = [float64(part) * float64(scale)[..., None] for part, scale in zip(codes, scales, strict=True)]
    want = attention(float64(q), *exact[:2], lengths, *exact[2:], 33, 1, 0.25, window)
    assert relative_error(out, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", FORMS)
@pytest.mark.parametrize(("length", "window"), [(1, None), (50, None), (17, None), (33, 20), (5, 8), (50, 1), (9, 500)])
def test_decode_attention(length, window, splits):
    dtype = DTYPES[-1]
    case = attention_case(np.random.default_rng(length), dtype, length)
    assert attention_error(case, length, 1, window, attention_blocks(*splits)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "generations"), [(1, 1, 1), (7, 1, 6), (6, 6, 2), (14, 2, 5), (20, 1, 2)]
)
@pytest.mark.parametrize("splits", [(2, 2), (1, 1), (0, 1, 2), (0, 2, 2)])
def test_decode_attention_head_layouts(heads, kv_heads, generations, splits):
    dtype = DTYPES[-1]
    case = attention_case(np.random.default_rng(heads), dtype, 20, 2, generations, heads, kv_heads)
    assert attention_error(case, 20, 0, None, attention_blocks(*splits, prompt_rows=16)) < TOLERANCE[dtype]
