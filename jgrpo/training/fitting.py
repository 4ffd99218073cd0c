"""Settings that fit a device: the alternatives in the order of what they cost, and the refusal of a run that does not fit."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jgrpo.config import QuantizationConfig, RolloutConfig, TrainConfig, TrainingConfig
from jgrpo.errors import UserError
from jgrpo.models import ModelConfig
from jgrpo.rollout.weights import at_once
from jgrpo.settings import flag, flatten
from jgrpo.training.memory import MemoryPlan, plan_memory


def show_plan(console: Console, plan: MemoryPlan, title: str) -> None:
    """Print the plan as a table."""
    table = Table()
    table.add_column("")
    table.add_column("GB", justify="right")
    table.add_column("when")
    *parts, total = plan.rows()
    for name, size, remark in parts:
        table.add_row(name, f"{size / 1e9:.3f}", remark)
    table.add_section()
    table.add_row(total[0], f"{total[1] / 1e9:.3f}", total[2], style="bold")
    console.print(title)
    console.print(table)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """ "8GB", "7.5 GiB" or a number of bytes.

    Raises:
        UserError: it is none of these, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    size = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if size <= 0:
        raise UserError(f"device_memory {text!r} is no amount of memory: expected something like 8GB or 7.5GiB")
    return size


EMBEDDINGS = ("lm_head", "embed_tokens")


def alternatives(config: TrainConfig) -> Iterator[TrainConfig]:
    """Settings that need less memory, the ones that cost least first.

    Smaller microbatches come before offload, which costs transfers, and a microbatch below a group, which computes its prompt
    more than once, after it. Then fewer prompts are sampled at a time, which costs time alone; then the rollout's cache is
    in 8 bits, then the optimizer's state, then the embedding and the head are in four, which costs precision. The batch is never made smaller: with one
    prompt sampled at a time and one completion in a microbatch, the peak does not depend on it.
    """
    prompts = config.training.prompts_per_step
    completions = prompts // config.algorithm.num_minibatches * config.rollout.num_generations
    trainings = _less_activation(config.training, config.rollout.num_generations, completions)
    for quantization in _less_base(config.quantization):
        for bits in dict.fromkeys((config.optimizer.optimizer_bits, 8)):
            less_base = dataclasses.replace(
                config,
                quantization=quantization,
                optimizer=dataclasses.replace(config.optimizer, optimizer_bits=bits),
            )
            for rollout in _less_cache(config.rollout, prompts):
                for training in trainings:
                    yield dataclasses.replace(less_base, training=training, rollout=rollout)


def _less_base(quantization: QuantizationConfig) -> list[QuantizationConfig]:
    """As chosen, and with embedding and head in four bits."""
    kept = tuple(name for name in quantization.skip_modules if name not in EMBEDDINGS)
    packed = dataclasses.replace(quantization, skip_modules=kept)
    return [quantization] if quantization.quantization == "none" or packed == quantization else [quantization, packed]


def _less_cache(rollout: RolloutConfig, prompts: int) -> list[RolloutConfig]:
    """Fewer prompts at a time, then the same with codes of 8 bits."""
    parts = [size if size < prompts else rollout.prompts_at_once for size in _divisors(at_once(rollout, prompts))]
    caches = dict.fromkeys((rollout.kv_cache, "int8"))
    return [dataclasses.replace(rollout, kv_cache=cache, prompts_at_once=part) for cache in caches for part in parts]


def _less_activation(training: TrainingConfig, group: int, completions: int) -> list[TrainingConfig]:
    sizes = [size for size in _divisors(training.microbatch_size) if completions % size == 0]
    modes = dict.fromkeys([(training.remat, training.offload), (True, training.offload), (True, True)])
    workspaces = dict.fromkeys([training.logprob_workspace, min(training.logprob_workspace, 64.0)])
    options = [
        dataclasses.replace(training, microbatch_size=size, remat=remat, offload=offload, logprob_workspace=workspace)
        for size in sizes
        for remat, offload in modes
        for workspace in workspaces
    ]
    whole = min(group, training.microbatch_size)
    cost = lambda o: (o.remat, o.microbatch_size < whole, o.offload, -o.microbatch_size, -o.logprob_workspace)  # noqa: E731
    return sorted(options, key=cost)


def _divisors(total: int) -> list[int]:
    """Divisors of `total`, the largest first."""
    return [n for n in range(total, 0, -1) if total % n == 0]


def best_fit(config: TrainConfig, plan: Callable[[TrainConfig], MemoryPlan], limit: int) -> TrainConfig | None:
    """The first of the `alternatives` whose total is within the limit."""
    return next((option for option in alternatives(config) if plan(option).total <= limit), None)


def setting_flags(before: TrainConfig, after: TrainConfig) -> str:
    """What to add to the command line to get from one to the other."""
    old, new = flatten(before), flatten(after)
    changed = [f"{flag(name)} {_argument(value)}".rstrip() for name, value in new.items() if value != old[name]]
    return " ".join(changed) or "as chosen"


def _argument(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value).lower()


def check_memory(config: TrainConfig, shape: ModelConfig, dtype: Any, prompt_width: int, console: Console) -> None:
    """Refuse a run that the accelerator cannot hold, before its weights are loaded.

    Nothing is checked on a CPU: with swap, page cache and containers, "free" is no number to refuse a run by.

    Raises:
        UserError: the plan is above what the allocator can still hand out; the console has its table.
    """
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)

    def plan(option: TrainConfig) -> MemoryPlan:
        return plan_memory(option, shape, dtype, prompt_width, cudnn=jnp.dtype(dtype).itemsize == 2)

    planned = plan(config)
    if planned.total <= free:
        return
    show_plan(console, planned, f"{config.model.model}, {config.batch_in_words}: the chosen settings")
    raise UserError(refusal(config, planned, free, best_fit(config, plan, free)))


class Needs(Protocol):
    """Whatever says what a step needs."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        ...


def refusal(config: TrainConfig, planned: Needs, free: int, best: TrainConfig | None) -> str:
    """One line: what is needed, what is there, what to do."""
    needs = (
        f"{config.model.model} with {config.batch_in_words} needs {planned.total / 1e9:.2f} GB of {free / 1e9:.2f} GB"
    )
    if best is None:
        return f"{needs}: no settings fit; lower max_completion_length or lora_rank, or quantize more (skip_modules)"
    return f"{needs}: what fits is {setting_flags(config, best)}"
