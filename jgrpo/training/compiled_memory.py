"""What the compiled programs of a run say that they need, before the first step: the plan's check, by XLA's own figures.

The rollout's first program (the largest: what long tails shrink to has fewer rows) and the update are lowered with the arguments that
the loop will call them with, the update's batch from shapes, and compiled at the same time; `jit` finds them when the
steps come. Peak of a step = what is on the device (base, adapter, optimizer) + runtime + the larger of

    rollout = temporaries + result + code + merged copy
    update = temporaries + result that is in no argument's place + code + batch

Not counted: the reward functions' own use of the device, evaluations (their batches are planned to need no more than a rollout), and,
with an environment, the rollout, whose rounds have several shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jgrpo.config import TrainConfig
from jgrpo.errors import UserError
from jgrpo.rollout import Rollout
from jgrpo.rollout.ahead import bound, compile_all
from jgrpo.rollout.weights import merged_bytes, plan_weights
from jgrpo.training.fitting import best_fit, refusal
from jgrpo.training.memory import MemoryPlan, plan_memory
from jgrpo.training.policy import Policy
from jgrpo.training.state import Batch


@dataclass(frozen=True)
class CompiledMemory:
    """Bytes, as `MemoryPlan` has them: `resident` through the whole step, the halves' own beside it."""

    resident: int
    rollout: int
    update: int

    @property
    def total(self) -> int:
        """Peak of a step."""
        return self.resident + max(self.rollout, self.update)


def batch_shapes(config: TrainConfig, prompt_width: int, has_environment: bool = False) -> Batch:
    """What a step trains on, as shapes of arrays that are bound to the device."""
    shape: Any = jax.ShapeDtypeStruct
    rollout = config.rollout
    questions, group, length = config.training.prompts_per_step, rollout.num_generations, rollout.max_completion_length
    per_token, per_row = (questions, group, length), (questions, group)
    drawn = Rollout(
        prompt_tokens=shape((questions, prompt_width), jnp.int32),
        prompt_lengths=shape((questions,), jnp.int32),
        completion_tokens=shape(per_token, jnp.int32),
        completion_lengths=shape(per_row, jnp.int32),
        completion_mask=shape(per_token, jnp.bool_),
        logprobs=shape(per_token, jnp.float32),
        log_kept=shape(per_token, jnp.float32),
        finish=shape(per_row, jnp.int32),
        loss_mask=shape(per_token, jnp.bool_) if has_environment else None,
    )
    rewards = shape(per_row, jnp.float32)
    return bound(Batch(rollout=drawn, rewards=rewards, advantages=rewards))


def device_limits() -> tuple[int, int] | None:
    """(bytes that the allocator may hand out, bytes in use); None where the backend does not state them, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return (stats["bytes_limit"], stats.get("bytes_in_use", 0)) if stats and "bytes_limit" in stats else None


def program_bytes(program: jax.stages.Compiled) -> int:
    """What one run of a program needs beside its arguments."""
    found: Any = program.memory_analysis()
    own = found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return own + found.output_size_in_bytes - found.alias_size_in_bytes


def size_of(tree: Any) -> int:
    """Bytes of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_compiled(
    config: TrainConfig,
    policy: Policy,
    prompt_width: int,
    rollout: jax.stages.Lowered | None,
    update: jax.stages.Lowered,
    limits: tuple[int, int],
    console: Console,
) -> CompiledMemory:
    """Compile both programs and compare their figures with the device's.

    Args:
        rollout: the rollout's first program; None: it is not looked at.
        limits: see `device_limits`, with the run's state and weights in use.

    Raises:
        UserError: a step needs more; the console has the table, planned and compiled.
    """
    shape = policy.model.config

    def plan(option: TrainConfig) -> MemoryPlan:
        return plan_memory(option, shape, policy.dtype, prompt_width, cudnn=jnp.dtype(policy.dtype).itemsize == 2)

    planned, (limit, in_use) = plan(config), limits
    needs = [program_bytes(program) for program in compile_all([update, *([] if rollout is None else [rollout])])]
    prompts = (config.training.prompts_per_step, prompt_width)
    weights = plan_weights(policy.model, policy.base, config.rollout, prompts)
    copy = merged_bytes(policy.model, weights.copy, weights.head) if weights.copy else 0
    batch = size_of(batch_shapes(config, prompt_width, policy.environment is not None))
    compiled = CompiledMemory(in_use + planned.runtime, sum(needs[1:]) + copy, needs[0] + batch)
    if compiled.total > limit:
        show_both(console, planned, compiled, f"{config.model.model}, {config.batch_in_words}: the chosen settings")
        # Settings are searched by the plan, held to what it was off by here.
        fitting = best_fit(config, plan, int(limit * min(planned.total / compiled.total, 1.0)))
        raise UserError(f"{refusal(config, compiled, limit, fitting)} (by the compiled programs)")
    return compiled


def show_both(console: Console, planned: MemoryPlan, compiled: CompiledMemory, title: str) -> None:
    """The plan's table with the compiled programs' figures beside it."""
    table = Table()
    for name, justify in (("", "left"), ("planned GB", "right"), ("compiled GB", "right"), ("when", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, size, remark in planned.rows()[:-1]:
        table.add_row(name, f"{size / 1e9:.3f}", "", remark)
    table.add_section()
    sums: Mapping[str, str] = {"resident": "the whole step", "rollout": "its own", "update": "its own", "total": "peak"}
    for name, remark in sums.items():
        sizes = (f"{getattr(figures, name) / 1e9:.3f}" for figures in (planned, compiled))
        table.add_row(name, *sizes, remark, style="bold" if name == "total" else None)
    console.print(title)
    console.print(table)
