"""Rollout speed of models of real shape with random weights, next to what the memory and the arithmetic allow.

    PYTHONPATH=. python scripts/bench_rollout.py --preset qwen2.5-1.5b llama-3.1-8b --prompts 8 32 64 --weights int4 bf16
    PYTHONPATH=. python scripts/bench_rollout.py --prompts 64 --new-tokens 1024 --lengths lognormal --compaction on off
    PYTHONPATH=. python scripts/bench_rollout.py --layers loop unrolled --profile
    PYTHONPATH=. python scripts/bench_rollout.py --weights int4 bf16 --kv auto int8 fp8 --gap --logit-scale 5
    PYTHONPATH=. python scripts/bench_rollout.py --weights bf16 --prompts 32 --top-k 0 50 --top-p 1 0.95 --min-p 0 0.05
    PYTHONPATH=. python scripts/bench_rollout.py --preset tiny --dtype float32 --new-tokens 32

One JSON line for every combination of what takes several values, then a table in Markdown. A run is
`jgrpo.rollout.generate` from prompts to tokens with their log-probabilities; the time includes the prefill and, for the
bf16 weights, making the merged copy of the int4 base. `lengths fixed`: every completion has
`--new-tokens` tokens. `lognormal`: each row is given its own end, log-normal with median 200 and sigma 0.8, capped at
`--new-tokens`, which is the long tail of real batches; only tokens inside completions are counted.

The bound is, for every step of the decode, bytes moved / `--bandwidth` + operations / `--tflops`, summed: weights and head
once a step, the prompt's keys and values once a group, each unfinished row's own ones once; rows that have ended cost
nothing. The prefill is not in it. `bound` is that of the weights that are used; `int4_bound` that of the int4 base by
itself, without an adapter's bytes and operations, whatever is used. `peak_bytes` is the allocator's peak since the process started; give a single combination
to have a run's own. `first_run_s` is the first call, `trace_s` and `compile_s` the parts of it that are JAX's and XLA's.

`--gap` compares the sampler's log-probabilities of the drawn tokens with those of the training forward on the same tokens: mean
and largest difference in nats. A random model's distributions are nearly uniform, which hides errors of the logits;
`--logit-scale 5` makes them about as peaked as a trained model's.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from profiling import format_table, traced
from shapes import PRESETS, linear_parameters, random_base

from jgrpo.config import LINEAR_MODULES, LoraConfig, RolloutConfig
from jgrpo.lora import init_lora, module_shapes
from jgrpo.models import ModelConfig, Transformer
from jgrpo.rollout import Prompts, Rollout, generate
from jgrpo.rollout.weights import WeightsPlan, cache_bytes, merged_bytes, plan_weights
from jgrpo.training.forward import logprob_chunk, rows_of, token_logprobs

MEASURED = {"H200": (4.3, 790.0)}
"""TB/s of a copy and TFLOP/s of a bfloat16 matmul, as measured on the device of that name."""

COMPILE_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace_s",
    "/jax/core/compile/backend_compile_duration": "compile_s",
}
"""Names under which JAX reports what making a program took."""

COLUMNS = (
    *(
        "preset",
        "sequences",
        "weights",
        "layers",
        "compaction",
        "lengths",
        "kv",
        "top_k",
        "top_p",
        "min_p",
        "tokens_per_s",
    ),
    *("ms_per_step", "bound_tokens_per_s", "fraction", "int4_bound_tokens_per_s", "int4_fraction"),
    *("gap_mean", "gap_max", "peak_gb", "first_run_s"),
)
"""Of the table; a setting that has one value in all rows is left out."""
LOGITS_MB = 256.0
"""Workspace for logits of the training forward that `--gap` runs."""
ADAPTER_DEVIATION = 0.01
"""Of the entries of B: W + scale · B A is about a tenth away from W."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["qwen2.5-1.5b"])
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[8], help="prompts Q of a batch (default %(default)s)"
    )
    parser.add_argument("--group", type=int, default=8, help="completions G of each prompt (default %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=256, help="prompt tokens P (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=512, help="new tokens C at most (default %(default)s)")
    parser.add_argument("--lengths", nargs="+", choices=("fixed", "lognormal"), default=["fixed"])
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=("int4", "int8", "bf16", "auto"),
        default=["int4"],
        help="rollout_weights of the config",
    )
    parser.add_argument("--layers", nargs="+", choices=("auto", "loop", "unrolled"), default=["auto"])
    parser.add_argument("--compaction", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--int4-embeddings", action="store_true", help="embedding and head in int4 too")
    parser.add_argument("--group-size", type=int, default=64, help="int4 group (default %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=32, help="rank R on all linear layers; 0: no adapter")
    parser.add_argument(
        "--kv", nargs="+", choices=("auto", "int8", "fp8"), default=["auto"], help="kv_cache of the config"
    )
    parser.add_argument("--prompts-at-once", type=int, help="of the config: prompts in one cache (default all)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default %(default)s)")
    parser.add_argument("--top-k", nargs="+", type=int, default=[0])
    parser.add_argument("--top-p", nargs="+", type=float, default=[1.0])
    parser.add_argument("--min-p", nargs="+", type=float, default=[0.0])
    parser.add_argument("--gap", action="store_true", help="compare log-probabilities with the training forward's")
    parser.add_argument("--logit-scale", type=float, default=1.0, help="factor on the final norm (default %(default)s)")
    parser.add_argument("--microbatch-size", type=int, default=8, help="rows of --gap's forward (default %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, help="timed runs, of which the median counts (default %(default)s)"
    )
    parser.add_argument(
        "--bandwidth", type=float, help="TB/s of the bound; default: measured, where the device is known"
    )
    parser.add_argument("--tflops", type=float, help="TFLOP/s of the bound; default likewise")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one run, times also per step")
    return parser.parse_args()


def completion_lengths(args: argparse.Namespace, prompts: int, lengths: str) -> np.ndarray:
    """Tokens of each completion, [Q, G]."""
    shape = (prompts, args.group)
    if lengths == "fixed":
        return np.full(shape, args.new_tokens, np.int32)
    drawn = np.random.default_rng(0).lognormal(np.log(200), 0.8, shape)
    return np.clip(np.rint(drawn), 1, args.new_tokens).astype(np.int32)


class Case(NamedTuple):
    """One combination of what is compared."""

    prompts: int
    weights: Literal["int4", "int8", "bf16", "auto"]
    layers: Literal["auto", "loop", "unrolled"]
    compaction: Literal["on", "off"]
    lengths: Literal["fixed", "lognormal"]
    kv: Literal["auto", "int8", "fp8"]
    top_k: int
    top_p: float
    min_p: float


_trainer_logprobs = jax.jit(token_logprobs, static_argnames=("model", "temperature", "remat", "chunk", "group"))


class Workload:
    """One preset on the device."""

    def __init__(self, args: argparse.Namespace, preset: str):
        self.args, self.preset, self.config = args, preset, PRESETS[preset]
        lora_config = LoraConfig(lora_rank=max(args.lora_rank, 1), lora_alpha=2.0 * max(args.lora_rank, 1))
        self.model = Transformer(self.config, lora_config, jnp.dtype(args.dtype))
        self.base = random_base(self.config, group_size=args.group_size, int4_embeddings=args.int4_embeddings)
        self.base["final_norm"] *= args.logit_scale
        self.lora = init_lora(jax.random.key(1), lora_config, self.config) if args.lora_rank else {}
        for number, part in enumerate(self.lora.values()):
            part["b"] = ADAPTER_DEVIATION * jax.random.normal(jax.random.key(number), part["b"].shape)
        jax.block_until_ready((self.base, self.lora))

    def sampling(self, case: Case) -> RolloutConfig:
        args = self.args
        return RolloutConfig(
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            temperature=args.temperature,
            top_k=case.top_k,
            top_p=case.top_p,
            min_p=case.min_p,
            rollout_weights=case.weights,
            decode_layers=case.layers,
            compaction=case.compaction == "on",
            kv_cache=case.kv,
            prompts_at_once=args.prompts_at_once,
        )

    def measure(self, case: Case) -> dict:
        """Time the rollout of `case.prompts` questions."""
        args, lengths = self.args, completion_lengths(self.args, case.prompts, case.lengths)
        tokens = jax.random.randint(jax.random.key(3), (case.prompts, args.prompt_len), 0, self.config.vocab_size)
        questions = Prompts(tokens, jnp.full(case.prompts, args.prompt_len, jnp.int32))
        sampling, limits = self.sampling(case), jnp.asarray(lengths)

        def run(seed: int) -> tuple[float, Rollout]:
            inputs = (self.model, self.base, self.lora, questions, jax.random.key(seed), sampling)
            began = time.perf_counter()
            rollout = jax.block_until_ready(generate(*inputs, eos_ids=(), pad_id=0, row_limits=limits))
            seconds = time.perf_counter() - began
            np.testing.assert_array_equal(rollout.completion_lengths, lengths)
            return seconds, rollout

        with compile_times() as about:
            first, rollout = run(0)
        gap = self.gap(rollout) if args.gap else {}
        del rollout
        seconds = statistics.median(run(seed)[0] for seed in range(1, args.runs + 1))
        if args.profile:
            with traced() as kernels:
                run(args.runs + 1)
            print(format_table(kernels(), steps=int(lengths.max())), flush=True)
        row = {
            **case._asdict(),
            **self.report(case, lengths, seconds),
            "first_run_s": round(first, 3),
            **about,
            **gap,
            **memory(),
        }
        return {"preset": self.preset, **row}

    def gap(self, rollout: Rollout) -> dict:
        """|log-probability of the sampler - of the training forward| over the drawn tokens, in nats."""
        rows, size = rows_of(rollout), self.args.microbatch_size
        length = rollout.completion_tokens.shape[-1]
        sampled = np.asarray(rollout.policy_logprobs).reshape(-1, length)
        mask = np.asarray(rollout.policy_mask).reshape(-1, length)
        group = math.gcd(size, self.args.group)
        how = dict(
            temperature=self.args.temperature, remat=False, chunk=logprob_chunk(self.model, LOGITS_MB), group=group
        )
        gaps = []
        for start in range(0, len(sampled), size):
            part = jax.tree.map(lambda x, start=start: x[start : start + size], rows)
            trained, _ = _trainer_logprobs(self.model, self.base, self.lora, part, **how)
            here = slice(start, start + size)
            gaps.append(np.abs(np.asarray(trained) - sampled[here])[mask[here]])
        everything = np.concatenate(gaps)
        return {"gap_mean": float(f"{everything.mean():.2g}"), "gap_max": float(f"{everything.max():.2g}")}

    def report(self, case: Case, lengths: np.ndarray, seconds: float) -> dict:
        tokens, steps = int(lengths.sum()), int(lengths.max())
        prompts = (case.prompts, self.args.prompt_len)
        plan = plan_weights(self.model, self.base, self.sampling(case), prompts)
        bound = self.bound(case, lengths, plan, 0 if plan.copy else self.args.lora_rank)
        int4_bound = self.bound(case, lengths, WeightsPlan(None, ""), 0)
        return {
            "sequences": lengths.size,
            "tokens": tokens,
            "longest": steps,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds),
            "ms_per_step": round(1e3 * seconds / steps, 3),
            "bound_tokens_per_s": bound and round(tokens / bound),
            "bound_ms_per_step": bound and round(1e3 * bound / steps, 3),
            "fraction": bound and round(bound / seconds, 3),
            "int4_bound_tokens_per_s": int4_bound and round(tokens / int4_bound),
            "int4_fraction": int4_bound and round(int4_bound / seconds, 3),
        }

    def bound(self, case: Case, lengths: np.ndarray, plan: WeightsPlan, rank: int) -> float | None:
        """Seconds that bytes and operations of the decode take at least; None on a device that was not measured.

        With the merged copy of the plan or the base as it is stored, and an adapter of that rank beside it.
        """
        bandwidth, tflops = device_speed(self.args)
        if bandwidth is None or tflops is None:
            return None
        config, args = self.config, self.args
        adapter = adapter_parameters(config, rank)
        kv_token = cache_bytes(self.model, dataclasses.replace(self.sampling(case), num_generations=0), (1, 1))
        weights = step_weight_bytes(self.model, self.base, plan)
        weights += adapter * jnp.dtype(args.dtype).itemsize
        parameters = linear_parameters(config) + config.vocab_size * config.hidden_size + adapter
        step = np.arange(lengths.max())
        rows = (lengths[..., None] > step).sum(axis=(0, 1))
        groups = (lengths.max(axis=1)[:, None] > step).sum(axis=0)
        moved = weights + kv_token * (groups * args.prompt_len + rows * step)
        context = args.prompt_len + step
        operations = rows * (2 * parameters + 4 * config.num_layers * config.num_heads * config.head_dim * context)
        return float((moved / (bandwidth * 1e12) + operations / (tflops * 1e12)).sum())


def device_speed(args: argparse.Namespace) -> tuple[float | None, float | None]:
    kind = jax.devices()[0].device_kind
    known = next((speed for name, speed in MEASURED.items() if name in kind), (None, None))
    return args.bandwidth or known[0], args.tflops or known[1]


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    shapes = module_shapes(config)
    return config.num_layers * rank * sum(sum(shapes[name]) for name in LINEAR_MODULES)


def step_weight_bytes(model: Transformer, base: dict, plan: WeightsPlan) -> int:
    """Bytes of the weights that a step reads whole: all but an embedding that is not the head as well; of what a copy has, the copy's."""
    left_out = {"embed"} if "head" in base or plan.head else set()
    left_out |= ({"layers"} if plan.copy else set()) | ({"head"} if plan.head else set())
    leaves = {name: part for name, part in base.items() if name not in left_out}
    copied = merged_bytes(model, plan.copy, plan.head) if plan.copy else 0
    return sum(leaf.nbytes for leaf in jax.tree.leaves(leaves)) + copied


@contextlib.contextmanager
def compile_times() -> Iterator[dict[str, float]]:
    """Seconds of tracing and compiling inside the block; filled in when it ends."""
    seconds: dict[str, float] = collections.defaultdict(float)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if name := COMPILE_EVENTS.get(event):
            seconds[name] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    result: dict[str, float] = {}
    try:
        yield result
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        result.update({name: round(spent, 2) for name, spent in seconds.items()})


def memory() -> dict:
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"peak_bytes": peak, "peak_gb": peak and round(peak / 1e9, 2)}


def table(rows: list[dict]) -> str:
    """The rows in Markdown; settings that do not differ between them are left out, `preset` and `weights` never."""
    settings = set(Case._fields) - {"weights"}
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    columns = [name for name in columns if name not in settings or len({row[name] for row in rows}) > 1]
    cells = [columns, *[["-" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main() -> None:
    args = arguments()
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **vars(args)}
    print(json.dumps(about), flush=True)
    rows = []
    for preset in args.preset:
        workload = Workload(args, preset)
        for case in map(Case._make, itertools.product(*(vars(args)[name] for name in Case._fields))):
            rows.append(workload.measure(case))
            print(json.dumps(rows[-1]), flush=True)
        del workload
    print(table(rows))


if __name__ == "__main__":
    main()
