"""Time, throughput and peak memory of a GRPO step of a model of real shape with random weights.

    PYTHONPATH=. python scripts/bench_step.py --preset qwen2.5-1.5b
    PYTHONPATH=. XLA_PYTHON_CLIENT_MEM_FRACTION=0.049 python scripts/bench_step.py --preset llama-3.1-8b --int4-embeddings \
        --prompts-at-once 2 --microbatch-size 2 --phases step --peak-breakdown   # an 8 GB card's 7.4 GB of an H200
    PYTHONPATH=. python scripts/bench_step.py --preset llama-3.1-8b --microbatch-size 4 --offload --steps 5
    PYTHONPATH=. python scripts/bench_step.py --lengths lognormal --length-buckets 1 2 4 8 --phases update
    PYTHONPATH=. python scripts/bench_step.py --lengths lognormal --track-memory --steps 50
    PYTHONPATH=. python scripts/bench_step.py --preset qwen2.5-1.5b --full-finetuning --optimizer-bits 8 --memory-analysis

EOS is ignored; rewards are random and take no time. `--lengths fixed`: every completion has `--max-completion-length`
tokens. `lognormal`: each row is given its own end, log-normal with median 200 and sigma 0.8, capped at that length, and other
ends in every rollout. One JSON line a phase: `rollout` alone, `update` alone, and `step` (both, as in the loop). Times are
medians after one step that compiles; tokens a second are useful ones, inside prompts and completions, over the time of
all timed runs; those of `update` count every row's prompt, so that sharing shows as speed. `computed_fraction` is the share of
the padded positions that an update computes (`--length-buckets`), `useful_fraction` the share that hold a token.
`peak_bytes` is the allocator's peak since the process started, with preallocation off. Model FLOP utilisation counts a
forward and the gradient of the activations (the base has none of its own) of the matrices, the head and causal attention
for useful tokens, at `--peak-tflops`, and no recomputation; a prompt that its group shares counts once.
`--track-memory`: one line for each step instead, with what is in use, the process's resident size, the live arrays and the
programs compiled so far, and a last line that says what grew after step 2.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from profiling import format_table, traced
from shapes import PRESETS, linear_parameters, random_base

from jgrpo.config import LoraConfig, TrainConfig
from jgrpo.lora import WEIGHTS, init_lora
from jgrpo.models import ModelConfig, Transformer
from jgrpo.rollout import Prompts, generate
from jgrpo.rollout.ahead import compile_all, lower_rollout
from jgrpo.training import Batch, TrainState, grpo_step, make_optimizer
from jgrpo.training.forward import Rows
from jgrpo.training.guards import CompileCounter
from jgrpo.training.memory import plan_memory
from jgrpo.training.step import length_buckets

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L4": 121.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Dense bfloat16, from the vendor's data sheets."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="qwen2.5-1.5b")
    parser.add_argument("--prompts", type=int, default=8, help="prompts Q (default %(default)s)")
    parser.add_argument("--num-generations", type=int, default=8, help="completions G (default %(default)s)")
    parser.add_argument("--prompt-length", type=int, default=256, help="prompt tokens P (default %(default)s)")
    parser.add_argument("--max-completion-length", type=int, default=512, help="new tokens C (default %(default)s)")
    parser.add_argument("--microbatch-size", type=int, default=8, help="rows a microbatch (default %(default)s)")
    parser.add_argument("--logprob-workspace", type=float, default=256.0, help="MB of logits (default %(default)s)")
    parser.add_argument("--no-share-prompt", action="store_true", help="compute the prompt once for each completion")
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed", help="of the completions")
    parser.add_argument("--length-buckets", type=int, nargs="+", help="of the update; several: one after the other")
    parser.add_argument("--prompts-at-once", type=int, help="prompts that are sampled at the same time (default all)")
    parser.add_argument("--kv-cache", choices=("auto", "int8", "fp8"), default="auto", help="of the rollout")
    parser.add_argument(
        "--rollout-weights", choices=("int4", "int8", "bf16", "auto"), default="int4", help="what decodes"
    )
    parser.add_argument("--offload", action="store_true", help="keep the layers' inputs in pinned host memory")
    parser.add_argument("--no-remat", action="store_true", help="keep the layers' activations")
    parser.add_argument("--beta", type=float, default=0.0, help="KL weight; above 0: with a reference forward")
    parser.add_argument("--lora-rank", type=int, default=32, help="rank R (default %(default)s)")
    parser.add_argument("--full-finetuning", action="store_true", help="train all weights instead of an adapter")
    parser.add_argument("--optimizer-bits", type=int, choices=(32, 8), default=32, help="of AdamW's moments")
    parser.add_argument("--group-size", type=int, default=64, help="int4 group (default %(default)s)")
    parser.add_argument("--quantization", choices=("int4", "none"), default="int4", help="of the linear layers")
    parser.add_argument("--int4-embeddings", action="store_true", help="embedding and head in int4 too")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default %(default)s)")
    parser.add_argument("--phases", default="rollout,update,step", help="which to time (default %(default)s)")
    parser.add_argument("--track-memory", action="store_true", help="memory and compilations after each of the steps")
    parser.add_argument("--profile", action="store_true", help="kernel table of one more run of each phase")
    parser.add_argument("--memory-analysis", action="store_true", help="also what XLA and jgrpo.plan say")
    parser.add_argument("--peak-breakdown", action="store_true", help="what is alive at the peak, by plan and compiler")
    parser.add_argument("--peak-tflops", type=float, help="for the utilisation; default: by the device's name")
    args = parser.parse_args()
    if args.full_finetuning:
        args.quantization = "none"
    return args


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The settings that the step reads."""
    default = TrainConfig()
    kept = () if args.int4_embeddings else default.quantization.skip_modules
    return dataclasses.replace(
        default,
        lora=LoraConfig(
            lora=None if args.full_finetuning else "adapter", lora_rank=args.lora_rank, lora_alpha=2.0 * args.lora_rank
        ),
        rollout=dataclasses.replace(
            default.rollout,
            num_generations=args.num_generations,
            max_completion_length=args.max_completion_length,
            kv_cache=args.kv_cache,
            prompts_at_once=args.prompts_at_once,
            rollout_weights=args.rollout_weights,
        ),
        quantization=dataclasses.replace(
            default.quantization, quantization=args.quantization, group_size=args.group_size, skip_modules=kept
        ),
        algorithm=dataclasses.replace(default.algorithm, beta=args.beta),
        optimizer=dataclasses.replace(default.optimizer, optimizer_bits=args.optimizer_bits),
        training=dataclasses.replace(
            default.training,
            prompts_per_step=args.prompts,
            microbatch_size=args.microbatch_size,
            share_prompt=not args.no_share_prompt,
            remat=not args.no_remat,
            offload=args.offload,
            logprob_workspace=args.logprob_workspace,
            length_buckets=args.length_buckets and args.length_buckets[0],
        ),
    )


class Bench:
    """The workload on the device, and its phases."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.config = args, train_config(args)
        self.model_config: ModelConfig = PRESETS[args.preset]
        self.model = Transformer(self.model_config, self.config.lora, jnp.dtype(args.dtype))
        self.base = random_base(
            self.model_config,
            group_size=args.group_size,
            int4=args.quantization == "int4",
            int4_embeddings=args.int4_embeddings,
        )
        self.optimizer = make_optimizer(self.config.optimizer, updates=1000)
        self.base, trained = self._trained(self.base)
        self.state = TrainState.create(trained, self.optimizer, jax.random.key(2))
        shape = (args.prompts, args.prompt_length)
        tokens = jax.random.randint(jax.random.key(3), shape, 0, self.model_config.vocab_size)
        self.prompts = Prompts(tokens=tokens, lengths=jnp.full(args.prompts, args.prompt_length, jnp.int32))
        self.rewards = jax.random.uniform(jax.random.key(4), (args.prompts, args.num_generations))
        self.number = 0
        self.batch: Batch | None = None
        self.lengths = self.completion_lengths()

    def completion_lengths(self) -> np.ndarray:
        """Tokens of each completion of this number of rollout, [Q, G]."""
        shape, limit = (self.args.prompts, self.args.num_generations), self.args.max_completion_length
        if self.args.lengths == "fixed":
            return np.full(shape, limit, np.int32)
        drawn = np.random.default_rng(self.number).lognormal(np.log(200), 0.8, shape)
        return np.clip(np.rint(drawn), 1, limit).astype(np.int32)

    def _trained(self, base: Any) -> tuple[Any, Any]:
        """The frozen base and what is trained: an adapter, or the weights in float32, the base kept if beta needs it."""
        if not self.args.full_finetuning:
            return base, init_lora(jax.random.key(1), self.config.lora, self.model_config)
        weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)
        return (base if self.args.beta > 0 else {}), {WEIGHTS: weights}

    def rollout(self) -> None:
        self.number += 1
        self.lengths = self.completion_lengths()
        key = jax.random.fold_in(self.state.key, self.number)
        inputs = (self.model, self.base, self.state.lora, self.prompts, key, self.config.rollout)
        limits = None if self.args.lengths == "fixed" else jnp.asarray(self.lengths)
        how = dict(eos_ids=(), pad_id=0, row_limits=limits)
        drawn = generate(*inputs, **how)
        if self.number == 1:
            compile_all(lower_rollout(*inputs, **how)[1]())
        advantages = self.rewards - self.rewards.mean(axis=1, keepdims=True)
        self.batch = jax.block_until_ready(Batch(rollout=drawn, rewards=self.rewards, advantages=advantages))

    def update(self) -> None:
        assert self.batch is not None
        self.state, metrics = grpo_step(
            self.state, self.base, self.batch, model=self.model, optimizer=self.optimizer, config=self.config
        )
        self.metrics = jax.device_get(metrics)

    def planned_memory(self) -> dict:
        """XLA's own figures for the update (compiles it once more)."""
        if self.batch is None:
            self.rollout()
        how = dict(model=self.model, optimizer=self.optimizer, config=self.config)
        analysis = grpo_step.lower(self.state, self.base, self.batch, **how).compile().memory_analysis()
        names = ("argument", "output", "alias", "temp", "generated_code", "host_temp")
        return {f"{name}_bytes": getattr(analysis, f"{name}_size_in_bytes") for name in names}

    def predicted_memory(self) -> dict:
        """What `jgrpo.plan` says, from shapes."""
        half = self.args.dtype == "bfloat16" and jax.default_backend() == "gpu"
        plan = plan_memory(self.config, self.model_config, self.args.dtype, self.args.prompt_length, cudnn=half)
        parts = dataclasses.asdict(plan)
        return {**parts, "resident": plan.resident, "rollout": plan.rollout, "update": plan.update, "total": plan.total}

    def peak_breakdown(self) -> dict:
        """What the plan says is alive at the peak, largest first, beside the update's compiled figures and the measured peak."""
        half = self.args.dtype == "bfloat16" and jax.default_backend() == "gpu"
        plan = plan_memory(self.config, self.model_config, self.args.dtype, self.args.prompt_length, cudnn=half)
        compiled = self.planned_memory()
        return {
            "half": "update" if plan.update >= plan.rollout else "rollout",
            "alive_bytes": dict(sorted(plan.alive().items(), key=lambda item: -item[1])),
            "planned_bytes": plan.total,
            "planned_update_bytes": plan.resident + plan.update,
            "compiled_update_bytes": compiled["argument_bytes"] + compiled["temp_bytes"],
            **memory(),
        }

    def set_buckets(self, buckets: int | None) -> None:
        """Sizes that the update packs into."""
        training = dataclasses.replace(self.config.training, length_buckets=buckets)
        self.config = dataclasses.replace(self.config, training=training)

    def step(self) -> None:
        self.rollout()
        self.update()

    @property
    def completion_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def row_tokens(self) -> int:
        return int((self.args.prompt_length + self.lengths).sum())

    @property
    def prompt_positions(self) -> int:
        """Positions of the prompts: one that is shared counts once."""
        shared = 1 if self.args.no_share_prompt else math.gcd(self.args.microbatch_size, self.args.num_generations)
        return self.lengths.size // shared * self.args.prompt_length

    def positions(self) -> dict:
        """Share of the padded positions that an update computes, and that hold tokens."""
        size, length = self.args.microbatch_size, self.args.max_completion_length
        part = jax.ShapeDtypeStruct((size, length), jnp.int32)
        rows = Rows(part, part, part, part, buckets=length_buckets(self.config))
        needed = self.lengths.reshape(-1, size).sum(axis=1)
        computed = int(np.asarray(rows.capacities)[np.searchsorted(rows.capacities, needed)].sum())
        padded = self.lengths.size * length + self.prompt_positions
        useful = self.completion_tokens + self.prompt_positions
        return {
            "computed_fraction": round((computed + self.prompt_positions) / padded, 4),
            "useful_fraction": round(useful / padded, 4),
        }

    def update_flops(self) -> float:
        """Forward and activation gradient: 2 · 2 operations a parameter and position, likewise head and attention.

        Where the weights are trained, their gradient is 2 more.
        """
        config = self.model_config
        linear = linear_parameters(config) * (self.completion_tokens + self.prompt_positions)
        head = config.vocab_size * config.hidden_size * self.completion_tokens
        # Scores and mix of values: 2 products of T · T / 2 · H · Hd, whose gradient costs twice the forward.
        squares = float(((self.args.prompt_length + self.lengths.astype(float)) ** 2).sum())
        attention = config.num_layers * config.num_heads * config.head_dim * squares
        passes = 3 if self.args.full_finetuning else 2
        forward_again = 2 * (linear + head + attention) if self.args.beta > 0 else 0.0
        return 2 * (passes * (linear + head) + 3 * attention) + forward_again


def measure(bench: Bench, phase: str) -> dict:
    run = getattr(bench, phase)
    if phase == "update" and bench.batch is None:
        bench.rollout()
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    seconds, tokens = [], 0
    for _ in range(bench.args.steps):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
        tokens += bench.row_tokens if phase == "update" else bench.completion_tokens
    return {
        "phase": phase,
        "seconds": round(statistics.median(seconds), 5),
        "fastest": round(min(seconds), 5),
        "first_call_seconds": round(first, 2),
        "tokens_per_s": round(tokens / sum(seconds), 1),
        **utilisation(bench, phase, statistics.median(seconds)),
        **(bench.positions() if phase == "update" else {}),
        **memory(),
    }


def track(bench: Bench) -> Iterator[dict]:
    """One record a step, then what grew between the second and the last."""
    compilations, records = CompileCounter(), []
    for number in range(1, bench.args.steps + 1):
        began = time.perf_counter()
        bench.step()
        record = {
            "phase": "step",
            "number": number,
            "seconds": round(time.perf_counter() - began, 4),
            "tokens": bench.completion_tokens,
            "compiled": compilations.count,
            "live_arrays": len(jax.live_arrays()),
            "resident_bytes": resident_bytes(),
            **bench.positions(),
            **memory(),
        }
        records.append(record)
        yield record
    compilations.close()
    before, after = records[min(1, len(records) - 1)], records[-1]
    watched = ("compiled", "live_arrays", "resident_bytes", "peak_bytes", "in_use_bytes")
    grown = {name: None if after[name] is None else after[name] - before[name] for name in watched}
    yield {"phase": "growth after step 2", "steps": len(records), **grown}


def resident_bytes() -> int:
    """Memory of this process on the host."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def utilisation(bench: Bench, phase: str, seconds: float) -> dict:
    if phase != "update":
        return {}
    tflops = bench.update_flops() / seconds / 1e12
    kind = jax.devices()[0].device_kind
    peak = bench.args.peak_tflops or next((value for name, value in PEAK_TFLOPS.items() if name in kind), None)
    return {"tflops": round(tflops, 2), "mfu": None if peak is None else round(tflops / peak, 4)}


def memory() -> dict:
    stats = jax.devices()[0].memory_stats() or {}
    names = {"peak_bytes": "peak_bytes_in_use", "in_use_bytes": "bytes_in_use", "limit_bytes": "bytes_limit"}
    return {name: stats.get(key) for name, key in names.items()}


def main() -> None:
    args = arguments()
    bench = Bench(args)
    jax.block_until_ready(bench.base)
    base_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(bench.base))
    setting = {
        name: value
        for name, value in vars(args).items()
        if name not in ("phases", "peak_tflops", "memory_analysis", "profile", "track_memory", "peak_breakdown")
    }
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "base_bytes": base_bytes, **setting}
    print(json.dumps({"phase": "setup", **about, **memory()}), flush=True)
    if args.track_memory:
        for record in track(bench):
            print(json.dumps({**record, "preset": args.preset}), flush=True)
        return
    for phase, buckets in itertools.product(args.phases.split(","), args.length_buckets or [None]):
        bench.set_buckets(buckets)
        about = {"preset": args.preset, "length_buckets": length_buckets(bench.config)}
        print(json.dumps({**measure(bench, phase), **about}), flush=True)
        if args.profile:
            with traced() as table:
                getattr(bench, phase)()
            print(format_table(table()), flush=True)
    if args.memory_analysis:
        print(json.dumps({"phase": "prediction", **bench.predicted_memory(), "preset": args.preset}), flush=True)
        print(json.dumps({"phase": "plan", **bench.planned_memory(), "preset": args.preset}), flush=True)
    if args.peak_breakdown:
        print(json.dumps({"phase": "peak", **bench.peak_breakdown(), "preset": args.preset}), flush=True)
    gap = float(bench.metrics["sampling/sampling_logp_difference/mean"]) if hasattr(bench, "metrics") else None
    print(json.dumps({"phase": "check", "sampler_trainer_gap": gap, "preset": args.preset}), flush=True)


if __name__ == "__main__":
    main()
