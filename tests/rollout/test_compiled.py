"""What the compiled rollout must not contain: full-precision weights and copies of the cache in its loop."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import RolloutConfig
from jgrpo.rollout import Prompts, rollout_program
from jgrpo.rollout.weights import matrix_shapes, merge
from tests.rollout.conftest import MATRICES, Policy
from tests.rollout.programs import instructions, loop_bodies
from tests.rollout.test_sampler import full_logits

GROUP = 14
CONFIG = RolloutConfig(num_generations=GROUP, max_completion_length=96, top_p=0.9)
_FLOATS = ("f16", "bf16", "f32", "f64")


@pytest.fixture(scope="module")
def compiled(int4_policy: Policy, prompts: Prompts) -> jax.stages.Compiled:
    key = jax.random.key(0)
    return rollout_program.lower(*int4_policy, prompts, key, CONFIG, eos_ids=(1,), pad_id=0).compile()


def test_no_array_as_large_as_the_dequantized_weights(compiled: jax.stages.Compiled, int4_policy: Policy) -> None:
    """One layer at a time may be dequantized; a stack of them would be the copy that int4 is there to avoid."""
    stacks = {int(np.prod(int4_policy.base["layers"][name].shape)) for name in MATRICES}
    layers = {size // int4_policy.model.config.num_layers for size in stacks}
    floats = [(line, size) for line, kind, size in instructions(compiled.as_text()) if kind in _FLOATS]
    assert any(size in layers for _, size in floats)
    assert [line for line, size in floats if size in stacks] == []


def test_the_search_finds_a_dequantized_stack(int4_policy: Policy) -> None:
    from jgrpo.quantization import dequantize

    weight = int4_policy.base["layers"]["down"]
    text = jax.jit(lambda w: dequantize(w) + 1).lower(weight).compile().as_text()
    assert int(np.prod(weight.shape)) in [size for _, kind, size in instructions(text) if kind in _FLOATS]


def test_the_cache_is_updated_in_place(compiled: jax.stages.Compiled, int4_policy: Policy, prompts: Prompts) -> None:
    """Inside the loops nothing copies an array of the cache's size, and what makes one is an update in place."""
    config = int4_policy.model.config
    rows = prompts.tokens.shape[0] * GROUP
    cache = config.num_layers * rows * config.num_kv_heads * CONFIG.max_completion_length * config.head_dim
    body = loop_bodies(compiled.as_text())
    assert any(size == cache for _, _, size in instructions(body, named="dynamic-update-slice"))
    assert [line for line, _, size in instructions(body, named="copy") if size >= cache] == []


def test_the_search_finds_a_copied_cache() -> None:
    """A loop that keeps the cache of the step before has to copy it."""

    def step(i, carry):
        cache, _ = carry
        return cache.at[i].set(cache.sum()), cache

    cache = jnp.ones((64, 32))
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 10, step, (x, x)))
    body = loop_bodies(loop.lower(cache).compile().as_text())
    assert any(size >= cache.size for _, _, size in instructions(body, named="copy"))


@pytest.fixture(scope="module")
def unrolled(int4_policy: Policy, prompts: Prompts) -> str:
    """The program of a merged copy with its layers written out, which is what a GPU runs from 64 rows on."""
    config = dataclasses.replace(CONFIG, decode_layers="unrolled", rollout_weights="bf16", top_p=1.0)
    merged = merge(*int4_policy)
    how = dict(eos_ids=(1,), pad_id=0, merged=merged)
    return rollout_program.lower(*int4_policy, prompts, jax.random.key(0), config, **how).compile().as_text()


def test_unrolled_layers_copy_neither_cache_nor_weights(unrolled: str, int4_policy: Policy, prompts: Prompts) -> None:
    config, rows = int4_policy.model.config, prompts.tokens.shape[0] * GROUP
    layer = rows * config.num_kv_heads * CONFIG.max_completion_length * config.head_dim
    matrices = {int(np.prod(shape)) for shape in matrix_shapes(config).values()}
    body = loop_bodies(unrolled)
    assert any(size == config.num_layers * layer for _, _, size in instructions(body, named="dynamic-update-slice"))
    for moving in ("copy", "transpose", "concatenate"):
        # The prefill dequantizes the base in a loop of its own.
        made = [(line, size) for line, _, size in instructions(body, named=moving) if "Transformer.prefill" not in line]
        assert [line for line, size in made if size >= config.num_layers * layer or size in matrices] == []


def test_the_host_waits_once_a_chunk_for_unrolled_layers(unrolled: str) -> None:
    loops = [line for line in unrolled.splitlines() if " while(" in line]
    assert len([line for line in loops if "known_trip_count" not in line]) == 1
    assert not re.search(
        r"(outfeed|infeed|send|recv)\(|custom_call_target=\"xla_(ffi_)?(partitioned_)?python", unrolled
    )


def test_temporary_memory_is_two_caches_and_little_else(
    compiled: jax.stages.Compiled, int4_policy: Policy, prompts: Prompts
) -> None:
    config = int4_policy.model.config
    rows = prompts.tokens.shape[0] * GROUP
    cache = 4 * config.num_layers * rows * config.num_kv_heads * CONFIG.max_completion_length * config.head_dim
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert 2 * cache <= analysis.temp_size_in_bytes < 3 * cache


def test_an_int4_base_samples_like_its_own_full_forward(
    compiled: jax.stages.Compiled, int4_policy: Policy, prompts: Prompts
) -> None:
    rollout = compiled(int4_policy.base, int4_policy.lora, prompts, jax.random.key(0))
    mask = np.asarray(rollout.completion_mask)
    logp = jax.nn.log_softmax(jnp.asarray(full_logits(int4_policy, rollout)))
    expected = jnp.take_along_axis(logp, rollout.completion_tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.asarray(rollout.policy_logprobs)[mask], np.asarray(expected)[mask], atol=1e-4)


def test_the_host_waits_once_a_chunk(compiled: jax.stages.Compiled) -> None:
    """Of the loops around the model only the one over chunks has a trip count that is not known beforehand."""
    loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
    assert len(loops) >= 4
    assert len([line for line in loops if "known_trip_count" not in line]) == 1
