"""The merged copy: what it holds, when it is taken, and that it samples like the adapter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import RolloutConfig
from jgrpo.lora import module_delta
from jgrpo.quantization import dequantize
from jgrpo.rollout import Prompts, generate
from jgrpo.rollout.weights import cache_bytes, choose_weights, merge, merged_bytes, plan_weights
from tests.rollout.conftest import MATRICES, Policy

CONFIG = RolloutConfig(num_generations=2, max_completion_length=12)


def test_merge_adds_each_module_to_its_rows(int4_policy: Policy) -> None:
    model, base, lora = int4_policy
    merged, scale = merge(*int4_policy), model.lora.scale
    deltas = {name: np.asarray(module_delta(lora, name, scale)) for name in lora}
    parts = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("o_proj",), "gate_up": ("gate_proj", "up_proj")}
    assert set(merged) == set(MATRICES)
    for matrix, names in parts.items():
        delta = np.concatenate([deltas[name] for name in names], axis=1)
        want = np.asarray(dequantize(base["layers"][matrix])) + delta
        np.testing.assert_allclose(np.stack(merged[matrix]), want, atol=1e-5)
    assert merged_bytes(model) == sum(leaf.nbytes for leaf in jax.tree.leaves(merged))


@pytest.mark.parametrize("which", ["policy", "int4_policy"])
@pytest.mark.parametrize("layers", ["loop", "unrolled"])
def test_the_copy_samples_like_base_and_adapter(
    request: pytest.FixtureRequest, prompts: Prompts, which: str, layers: str
) -> None:
    policy = request.getfixturevalue(which)
    how = dict(eos_ids=(5,), pad_id=0)

    def sample(weights: str, layers: str) -> tuple:
        config = dataclasses.replace(CONFIG, rollout_weights=weights, decode_layers=layers)
        rollout = generate(*policy, prompts, jax.random.key(2), config, **how)
        return rollout.completion_tokens, rollout.logprobs

    tokens, logprobs = sample("int4", "loop")
    other_tokens, other_logprobs = sample("bf16" if layers == "loop" else "int4", layers)
    np.testing.assert_array_equal(tokens, other_tokens)
    np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-4)


def test_the_copy_is_in_the_compute_dtype_and_without_an_adapter_the_base(int4_policy: Policy) -> None:
    model, base, _ = int4_policy
    merged = merge(model.clone(dtype=jnp.bfloat16), base, {})
    want = dequantize(base["layers"]["down"], jnp.bfloat16)
    np.testing.assert_array_equal(np.stack(merged["down"]), np.asarray(want))


def test_auto_takes_the_copy_with_many_rows_and_room(int4_policy: Policy) -> None:
    assert choose_weights(512, 10, 20, 30, 100).merged
    assert not choose_weights(512, 11, 20, 30, 100).merged
    assert choose_weights(64, 10, 20, 30, 100).merged
    assert not choose_weights(63, 10, 20, 30, 100).merged
    assert not choose_weights(512, 10, 20, 30, None).merged
    reason = str(choose_weights(512, 2 * 10**9, 3 * 10**9, 10**9, 8 * 10**9))
    assert reason == "rollout weights: as stored (auto: 2.0 GB base + 3.0 GB copy + 1.0 GB cache > 60% of 8.0 GB)"
    for setting, merged in [("int4", False), ("bf16", True), ("auto", False)]:
        config = dataclasses.replace(CONFIG, rollout_weights=setting)
        assert plan_weights(int4_policy.model, int4_policy.base, config, (5, 12)).merged == merged


def test_cache_bytes_is_what_the_cache_takes(policy: Policy) -> None:
    # 3 layers, 2 kv heads of 16, float32: a token takes 768 bytes.
    assert cache_bytes(policy.model, CONFIG, (5, 12)) == 768 * 5 * (12 + 2 * 12)
    # In 8 bits a head takes 16 bytes and a scale of 4.
    coded = dataclasses.replace(CONFIG, kv_cache="int8")
    assert cache_bytes(policy.model, coded, (5, 12)) == 3 * 2 * 2 * 20 * 5 * (12 + 2 * 12)


@pytest.mark.parametrize("weights", ["int4", "bf16"])
def test_a_second_rollout_compiles_nothing(int4_policy: Policy, prompts: Prompts, weights: str) -> None:
    """A run draws thousands; the adapter, the prompts and the key are others every time, their shapes are not."""
    config = dataclasses.replace(CONFIG, rollout_weights=weights)
    later = int4_policy._replace(lora=jax.tree.map(lambda x: x + 1, int4_policy.lora))
    keys = jax.random.key(0), jax.random.key(1)
    generate(*int4_policy, prompts, keys[0], config, eos_ids=(5,), pad_id=0)
    made: list[str] = []

    def listen(event: str, *_: float, **__: str | int) -> None:
        made.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        generate(*later, prompts, keys[1], config, eos_ids=(5,), pad_id=0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert made == []
