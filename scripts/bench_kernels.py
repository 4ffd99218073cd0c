"""Time the kernels inside compiled JAX programs, next to what XLA and cuBLAS do, after checking that they are right.

    python scripts/bench_kernels.py [--op int4_matmul dense_matmul gated_matmul between decode_attention rope_attention
        token_logprobs draw] [--rows 16 64 256] [--suffixes 1 256 512] [--draw-blocks 2048:4 4096:8]
        [--shapes qwen2.5-1.5b llama-3.2-3b llama-3.1-8b] [--json FILE] [--skip-check]

One JSON object a measurement (on stdout, and in --json FILE), then a table. A time is that of one call inside a program
that makes many dependent calls, over a stack of layers larger than the L2 cache, median of several runs of the program.
The bound is bytes moved / copy bandwidth or operations / bf16 matmul rate, whichever is larger; both rates are measured
first, on this GPU. The check draws fresh inputs and compares with float64 (numpy), on odd shapes. 'between' are the
operations between two products: residual with norm, and the MLP's gate, of five and of two partial sums. 'rope_attention' is
rotation, cache write and attention of four partial sums at 64 rows, as one kernel and 'apart'. 'draw' takes rows of its own.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernel_checks import CHECKS

import pallas_kernels
from pallas_kernels import dispatch, joined, tuning

SHAPES = {  # output and input widths of the linear layers: (N, K)
    "qwen2.5-1.5b": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
    "llama-3.2-3b": [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)],
    "llama-3.1-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
}
HEADS = {"qwen2.5-1.5b": (12, 2, 128), "llama-3.2-3b": (24, 8, 128), "llama-3.1-8b": (32, 8, 128)}
GATE_UP = 2  # of a model's SHAPES
GROUP, RANK = 64, 32
OPS = (
    "int4_matmul",
    "dense_matmul",
    "gated_matmul",
    "between",
    "decode_attention",
    "rope_attention",
    "token_logprobs",
    "draw",
)
VOCABULARIES, DRAW_ROWS = (128_256, 151_936), (64, 256, 512)
STACK_BYTES = 2**28


def seconds(program, *arguments, repeats: int = 7) -> float:
    """Median time of one run of a compiled program."""
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def decoding_loop(step, layers: int, calls: int, iterations: int):
    """A program shaped like a decoding loop: `iterations` times the same `calls` calls step(x, layer), in order.

    The barrier ties x to the last result, so that XLA neither merges nor drops nor reorders calls.
    """

    def program(x, *operands):
        def body(_, x):
            total = 0.0
            for call in range(calls):
                x, out = lax.optimization_barrier((x, step(x, call % layers, *operands)))
                total += out[(0,) * out.ndim].astype(jnp.float32)
            return x + (0 * total).astype(x.dtype)

        return lax.fori_loop(0, iterations, body, x)

    return jax.jit(program)


def microseconds(step, x, layers: int, *operands, calls: int = 28, iterations: int = 20) -> float:
    """Time of one call, less its share of an empty program's time."""
    empty = seconds(jax.jit(lambda x: x[:1]), x)
    program = decoding_loop(step, layers, calls, iterations)
    return (seconds(program, x, *operands) - empty) / (calls * iterations) * 1e6


def measure_rates() -> tuple[float, float]:
    """(bytes/s of a large copy, FLOP/s of a large bf16 product) on this device."""
    big, steps = jnp.ones((2**30,), jnp.bfloat16), 20
    copies = jax.jit(lambda a: lax.fori_loop(0, steps, lambda _, a: a * 1.001, a))
    copy = seconds(copies, big) / steps
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (8192, 8192), jnp.bfloat16) for key in keys)
    product = microseconds(lambda a, _, b: a @ b, a, 1, b, calls=2, iterations=5) / 1e6
    return 2 * big.nbytes / copy, 2 * 8192**3 / product


def bench_dense(shapes, rows, rates, report) -> None:
    """The kernel's partial sums, added, next to XLA's product; 'chosen' is what the dispatch rule picks."""
    device = dispatch.current_device()
    for model, n, k, m in [(name, n, k, m) for name in shapes for n, k in SHAPES[name] for m in rows]:
        layers = int(max(2, min(28, STACK_BYTES // (2 * n * k))))
        keys = jax.random.split(jax.random.key(m), layers + 1)
        x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
        weights = [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys[1:]]

        def step(x, layer, *weights, implementation: str):
            return joined(pallas_kernels.dense_partial_sums(x, weights[layer], implementation=implementation), x.dtype)

        times = {
            name: microseconds(partial(step, implementation=name), x, layers, *weights, calls=layers)
            for name in ("triton", "reference")
        }
        measured = tuning.dense_measurement(m, n, k)
        times["chosen"] = times[dispatch.dense_matmul_rule(device, x.dtype, x.dtype, m, n, k, measured)]
        moved, flops = 2 * (n * k + m * (n + k)), 2 * m * n * k
        bound = max(moved / rates[0], flops / rates[1]) * 1e6
        report(op="dense_matmul", shape=f"{model} {k}x{n}", rows=m, bound=bound, bytes=moved, flops=flops, **times)


def bench_gated(shapes, rows, rates, report) -> None:
    """Product and gate as one kernel, as two launches that choose by their own rules, and in plain XLA."""
    device = dispatch.current_device()
    for model, (n, k), m in [(name, SHAPES[name][GATE_UP], m) for name in shapes for m in rows]:
        layers = int(max(2, min(28, STACK_BYTES // (2 * n * k))))
        keys = jax.random.split(jax.random.key(m), layers + 1)
        x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
        weights = [k**-0.5 * jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys[1:]]

        def fused(x, layer, *weights, implementation: str):
            how = dict(activation="silu", layer=layer, implementation=implementation)
            return pallas_kernels.gated_matmul(x, weights[layer], **how)

        def apart(x, layer, *weights):
            parts = pallas_kernels.dense_partial_sums(x, weights[layer])
            return pallas_kernels.gated_activation(parts, activation="silu", dtype=x.dtype, layer=layer).plain

        steps = {name: partial(fused, implementation=name) for name in ("triton", "reference")} | {"apart": apart}
        times = {name: microseconds(step, x, layers, *weights, calls=layers) for name, step in steps.items()}
        measured = tuning.gated_measurement(m, n, k)
        rule = dispatch.gated_matmul_rule(device, x.dtype, x.dtype, m, k, measured)
        times["chosen"] = times["triton" if rule == dispatch.TRITON else "apart"]
        moved, flops = 2 * (n * k + m * (n // 2 + k)), 2 * m * n * k
        bound = max(moved / rates[0], flops / rates[1]) * 1e6
        report(op="gated_matmul", shape=f"{model} {k}x{n}", rows=m, bound=bound, bytes=moved, flops=flops, **times)


def bench_between(shapes, rows, rates, report) -> None:
    """Residual and norm of five partial sums, the gate of two; kernel and XLA."""
    for model, m in [(name, m) for name in shapes for m in rows]:
        (_, width), (mlp, _) = SHAPES[model][1], SHAPES[model][2]
        keys = jax.random.split(jax.random.key(m), 4)
        x = jax.random.normal(keys[0], (m, width), jnp.bfloat16)
        sums, both = jax.random.normal(keys[1], (5, m, width)), jax.random.normal(keys[2], (2, m, mlp))
        scale = jax.random.normal(keys[3], (28, width), jnp.bfloat16)

        def add(x, layer, sums, scale, implementation: str):
            how = dict(layer=layer, eps=1e-6, permuted=True, implementation=implementation)
            return pallas_kernels.add_rms_norm(x, sums, scale, **how)[1].permuted

        def gate(x, layer, both, implementation: str):
            parts, _ = lax.optimization_barrier((both, x))  # else a result that no call changes is computed once
            how = dict(activation="silu", dtype=x.dtype, layer=layer, permuted=True, implementation=implementation)
            return pallas_kernels.gated_activation(parts, **how).permuted

        moved = {"add_rms_norm": m * width * (4 * 5 + 2 * 4), "gated_activation": m * mlp // 2 * (2 * 2 * 4 + 2 * 2)}
        for op, step, operands in (("add_rms_norm", add, (sums, scale)), ("gated_activation", gate, (both,))):
            times = {
                name: microseconds(partial(step, implementation=name), x, 28, *operands)
                for name in ("triton", "reference")
            }
            bound = moved[op] / rates[0] * 1e6
            report(op=op, shape=model, rows=m, bound=bound, bytes=moved[op], flops=0, chosen=times["triton"], **times)


def int4_case(n: int, k: int, m: int):
    """(x, layers, operands of a fused call): x, then packed, scales, xa and B of a stack larger than the cache."""
    layers = int(max(2, min(28, STACK_BYTES // (n * k // 2))))
    keys = jax.random.split(jax.random.key(m), 5)
    x, xa = jax.random.normal(keys[0], (m, k), jnp.bfloat16), jax.random.normal(keys[1], (m, RANK), jnp.bfloat16)
    packed = jax.random.randint(keys[2], (layers, n, k // 2), 0, 256, jnp.int32).astype(jnp.uint8)
    scales = jax.random.uniform(keys[3], (layers, n, k // GROUP), jnp.bfloat16, 0.01, 0.03)
    b = jax.random.normal(keys[4], (layers, n, RANK), jnp.bfloat16)
    return x, layers, (packed, scales, xa, b)


def int4_step(x, layer, packed, scales, xa, b, implementation: str):
    """One product with its adapter."""
    return pallas_kernels.int4_matmul(x, packed, scales, layer=layer, xa=xa, lora_b=b, implementation=implementation)


def bench_int4(shapes, rows, rates, report, compare: bool) -> None:
    """Fused, dequantize + XLA, and bf16 weights without an adapter; 'chosen' is what the dispatch rule picks."""
    device = dispatch.current_device()
    for model, n, k, m in [(name, n, k, m) for name in shapes for n, k in SHAPES[name] for m in rows]:
        x, layers, operands = int4_case(n, k, m)
        moved = n * k / 2 + n * k / GROUP * 2 + n * RANK * 2 + m * (k + n) * 2
        bound = max(moved / rates[0], 2 * m * n * k / rates[1]) * 1e6
        rule = dispatch.int4_matmul_rule(device, x.dtype, m, k, GROUP)
        times = {"triton": microseconds(partial(int4_step, implementation="triton"), x, layers, *operands)}
        if compare or rule == dispatch.REFERENCE:
            step = partial(int4_step, implementation="reference")
            times["reference"] = microseconds(step, x, layers, *operands, calls=8)
        if compare:
            keys = jax.random.split(jax.random.key(0), min(layers, 8))
            dense = [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys]
            times["bf16"] = microseconds(lambda x, i, *w: x @ w[i].T, x, len(dense), *dense, calls=8)
        times["chosen"] = times[rule]
        report(
            op="int4_matmul", shape=f"{model} {k}x{n}", rows=m, bound=bound, bytes=moved, flops=2 * m * n * k, **times
        )


def attention_step(x, layer, pk, pv, lengths, k, v, length, implementation: str | None = None):
    """One layer's attention."""
    return pallas_kernels.decode_attention(
        x, pk, pv, lengths, k, v, length, layer=layer, scale=x.shape[-1] ** -0.5, implementation=implementation
    )


def bench_attention(shapes, rates, report, compare: bool) -> None:
    """The kernel with the whole suffix in use, then with a twelfth of the slots, next to XLA's attention."""
    for model, q, length in [(name, q, length) for name in shapes for q in (8, 32) for length in (768, 64)]:
        (heads, kv, depth), g, prompt, suffix = HEADS[model], 8, 256, 768
        layer_bytes = 4 * depth * kv * q * (prompt + g * suffix)
        layers = int(max(2, min(16, 2 * STACK_BYTES // layer_bytes)))
        keys = jax.random.split(jax.random.key(q), 5)
        half = jnp.bfloat16
        query = jax.random.normal(keys[0], (q, g, heads, depth), half)
        pk, pv = (jax.random.normal(key, (layers, q, kv, prompt, depth), half) for key in keys[1:3])
        k, v = (jax.random.normal(key, (layers, q, g, kv, suffix, depth), half) for key in keys[3:])
        lengths = jnp.full((q,), prompt, jnp.int32)
        moved = 4 * depth * kv * q * (prompt + g * length)
        flops = 4 * q * g * heads * depth * (prompt + length)

        operands = (pk, pv, lengths, k, v, jnp.int32(length))
        times = {"chosen": microseconds(attention_step, query, layers, *operands)}
        if compare:
            step = partial(attention_step, implementation="reference")
            times["reference"] = microseconds(step, query, layers, *operands, calls=8)
        report(
            op="decode_attention",
            shape=f"{model} prompt 256, suffix {length} of 768",
            rows=q * g,
            bound=max(moved / rates[0], flops / rates[1]) * 1e6,
            bytes=moved,
            flops=flops,
            **times,
        )


def rotate_and_attend(parts, layer, cos, sin, pk, pv, lengths, k, v, slot, fused: bool):
    """One layer's (outputs, k, v), by one kernel or by two."""
    how = dict(layer=layer, scale=k.shape[-1] ** -0.5, permuted=False)
    if fused:
        arguments = (parts, cos, sin, pk, pv, lengths, k, v, slot)
        rows, k, v, _ = pallas_kernels.rope_attention(*arguments, dtype=jnp.bfloat16, implementation="triton", **how)
        return rows.plain, k, v
    q, k, v, _ = pallas_kernels.rope_and_cache(parts, cos, sin, k, v, slot, layer=layer, dtype=jnp.bfloat16)
    return pallas_kernels.decode_attention_rows(q, pk, pv, lengths, k, v, slot + 1, **how).plain, k, v


def rotating_loop(fused: bool, layers: int, calls: int, iterations: int):
    """As `decoding_loop`, but carrying the caches, which every call writes in place."""

    def program(parts, k, v, cos, sin, pk, pv, lengths, slot):
        def body(_, carry):
            parts, k, v = carry
            total = 0.0
            for call in range(calls):
                out, k, v = rotate_and_attend(parts, call % layers, cos, sin, pk, pv, lengths, k, v, slot, fused)
                parts, out = lax.optimization_barrier((parts, out))
                total += out[0, 0].astype(jnp.float32)
            return parts + 0 * total, k, v

        return lax.fori_loop(0, iterations, body, (parts, k, v))[0]

    return jax.jit(program)


def bench_rope_attention(shapes, suffixes, rates, report) -> None:
    """64 rows, prompt 256: the kernel, and its two parts by their own rules; suffixes count the token that is written."""
    calls, iterations, q, g, prompt = 28, 100, 8, 8, 256  # so many that copying the caches once does not show
    for model, length in [(name, length) for name in shapes for length in suffixes]:
        heads, kv, depth = HEADS[model]
        layers = int(max(2, min(28, STACK_BYTES // (4 * depth * kv * q * (prompt + g * max(suffixes))))))
        keys = jax.random.split(jax.random.key(length), 5)
        parts = jax.random.normal(keys[0], (4, q, g, (heads + 2 * kv) * depth))
        pk, pv = (jax.random.normal(key, (layers, q, kv, prompt, depth), jnp.bfloat16) for key in keys[1:3])
        k, v = (jax.random.normal(key, (layers, q, g, kv, max(suffixes), depth), jnp.bfloat16) for key in keys[3:])
        angles = jnp.ones((q, depth // 2))
        operands = (parts, k, v, angles, angles, pk, pv, jnp.full((q,), prompt, jnp.int32), jnp.int32(length - 1))
        empty = seconds(jax.jit(lambda x: x[:1]), parts)
        times = {
            name: (seconds(rotating_loop(fused, layers, calls, iterations), *operands) - empty)
            / calls
            / iterations
            * 1e6
            for name, fused in (("triton", True), ("apart", False))
        }
        moved = 4 * depth * kv * q * (prompt + g * length) + parts.nbytes + 2 * q * g * heads * depth
        report(
            op="rope_attention",
            shape=f"{model} prompt 256, suffix {length} of {max(suffixes)}",
            rows=q * g,
            bound=moved / rates[0] * 1e6,
            bytes=moved,
            flops=4 * q * g * heads * depth * (prompt + length),
            chosen=times["triton"],
            **times,
        )


def bench_logprobs(rates, report) -> None:
    """Forward, and forward with the gradient of hidden, for 4096 positions of the 1.5B head."""
    n, width, vocabulary = 4096, 1536, 151936
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, head = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, [(n, width), (vocabulary, width)], strict=True)
    )
    targets = jnp.arange(n) % vocabulary
    for label, products, step in [
        ("forward", 1, lambda h, w, t: pallas_kernels.token_logprobs(h, w, t, chunk=2048)[0]),
        (
            "forward + backward",
            3,
            jax.grad(lambda h, w, t: pallas_kernels.token_logprobs(h, w, t, chunk=2048)[0].sum()),
        ),
    ]:
        flops = products * 2 * n * width * vocabulary
        chosen = seconds(jax.jit(step), hidden, head, targets) * 1e6
        report(
            op="token_logprobs",
            shape=f"1.5B head, {label}",
            rows=n,
            bound=flops / rates[1] * 1e6,
            bytes=head.nbytes,
            flops=flops,
            chosen=chosen,
        )


def bench_draw(blocks, rates, report) -> None:
    """A token of float32 logits, of several arrays in turn: the kernels with their own blocks and with `blocks`, and XLA."""

    def step(uniform, layer, *logits, draw):
        rows, uniform = lax.optimization_barrier((logits[layer], uniform))  # else sums of blocks leave the loop
        token, logprob = draw(rows, uniform)
        return token + logprob

    def of_blocks(rows, uniform, block: int, warps: int):
        from pallas_kernels.draw_token_triton import draw_token

        return draw_token(rows, uniform, 1.0, None, block, warps)

    draws = {
        name: partial(pallas_kernels.draw_token, temperature=1.0, implementation=name)
        for name in ("triton", "reference")
    }
    for block, warps in blocks:
        draws[f"{block}:{warps}"] = partial(of_blocks, block=block, warps=warps)
    for vocabulary, m in [(vocabulary, m) for vocabulary in VOCABULARIES for m in DRAW_ROWS]:
        moved = 4 * m * vocabulary
        layers = int(max(2, min(28, STACK_BYTES // moved)))
        keys = jax.random.split(jax.random.key(m), layers + 1)
        uniform = jax.random.uniform(keys[0], (m,))
        logits = [3 * jax.random.normal(key, (m, vocabulary)) for key in keys[1:]]
        times = {name: microseconds(partial(step, draw=draw), uniform, layers, *logits) for name, draw in draws.items()}
        bound = moved / rates[0] * 1e6
        shape = f"vocabulary {vocabulary}"
        report(op="draw", shape=shape, rows=m, bound=bound, bytes=moved, flops=0, chosen=times["triton"], **times)


def bench_draw_corrected(rates, report) -> None:
    """A token by a proposal, of several arrays of logits in turn, with a head of 1,536 columns; XLA's form beside it."""

    def step(uniform, layer, hidden, head, *logits, draw):
        rows, uniform = lax.optimization_barrier((logits[layer], uniform))  # else sums of blocks leave the loop
        token, logprob = draw(rows, hidden, head, uniform)
        return uniform + (token + logprob)[:, None]

    width, numbers = 1536, pallas_kernels.numbers_a_token()
    draws = {
        name: partial(pallas_kernels.draw_corrected, temperature=1.0, implementation=name)
        for name in ("triton", "reference")
    }
    for vocabulary, m in [(vocabulary, m) for vocabulary in VOCABULARIES for m in DRAW_ROWS]:
        moved = 4 * m * vocabulary + 2 * (numbers + 1) // 2 * m * width
        layers = int(max(2, min(28, STACK_BYTES // moved)))
        keys = jax.random.split(jax.random.key(m), layers + 3)
        uniform = jax.random.uniform(keys[0], (m, numbers))
        hidden = jax.random.normal(keys[1], (m, width), jnp.bfloat16)
        head = jax.random.normal(keys[2], (vocabulary, width), jnp.bfloat16) / width**0.5
        logits = [3 * jax.random.normal(key, (m, vocabulary)) for key in keys[3:]]
        times = {
            name: microseconds(partial(step, draw=draw), uniform, layers, hidden, head, *logits)
            for name, draw in draws.items()
        }
        bound, shape = moved / rates[0] * 1e6, f"vocabulary {vocabulary}, head of {width}"
        report(
            op="draw_corrected", shape=shape, rows=m, bound=bound, bytes=moved, flops=0, chosen=times["triton"], **times
        )


def table(rows: list[dict]) -> str:
    """The measurements as aligned text."""
    lines = [
        f"{'op':17} {'shape':40} {'rows':>5} {'bound':>7} {'us':>8} {'of bound':>8} {'GB/s':>6} {'TFLOP/s':>7}  others"
    ]
    for row in rows:
        compared = [key for key in row if key in ("triton", "apart", "reference", "bf16") or ":" in key]
        others = ", ".join(f"{key} {row[key]:.1f}" for key in compared)
        us = row["chosen"]
        lines.append(
            f"{row['op']:17} {row['shape']:40} {row['rows']:5} {row['bound']:7.1f} {us:8.1f} {row['bound'] / us:8.0%} "
            f"{row['bytes'] / us / 1e3:6.0f} {row['flops'] / us / 1e6:7.0f}  {others}"
        )
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--suffixes", nargs="+", type=int, default=[1, 256, 512], help="of rope_attention")
    parser.add_argument(
        "--draw-blocks", nargs="+", type=draw_block, default=[], help="of --op draw, LOGITS:WARPS, to compare"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**31, help="of the check's inputs; fresh by default"
    )
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--no-compare", action="store_true", help="leave out what XLA and cuBLAS take")
    options = parser.parse_args(arguments)
    if (backend := jax.default_backend()) != "gpu":
        parser.error(
            f"the kernels run on an NVIDIA GPU, the backend is {backend!r}; tests/pallas_kernels interprets them"
        )
    return options


def draw_block(text: str) -> tuple[int, int]:
    """'2048:4' -> (2048, 4), both powers of two."""
    numbers = text.split(":")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number).bit_count() == 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not LOGITS:WARPS, two powers of two, like 2048:4")
    return int(numbers[0]), int(numbers[1])


def main(arguments: list[str]) -> None:
    """Check, measure, print."""
    options, rows = parse(arguments), []

    def report(**row) -> None:
        rows.append(row)
        line = json.dumps({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
        print(line, flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(line + "\n")

    if not options.skip_check:
        rng = np.random.default_rng(options.seed)
        worst = {name: check(rng) for name, check in CHECKS.items()}
        print(
            json.dumps({"check": "largest relative error against float64", "seed": options.seed, **worst}), flush=True
        )
        if not max(worst.values()) < 1e-2:
            sys.exit(f"a kernel is wrong: {worst}")
    rates = measure_rates()
    device = jax.devices()[0].device_kind
    print(
        json.dumps(
            {"device": device, "jax": jax.__version__, "copy_tb_s": rates[0] / 1e12, "bf16_tflop_s": rates[1] / 1e12}
        )
    )
    if "int4_matmul" in options.op:
        bench_int4(options.shapes, options.rows, rates, report, not options.no_compare)
    if "dense_matmul" in options.op:
        bench_dense(options.shapes, options.rows, rates, report)
    if "gated_matmul" in options.op:
        bench_gated(options.shapes, options.rows, rates, report)
    if "between" in options.op:
        bench_between(options.shapes, options.rows, rates, report)
    if "decode_attention" in options.op:
        bench_attention(options.shapes, rates, report, not options.no_compare)
    if "rope_attention" in options.op:
        bench_rope_attention(options.shapes, options.suffixes, rates, report)
    if "token_logprobs" in options.op:
        bench_logprobs(rates, report)
    if "draw" in options.op:
        bench_draw(options.draw_blocks, rates, report)
        bench_draw_corrected(rates, report)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
