"""The programs of a rollout, compiled from shapes before a batch needs them.

What `generate` runs after its first program depends on the lengths that are drawn: a shape that a long tail shrinks to may
first be met after hundreds of steps, and compiling it then is a pause and a growth of memory that nobody expects. Lowered
here with the shapes, settings and device bindings that `generate` will use, the programs are found in `jit`'s own cache.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jaxtyping import PRNGKeyArray

from jgrpo.config import RolloutConfig
from jgrpo.lora import WEIGHTS
from jgrpo.models import PROPOSAL_HEAD, Transformer
from jgrpo.rollout import batch, compaction
from jgrpo.rollout.sampler import Setup
from jgrpo.rollout.types import Prompts
from jgrpo.rollout.weights import at_once, decoded, merge, plan_weights, stored_head

Params = Mapping[str, Any]


def lower_rollout(
    model: Transformer,
    base: Params,
    lora: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
    config: RolloutConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    row_limits: Any = None,
) -> tuple[jax.stages.Lowered, Callable[[], list[jax.stages.Lowered]]]:
    """The first program of `generate` with these arguments, and what lowers all that may follow it; nothing runs.

    Not among them: those of the merged copy, and a few tiny ones around the loop, which every rollout runs.
    """
    questions, width = prompts.tokens.shape
    is_bound = any(leaf.committed for leaf in jax.tree.leaves((base, lora, key)))
    if WEIGHTS in lora:
        used = jax.eval_shape(lambda policy: decoded(model, {}, policy, config, (questions, width)), lora)
        base, lora, merged = bound(used, is_bound)
    else:
        plan = plan_weights(model, base, config, (questions, width))
        merged = None
        if (form := plan.copy) is not None:
            shapes = jax.eval_shape(lambda base, lora: merge(model, base, lora, form, plan.head), base, lora)
            merged = bound(shapes, is_bound)
            if plan.head:  # which no adapter binds
                merged[PROPOSAL_HEAD] = bound(shapes[PROPOSAL_HEAD], stored_head(base).committed)
    limits, size = row_limits, at_once(config, questions)
    if size < questions:
        keys = batch.row_keys(key, (questions, config.num_generations))
        prompts, key, limits = next(batch._parts(size, prompts, keys, row_limits, config.max_completion_length))
    shape = (size, config.num_generations)
    smaller = compaction.buckets(*shape) if config.compaction else ()
    if not smaller:
        how = dict(eos_ids=eos_ids, pad_id=pad_id, row_limits=limits, merged=merged)
        return batch.rollout_program.lower(model, base, lora, prompts, key, config, **how), list
    setup = Setup.create(model, config, eos_ids, pad_id)
    first = batch._first_stage.lower(setup, base, lora, merged, prompts, key, limits, smaller[0])
    after = bound(first.out_info, is_bound)
    return first, lambda: _lower_smaller(setup, (base, lora, merged), after, smaller, shape)


def _lower_smaller(
    setup: Setup, weights: tuple[Any, ...], first: Any, smaller: Sequence[compaction.Bucket], shape: tuple[int, int]
) -> list[jax.stages.Lowered]:
    """Every way from a shape to a smaller one, and the loop at each; `first` is the stage after the first program."""
    lowered, stages = [], [first]
    is_bound = first.rows.sharding is not None
    for bucket, until in zip(smaller, [*smaller[1:], None], strict=True):
        for before in stages:
            lowered += compaction.lower_shrink(before, bucket, shape[0] * shape[1])
        begun = bound(lowered[-1].out_info, is_bound)
        run = batch._next_stage.lower(setup, *weights, begun, until, shape)
        ended = bound(run.out_info, is_bound)
        lowered += [run, compaction.merge_buffers.lower(first.buffers, ended.buffers, ended.rows)]
        stages.append(ended)
    return lowered


def bound(shapes: Any, is_bound: bool = True) -> Any:
    """Shapes of arrays as a program returns them: bound to the device if one of its arguments is, which `jit` tells apart."""
    sharding = SingleDeviceSharding(jax.devices()[0]) if is_bound else None
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def compile_all(lowered: Sequence[jax.stages.Lowered]) -> list[jax.stages.Compiled]:
    """Compile at the same time what does not wait for each other: XLA works outside Python's lock."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda program: program.compile(), lowered))
