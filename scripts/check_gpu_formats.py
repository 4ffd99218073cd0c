"""Every form of the weights, as the dispatch runs it here, against float32 on the same values: prefill, decode, training forward.

    PYTHONPATH=. python scripts/check_gpu_formats.py            # bfloat16; on a GPU of capability 8.0 and up: Triton kernels
    PYTHONPATH=. python scripts/check_gpu_formats.py --dtype float32 --head-dims 64

One JSON line for each form and head width: what the dispatch chose for the decode step's products; for each pass the RMS error of
the logits in standard deviations of the logits, the largest error, and the share of rows whose most likely token is the
same. The form "dense" (bfloat16 matrices) shows what rounding the activations costs by itself: a form may err
twice as much, and 2 % of a standard deviation more. The exit code is 1 where one errs more.

Shapes are small and the kernels' own: head widths 64 and 128, inputs that are multiples of 128, groups of 64, an adapter of rank 16
whose B is not zero. Decoding unrolls the layers, as rollouts do on a GPU. `int4-asymmetric` has a zero-point for each group
(GPTQ, AWQ): the kernel gets them beside the adapter, or, with `--mlp 16384` and 256 groups, apart from it. `mixed` has an
int4, an int8 and a dense layer in one stack.
"""

import argparse
import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.config import LoraConfig
from jgrpo.lora import init_lora
from jgrpo.models import KVCache, ModelConfig, Transformer, base_shapes
from jgrpo.quantization import (
    NF4,
    Int4Weight,
    MixedWeight,
    NF4Weight,
    PackedWeight,
    dequantize,
    pack_nibbles,
    quantize,
    quantize_int8,
)
from jgrpo.rollout.weights import decoding_variables
from pallas_kernels import dispatch

GROUP, PROMPT, QUESTIONS, GENERATIONS, STEPS = 64, 40, 2, 8, 6
MATRICES = ("qkv", "out", "gate_up", "down")
LORA = LoraConfig(lora_rank=16, lora_alpha=32.0)


def model_config(head_dim: int, mlp: int) -> ModelConfig:
    return ModelConfig("llama", 512, 256, mlp, 3, 4, 2, head_dim)


def random_leaf(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.normal(size=shape).astype(np.float32)
    return 1 + 0.1 * noise if name.endswith("norm") else noise / shape[-1] ** 0.5


def to_nf4(weight: np.ndarray) -> NF4Weight:
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP)
    scales = np.abs(groups).max(-1)
    codes = np.abs((groups / scales[..., None])[..., None] - NF4).argmin(-1).astype(np.uint8)
    return NF4Weight(pack_nibbles(codes.reshape(weight.shape), GROUP), scales)


def to_asymmetric(weight: np.ndarray) -> Int4Weight:
    """Levels from the least to the greatest element of a group, as GPTQ and AWQ choose them, of groups that are off centre."""
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP)
    shifts = np.random.default_rng(2).normal(size=groups.shape[:-1]) * 0.7 * weight.std()
    groups = groups + shifts[..., None].astype(np.float32)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zeros = np.round(-low / scales).astype(np.uint8)
    levels = np.clip(np.round(groups / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    return Int4Weight(pack_nibbles(levels.reshape(weight.shape), GROUP), scales, zeros)


def to_mixed(weight: np.ndarray) -> MixedWeight:
    parts = (quantize(weight[:1], GROUP), quantize_int8(weight[1:2], GROUP), weight[2:])
    return MixedWeight(parts, ((0, 0), (1, 0), (2, 0)))


FORMS = {
    "dense": lambda weight: weight,
    "int4": lambda weight: quantize(weight, GROUP),
    "int4-asymmetric": to_asymmetric,
    "nf4": to_nf4,
    "int8": lambda weight: quantize_int8(weight, GROUP),
    "mixed": to_mixed,
}


def make_base(config: ModelConfig, form: str) -> Any:
    rng = np.random.default_rng(0)
    base = jax.tree_util.tree_map_with_path(
        lambda path, leaf: random_leaf(rng, path[-1].key, leaf.shape), base_shapes(config)
    )
    return base | {"layers": {k: FORMS[form](v) if k in MATRICES else v for k, v in base["layers"].items()}}


def in_dtype(base: Any, dtype: Any) -> Any:
    """On the device, dense leaves rounded to `dtype`; packed ones as they are."""
    stored = lambda leaf: isinstance(leaf, PackedWeight)  # noqa: E731
    return jax.tree.map(
        lambda leaf: jax.tree.map(jnp.asarray, leaf) if stored(leaf) else jnp.asarray(leaf, dtype), base, is_leaf=stored
    )


def wide(base: Any) -> Any:
    """The same values, every leaf one dense float32 array."""

    def dense(leaf: Any) -> Any:
        if isinstance(leaf, MixedWeight):
            return jnp.concatenate([dense(part) for part in leaf.parts])
        return dequantize(leaf, jnp.float32) if isinstance(leaf, PackedWeight) else leaf.astype(jnp.float32)

    return jax.tree.map(dense, base, is_leaf=lambda leaf: isinstance(leaf, (*PackedWeight, MixedWeight)))


@functools.cache
def program(model: Transformer, method: str, **static: Any) -> Any:
    """One compiled pass; the float32 one of all forms is the same."""
    return jax.jit(functools.partial(model.apply, method=method, **static))


def run(model: Transformer, base: Any, lora: Any, unroll: bool) -> dict[str, np.ndarray]:
    """float32 logits of the last prompt token, of every decode step, and of the training forward."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, model.config.vocab_size, (QUESTIONS, PROMPT)).astype(np.int32)
    lengths = np.asarray([PROMPT, PROMPT - 17], np.int32)
    steps = rng.integers(0, model.config.vocab_size, (STEPS, QUESTIONS, GENERATIONS)).astype(np.int32)
    variables = {"params": base, "lora": lora}
    logits = lambda hidden: np.asarray(program(model, "logits")({"params": base}, hidden))  # noqa: E731
    hidden, kv = program(model, "prefill")(variables, prompts, lengths)
    results = {"prefill": logits(hidden)}
    cache = KVCache.create(kv, jnp.asarray(lengths), GENERATIONS, STEPS)
    decoding, outputs = decoding_variables(model, base, lora, None, unroll, cache.positions), []
    for tokens in steps:
        hidden, cache = program(model, "decode", unroll=unroll)(decoding, tokens, cache)
        outputs.append(logits(hidden))
    results["decode"] = np.concatenate(outputs)
    forward = program(model, "__call__")(variables, prompts, lengths)
    results["forward"] = logits(forward)[np.arange(PROMPT) < lengths[:, None]]
    return results


def compare(got: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    error = got.astype(np.float64) - expected
    same = got.argmax(-1) == expected.argmax(-1)
    relative = float(np.sqrt((error**2).mean()) / expected.std())
    return {
        "rms": round(relative, 6),
        "max": round(float(np.abs(error).max()), 6),
        "argmax": round(float(same.mean()), 4),
    }


def chosen(form: str, dtype: Any, config: ModelConfig) -> str:
    """Implementation of the decode step's products."""
    if form == "dense":
        return "xla"
    codes = ("int4", "int8") if form == "mixed" else (form.split("-")[0],)
    rows, device = QUESTIONS * GENERATIONS, dispatch.current_device()
    rules = [dispatch.int4_matmul_rule(device, dtype, rows, config.hidden_size, GROUP, code) for code in codes]
    return " + ".join(f"{code}: {rule}" for code, rule in zip(codes, rules, strict=True))


def check(form: str, head_dim: int, mlp: int, dtype: Any) -> dict[str, Any]:
    config, start = model_config(head_dim, mlp), time.perf_counter()
    lora = init_lora(jax.random.key(0), LORA, config)
    lora = {k: {"a": v["a"], "b": 0.05 * jax.random.normal(jax.random.key(1), v["b"].shape)} for k, v in lora.items()}
    base = in_dtype(make_base(config, form), dtype)
    got = run(Transformer(config, LORA, dtype), base, lora, unroll=True)
    with jax.default_matmul_precision("highest"):
        expected = run(Transformer(config, LORA, jnp.float32), wide(base), lora, unroll=False)
    passes = {name: compare(got[name], expected[name]) for name in got}
    described = {
        "form": form,
        "head_dim": head_dim,
        "mlp": mlp,
        "dtype": jnp.dtype(dtype).name,
        "products": chosen(form, dtype, config),
    }
    return described | passes | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 128))
    parser.add_argument("--mlp", type=int, default=512, help="inputs of the widest product (default %(default)s)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=tuple(FORMS))
    args = parser.parse_args()
    device = dispatch.current_device()
    print(json.dumps({"device": device.name, "capability": device.capability, "triton": device.has_triton}), flush=True)
    failed = False
    for head_dim in args.head_dims:
        measure = functools.partial(check, head_dim=head_dim, mlp=args.mlp, dtype=jnp.dtype(args.dtype))
        dense = measure("dense")
        for form in args.forms:
            result = dense if form == "dense" else measure(form)
            bounds = {name: 2 * dense[name]["rms"] + 0.02 for name in ("prefill", "decode", "forward")}
            # Written so that NaN fails.
            result["ok"] = all(result[name]["rms"] <= bound for name, bound in bounds.items())
            failed |= not result["ok"]
            print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
