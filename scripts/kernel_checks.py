"""Kernels through their public functions on fresh inputs of odd shapes, against float64: a part of `bench_kernels.py`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import Completions, Ends, Rows
from pallas_kernels.rows import permute_columns
from tests.pallas_kernels import oracles


def normal(rng: np.random.Generator, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(rng.normal(size=shape), dtype)


def check_int4(rng: np.random.Generator) -> float:
    """Largest relative error over odd shapes; every implementation that can run."""
    worst = 0.0
    for m, n, k, group in [
        (1, 136, 896, 128),
        (5, 70, 1536, 32),
        (16, 1000, 3584, 64),
        (33, 264, 896, 64),
        (64, 4864, 896, 64),
        (200, 520, 1536, 128),
        (256, 1536, 8960, 64),
    ]:
        packed, scales, weight = oracles.random_int4(rng, n, k, group, layers=(2,))
        x, xa, b = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in [(m, k), (m, 24), (2, n, 24)])
        run = jax.jit(lambda i, *a: pallas_kernels.int4_matmul(*a[:3], layer=i, xa=a[3], lora_b=a[4]))
        for layer in (0, 1):
            want = np.asarray(x, np.float64) @ weight[layer].T
            want += np.asarray(xa, np.float64) @ np.asarray(b[layer], np.float64).T
            worst = max(worst, oracles.relative_error(run(layer, x, packed, jnp.bfloat16(scales), xa, b), want))
    return worst


def check_attention(rng: np.random.Generator) -> float:
    """Largest relative error over head layouts, lengths and windows."""
    worst = 0.0
    for heads, kv_heads, depth, generations, window in [
        (12, 2, 128, 8, None),
        (14, 2, 64, 5, 70),
        (7, 1, 128, 16, None),
        (8, 8, 64, 3, 300),
    ]:
        q, prompt, suffix = 3, 100, 150
        arrays = [
            jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
            for shape in [(q, generations, heads, depth)]
            + [(2, q, kv_heads, prompt, depth)] * 2
            + [(2, q, generations, kv_heads, suffix, depth)] * 2
        ]
        lengths = jnp.asarray(rng.integers(1, prompt + 1, q), jnp.int32)
        case = (*arrays[:3], lengths, *arrays[3:])
        run = jax.jit(lambda n, i, *a, w=window: pallas_kernels.decode_attention(*a, n, layer=i, scale=0.1, window=w))
        for length in (1, 77, suffix):
            want = oracles.attention(*case, length, 1, 0.1, window)
            worst = max(worst, oracles.relative_error(run(length, 1, *case), want))
    return worst


def check_rope_attention(rng: np.random.Generator) -> float:
    """The rule's choice (of these sizes, one kernel on an H200) and the twins, over layouts and slots: outputs and both caches."""
    worst = 0.0
    for heads, kv_heads, generations, normed in [(6, 2, 9, True), (12, 2, 8, False), (4, 1, 5, True)]:
        q, prompt, suffix, depth = 32, 100, 150, 128
        draw = partial(normal, rng)
        parts = draw(3, q, generations, (heads + 2 * kv_heads) * depth, dtype=jnp.float32)
        angles = [jnp.asarray(f(rng.normal(size=(q, depth // 2)) * 9), jnp.float32) for f in (np.cos, np.sin)]
        prompts = [draw(2, q, kv_heads, prompt, depth) for _ in "kv"]
        caches = [draw(2, q, generations, kv_heads, suffix, depth) for _ in "kv"]
        lengths = jnp.asarray(rng.integers(1, prompt + 1, q), jnp.int32)
        norms, bias = (draw(2, depth), draw(2, depth)) if normed else None, draw(2, parts.shape[-1])
        how = dict(layer=1, scale=0.1, permuted=True, window=70, norms=norms, bias=bias, dtype=jnp.bfloat16)
        run = jax.jit(
            lambda slot, *a, how=how, implementation=None: pallas_kernels.rope_attention(
                *a, slot, implementation=implementation, **how
            ),
            static_argnames="implementation",
        )
        for slot in (0, 1, 77, suffix - 1):
            arguments = (slot, parts, *angles, *prompts, lengths, *caches)
            results = [jax.tree.leaves(run(*arguments, implementation=name)) for name in (None, "reference")]
            for got, want in zip(*results, strict=True):
                worst = max(worst, oracles.relative_error(got, want))
    return worst


def check_partial_sums(rng: np.random.Generator) -> float:
    """Products that leave partial sums, and the operations that add them, in the orders of columns that they hand on."""
    worst = 0.0

    def compare(got, want) -> None:
        nonlocal worst
        worst = max(worst, oracles.relative_error(got, want))

    for m, n, k in [(1, 136, 896), (33, 4864, 896), (64, 1536, 8960), (200, 520, 1536)]:
        packed, scales, weight = oracles.random_int4(rng, n, k, 64, layers=(2,))
        x, dense = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in [(m, k), (2, n, k)])
        for rows in (Rows(x), Rows(x, permute_columns(x))):
            run = jax.jit(lambda rows, *w: pallas_kernels.int4_partial_sums(rows, *w, layer=1, implementation="triton"))
            compare(run(rows, packed, jnp.bfloat16(scales)).sum(0), np.asarray(x, np.float64) @ weight[1].T)
        run = jax.jit(lambda x, w: pallas_kernels.dense_partial_sums(x, w, layer=1, implementation="triton"))
        compare(run(x, dense).sum(0), np.asarray(x, np.float64) @ np.asarray(dense[1], np.float64).T)
        for step in between_steps(m, n - n % 16, parts=3, rng=rng):
            results = [jax.tree.leaves(step(implementation=name)) for name in ("triton", "reference")]
            for got, want in zip(*results, strict=True):
                compare(got, want)
    return worst


def check_gated(rng: np.random.Generator) -> float:
    """Product of gate and up with its gate, with bias, of columns and rows that fill no tile, and with tiles side by side."""
    worst = 0.0
    for m, f, k in [(1, 136, 896), (33, 4864, 896), (64, 8960, 1536), (200, 520, 1536), (256, 8960, 1536)]:
        x, weight, bias = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in [(m, k), (2, 2 * f, k), (2, 2 * f)])
        how = dict(activation="silu", layer=1, implementation="triton")
        got = jax.jit(lambda x, weight, bias, how=how: pallas_kernels.gated_matmul(x, weight, bias=bias, **how))
        both = np.asarray(x, np.float64) @ np.asarray(weight[1], np.float64).T + np.asarray(bias[1], np.float64)
        gate, up = np.split(both, 2, axis=1)
        worst = max(worst, oracles.relative_error(got(x, weight, bias), gate / (1 + np.exp(-gate)) * up))
    return worst


def check_draw(rng: np.random.Generator) -> float:
    """Largest error of a log-probability, or distance of a number from its token's part of [0, 1], of odd and of usual vocabularies."""
    worst = 0.0
    for m, vocab, temperature in [(1, 1, 1.0), (5, 7, 0.7), (33, 4097, 1.0), (64, 128_256, 1.0), (70, 151_936, 0.6)]:
        logits = np.float32(rng.normal(0, 3, (m, vocab)))
        logits[:, rng.integers(0, vocab, vocab // 3)] = -np.inf
        logits[:, rng.integers(0, vocab)] = 4.0
        uniform = np.float32(rng.uniform(size=m)).clip(0, np.nextafter(np.float32(1), np.float32(0)))
        how = dict(temperature=temperature, implementation="triton")
        got = jax.jit(lambda logits, uniform, how=how: pallas_kernels.draw_token(logits, uniform, **how))(
            logits, uniform
        )
        worst = max(worst, *oracles.draw_errors(logits, uniform, temperature, *map(np.asarray, got)))
    return worst


def check_record(rng: np.random.Generator) -> float:
    """Entries of the record that are not those of the twin, of tokens that the kernels of `draw_token` and of `draw_corrected` draw."""
    logits, uniform = jnp.asarray(rng.normal(size=(70, 5000)), jnp.float32), jnp.float32(rng.uniform(size=(3, 70)))
    before, remaining = rng.integers(0, 9, (3, 4, 70), np.int32), rng.integers(0, 3, 70, np.int32)
    completions, ends = Completions(jnp.asarray(before), jnp.asarray(remaining)), Ends(tuple(range(0, 5000, 7)), 11)
    how, step = dict(temperature=0.9, implementation="triton"), jnp.int32(1)
    hidden, head = normal(rng, 70, 896), normal(rng, 5000, 896) / 30
    proposal = jnp.matmul(hidden, head.T, preferred_element_type=jnp.float32)
    numbers = jnp.float32(rng.uniform(size=(3, 70, pallas_kernels.numbers_a_token())))
    wrong = 0
    for draw, draw_and_record, given in [
        (pallas_kernels.draw_token, pallas_kernels.draw_and_record, (logits, uniform)),
        (pallas_kernels.draw_corrected, pallas_kernels.draw_corrected_and_record, (proposal, hidden, head, numbers)),
    ]:
        token, logprob = jax.jit(partial(draw, **how))(*given, step=step)
        got = jax.jit(partial(draw_and_record, ends=ends, **how))(*given, completions, step=step)
        want = pallas_kernels.record(completions, 1, ends, token, logprob, jnp.zeros_like(logprob))
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        wrong += sum(np.sum(np.asarray(a) != b) for a, b in pairs)
    return float(wrong)


def check_begin_step(rng: np.random.Generator) -> float:
    """Largest relative error of normed rows; infinite where what is only copied differs."""
    worst = 0.0
    for questions, group, width in [(1, 1, 896), (5, 3, 1536), (8, 8, 1536), (3, 2, 8192)]:
        table, scale = normal(rng, 200, width), normal(rng, 2, width)
        tokens, lengths = (jnp.asarray(rng.integers(0, 200, n), jnp.int32) for n in (questions * group, questions))
        rotations = normal(rng, 2, 300, 64, dtype=jnp.float32)
        positions = pallas_kernels.Positions(lengths, jnp.int32(32), jnp.int32(5), rotations)
        run = jax.jit(partial(pallas_kernels.begin_step, eps=1e-6, permuted=True, implementation="triton"))
        residual, rows, slot, rotated = run(tokens, table, scale, positions)
        copied = [(residual, table[tokens]), (rows.permuted, permute_columns(rows.plain)), (slot, 37)]
        copied += list(zip(rotated, rotations[:, lengths + 37], strict=True))
        x = np.asarray(table[tokens], np.float64)
        want = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * np.asarray(scale[0], np.float64)
        exact = all(np.array_equal(np.float32(got), np.float32(right)) for got, right in copied)
        worst = max(worst, oracles.relative_error(rows.plain, want) if exact else np.inf)
    return worst


def check_merge_layer(rng: np.random.Generator) -> float:
    """Largest relative difference to the twin's weights: sums in another order may put a weight on the next code."""
    worst = 0.0
    for n, k, own, rank, gate in [(70, 192, 32, 0, False), (2048, 1536, 64, 96, False), (17920, 1536, 64, 64, True)]:
        packed, scales, _ = oracles.random_int4(rng, n, k, own, layers=(2,))
        adapter = (normal(rng, 2, rank, k, dtype=jnp.float32) / 50, normal(rng, 2, n, rank, dtype=jnp.float32) / 50)
        source = pallas_kernels.Source(jnp.asarray(packed), jnp.bfloat16(scales), adapter if rank else None)
        shape = dict(layers=2, group=64, gate=gate, dtype=jnp.bfloat16, scales_dtype=jnp.bfloat16)
        weights = []
        for name in ("triton", "reference"):
            run = jax.jit(partial(pallas_kernels.merge_layer, **shape, implementation=name), donate_argnums=0)
            made = run(run(None, source, 0, 0), source, 1, 1)
            parts = [pallas_kernels.dequantize(made.packed[i], made.scales[i].T, jnp.float32, "fast8") for i in (0, 1)]
            weights.append(np.concatenate(parts))
        worst = max(worst, oracles.relative_error(*weights))
    return worst


def check_draw_corrected(rng: np.random.Generator) -> float:
    """Largest error of a log-probability, infinite where another token was drawn, of the rows without a number near a boundary."""
    worst = 0.0
    for m, vocab, width, temperature in [
        (1, 7, 16, 1.0),
        (33, 4097, 896, 0.7),
        (64, 20_000, 1536, 1.0),
        (8, 3000, 4096, 1.5),
    ]:
        hidden, head = normal(rng, m, width), jnp.bfloat16(rng.normal(0, 3 / width**0.5, (vocab, width)))
        exact = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
        proposal = np.float32(exact + rng.normal(0, 0.1, exact.shape))
        numbers = np.float32(rng.uniform(size=(m, pallas_kernels.numbers_a_token()))).clip(0, 1 - 2.0**-24)
        how = dict(temperature=temperature, implementation="triton")
        run = jax.jit(lambda *given, how=how: pallas_kernels.draw_corrected(*given, **how))
        token, logprob = map(np.asarray, run(proposal, hidden, head, numbers))
        want, want_logprob, clear = oracles.corrected_draw(proposal, hidden, head, numbers, temperature)
        errors = np.where(token == want, np.abs(logprob - want_logprob), np.inf)
        worst = max(worst, float(errors[clear].max()))
    return worst


def between_steps(m: int, width: int, parts: int, rng: np.random.Generator) -> list:
    """Calls of the operations between two products on random arguments, with permuted columns."""
    draw = partial(normal, rng)
    x, scale = draw(m, width), draw(3, width)
    sums, both = draw(parts, m, width, dtype=jnp.float32), draw(parts, m, 2 * width, dtype=jnp.float32)
    add = partial(pallas_kernels.add_rms_norm, x, sums, scale, layer=2, eps=1e-6, permuted=True)
    gate = partial(pallas_kernels.gated_activation, both, activation="silu", dtype=jnp.bfloat16, layer=2, permuted=True)
    return [add, gate]


CHECKS = {
    "int4_matmul": check_int4,
    "decode_attention": check_attention,
    "rope_attention": check_rope_attention,
    "partial_sums": check_partial_sums,
    "gated_matmul": check_gated,
    "draw": check_draw,
    "record": check_record,
    "begin_step": check_begin_step,
    "merge_layer": check_merge_layer,
    "draw_corrected": check_draw_corrected,
}
"""Largest relative error by operation, of the draw an absolute one, of the record a count; each takes a random generator."""
