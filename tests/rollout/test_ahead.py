"""Whatever lengths a rollout draws, its programs are there: compiled from shapes, and found by the calls that need them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import RolloutConfig
from jgrpo.rollout import Prompts, compaction, generate
from jgrpo.rollout.ahead import compile_all, lower_rollout
from jgrpo.rollout.weights import HEAD_BLOCK
from jgrpo.training.guards import CompileCounter
from tests.rollout.conftest import Policy, make_policy

CONFIG = RolloutConfig(num_generations=8, max_completion_length=64, stop_token_ids=(7, 8, 9))


@pytest.mark.parametrize(
    ("settings", "is_bound", "around"),
    [
        ({}, False, 1),
        ({"kv_cache": "int8", "prompts_at_once": 3}, True, 16),
        ({"rollout_weights": "bf16"}, True, 6),
        ({"rollout_weights": "int8"}, True, 7),
    ],
    ids=str,
)
def test_no_rollout_compiles_a_program_of_the_loop(
    policy: Policy, prompts: Prompts, settings: dict, is_bound: bool, around: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with arrays bound to their device, which `jit` tells apart from free ones.

    `around` bounds the programs beside the loop: the result's, those that cut and join parts, those of a merged copy and, in 8 bits,
    of its head that proposes tokens.
    """
    config, shrunk, shrink = dataclasses.replace(CONFIG, **settings), [], compaction.shrink
    monkeypatch.setattr(compaction, "MIN_ROWS", 2)
    monkeypatch.setattr(compaction, "shrink", lambda *given: (shrunk.append(given[1].shape), shrink(*given))[1])
    model, base, lora = make_policy(vocab=HEAD_BLOCK) if "int8" in settings.get("rollout_weights", "") else policy
    lora = jax.device_put(lora, jax.devices()[0] if is_bound else None)
    keys = jax.block_until_ready([jax.random.fold_in(jax.random.key(1), number) for number in range(4)])
    how = dict(eos_ids=(5,), pad_id=3)

    compilations = CompileCounter()
    first, rest = lower_rollout(model, base, lora, prompts, keys[0], config, **how)
    rest = rest()
    compile_all([first, *rest])
    before = compilations.count
    generate(model, base, lora, prompts, keys[0], config, **how)
    assert compilations.count - before <= around
    before = compilations.count
    for key in keys[1:]:
        jax.block_until_ready(generate(model, base, lora, prompts, key, config, **how))
    compilations.close()
    assert compilations.count == before
    assert bool(rest) == bool(shrunk)


def test_the_first_program_is_what_runs_first(policy: Policy, prompts: Prompts) -> None:
    """Its result has the shape of the rollout: what its memory figures are about."""
    first, rest = lower_rollout(*policy, prompts, jax.random.key(0), CONFIG, eos_ids=(5,), pad_id=3)
    assert not rest()  # too few rows for compaction to pay
    shapes = [leaf.shape for leaf in jax.tree.leaves(first.out_info)]
    drawn = generate(*policy, prompts, jax.random.key(0), CONFIG, eos_ids=(5,), pad_id=3)
    assert shapes == [np.shape(leaf) for leaf in jax.tree.leaves(drawn)]
    assert first.compile().memory_analysis().argument_size_in_bytes > sum(
        leaf.nbytes for leaf in jax.tree.leaves(policy[1])
    )
    assert jnp.all(drawn.completion_lengths >= 1)
