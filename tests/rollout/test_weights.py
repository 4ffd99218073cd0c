"""The merged copy: what it holds, when it is taken, and that it samples like the adapter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import LoraConfig, RolloutConfig
from jgrpo.lora import module_delta
from jgrpo.models import PROPOSAL_HEAD, ModelConfig, Transformer
from jgrpo.quantization import LAYERS, dequantize, quantize, quantize_fast8, take_layer
from jgrpo.rollout import Prompts, generate, weights
from jgrpo.rollout.weights import (
    HEAD_BLOCK,
    cache_bytes,
    choose_weights,
    copy_group,
    decoded,
    decoding_variables,
    has_int8_kernel,
    has_proposal_head,
    merge,
    merged_bytes,
    plan_weights,
)
from pallas_kernels import dispatch, tuning
from pallas_kernels.rows import permute_columns
from tests.rollout.conftest import MATRICES, Policy, make_policy
from tests.rollout.test_sampler import full_logits

CONFIG = RolloutConfig(num_generations=2, max_completion_length=12)
HOPPER = dispatch.Device("gpu", (9, 0), True, "NVIDIA H200", True, 132)


@pytest.fixture(scope="module")
def block_policy() -> Policy:
    """Whose vocabulary is a whole block of the kernel's, so that a copy in 8 bits has the head; embedding and head are one."""
    model, base, lora = make_policy(vocab=HEAD_BLOCK)
    config = dataclasses.replace(model.config, tie_embeddings=True)
    head = base.pop("head")
    return Policy(model.clone(config=config), {**base, "embed": head}, lora)


def own_order(head: Any) -> jax.Array:
    """The elements of a proposals' head, columns as they are stored."""
    return permute_columns(dequantize(head))


@pytest.mark.parametrize("form", ["int8", "int8_layers"])
def test_the_copy_in_eight_bits_may_have_the_head(block_policy: Policy, form: str) -> None:
    model, base, lora = block_policy
    copy, stored = merge(*block_policy, form, head=True), base["embed"]
    want = quantize_fast8(stored, copy_group(stored.shape[-1]), jnp.bfloat16)
    np.testing.assert_array_equal(own_order(copy[PROPOSAL_HEAD]), dequantize(want))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(copy)) == merged_bytes(model, form, head=True)
    variables = decoding_variables(model, base, lora, copy, unroll=True, positions=8)
    hidden = jax.random.normal(jax.random.key(1), (3, stored.shape[-1]))
    want = np.asarray(hidden, np.float64) @ np.asarray(dequantize(want), np.float64).T
    np.testing.assert_allclose(model.apply(variables, hidden, method="proposal_logits"), want, rtol=1e-5, atol=1e-5)
    assert model.apply(variables, method="head_weight") is stored


def test_it_has_the_head_where_the_draw_can_be_corrected(
    policy: Policy, block_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, lora = block_policy
    config = dataclasses.replace(CONFIG, rollout_weights="int8")

    def has_head(case: Policy, config: RolloutConfig) -> bool:
        merged = decoded(*case, config, (5, 12)).merged
        return merged is not None and PROPOSAL_HEAD in merged

    assert has_head(block_policy, config)
    assert has_head(block_policy, dataclasses.replace(config, temperature=0.7, top_k=HEAD_BLOCK))
    others = [dict(temperature=0.0), dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1), dict(rollout_weights="bf16")]
    for setting in [*others, dict(rollout_weights="int4"), dict(num_generations=52)]:
        assert not has_head(block_policy, dataclasses.replace(config, **setting)), setting
    capped = model.clone(config=dataclasses.replace(model.config, logit_softcap=30.0))
    packed = {**base, "embed": quantize(base["embed"], 32)}
    for case in (policy, Policy(capped, base, lora), Policy(model, packed, lora)):
        assert not has_head(case, config)
    monkeypatch.setattr(dispatch, "current_device", lambda: HOPPER)
    assert not has_proposal_head(model, config, 8, packed=False)  # no kernel multiplies float32


@pytest.mark.parametrize(("vocab", "width"), [(151_936, 896), (151_936, 1536), (128_256, 4096), (17_024, 5120)])
def test_a_head_has_a_kernel_where_the_matrices_have_one(
    vocab: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its K is not split: parts of the size of all logits would be as much to read again as the head."""
    monkeypatch.setattr(dispatch, "current_device", lambda: HOPPER)
    config = ModelConfig("qwen2", vocab, width, 4 * width, 2, width // 64, 2, 64)
    model = Transformer(config, LoraConfig(), jnp.bfloat16)
    for rows in (1, 64, 256):
        assert has_int8_kernel(model, rows)
        assert has_proposal_head(model, CONFIG, rows, packed=False)
        blocks = tuning.int8_config(rows, vocab, width, copy_group(width))
        assert blocks is not None
        assert blocks.split_k == 1


def test_rollouts_by_proposals_are_those_of_the_stored_head(
    block_policy: Policy, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers that are not rounded, log-probabilities are those of the full forward; those of the rounded head are far from them."""
    model, base, lora = block_policy
    monkeypatch.setattr(weights, "merge", lambda *_, **__: merge(*block_policy, "bf16", head=True))
    config = RolloutConfig(num_generations=4, max_completion_length=24, rollout_weights="int8")
    how = dict(eos_ids=(5,), pad_id=0)
    rollout = generate(*block_policy, prompts, jax.random.key(2), config, **how)
    again = generate(*block_policy, prompts, jax.random.key(2), config, **how)
    np.testing.assert_array_equal(rollout.completion_tokens, again.completion_tokens)
    np.testing.assert_array_equal(rollout.logprobs, again.logprobs)

    def gap(policy: Policy) -> float:
        logprobs = jax.nn.log_softmax(full_logits(policy, rollout), axis=-1)
        own = jnp.take_along_axis(logprobs, jnp.asarray(rollout.completion_tokens)[..., None], axis=-1)[..., 0]
        return float(np.abs(own - rollout.logprobs)[np.asarray(rollout.completion_mask)].mean())

    untied = model.clone(config=dataclasses.replace(model.config, tie_embeddings=False))
    rounded = own_order(merge(*block_policy, "int8", head=True)[PROPOSAL_HEAD])
    assert gap(block_policy) < 0.3 * gap(Policy(untied, {**base, "head": rounded}, lora))


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


def test_the_copy_in_eight_bits_is_the_merged_matrix_within_a_step(policy: Policy) -> None:
    merged, coded = merge(*policy), merge(*policy, "int8")
    assert set(coded) == set(merged)
    assert merged_bytes(policy.model, "int8") == sum(leaf.nbytes for leaf in jax.tree.leaves(coded))
    for name, weight in coded.items():
        for layer, exact in enumerate(merged[name]):
            own = take_layer(weight, layer)
            steps = np.abs(np.repeat(np.asarray(own.scales, np.float32), own.group_size, axis=1))
            # Half of a double step, and what the scale's own rounding to bfloat16 cuts off the largest elements.
            limit = steps * (1 + 128 * 2.0**-8)
            error = np.asarray(dequantize(own)) - np.asarray(exact)
            assert (np.abs(error) <= limit).all()
            assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(np.asarray(exact) ** 2))


def test_a_copy_laid_out_for_a_kernel_of_all_layers_samples_like_one_of_matrices(
    policy: Policy, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by the kernel's jnp twin; the layout has the same elements."""
    how = dict(eos_ids=(5,), pad_id=0)
    config = dataclasses.replace(CONFIG, rollout_weights="int8")
    matrices = generate(*policy, prompts, jax.random.key(2), config, **how)
    monkeypatch.setattr(weights, "int8_form", lambda model, rows: "int8_layers")
    layers = generate(*policy, prompts, jax.random.key(2), config, **how)
    np.testing.assert_array_equal(layers.completion_tokens, matrices.completion_tokens)
    np.testing.assert_allclose(layers.logprobs, matrices.logprobs, atol=1e-4)
    copies = [merge(*policy, form) for form in ("int8", "int8_layers")]
    assert set(copies[1]) == {LAYERS}
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(copy)) for copy in copies]
    assert sizes == [merged_bytes(policy.model, "int8")] * 2


@pytest.mark.parametrize("layers", ["loop", "unrolled"])
def test_rollouts_from_the_copy_in_eight_bits_follow_its_matrices(
    policy: Policy, prompts: Prompts, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of a 16-bit copy with the same elements."""
    how = dict(eos_ids=(5,), pad_id=0)
    config = dataclasses.replace(CONFIG, rollout_weights="int8", decode_layers=layers)
    coded = generate(*policy, prompts, jax.random.key(2), config, **how)

    def dequantized(model, base, lora, *_form_and_head):
        coded = merge(model, base, lora, "int8")
        return {name: tuple(dequantize(take_layer(part, 0)) for part in weight.parts) for name, weight in coded.items()}

    monkeypatch.setattr(weights, "merge", dequantized)
    config = dataclasses.replace(CONFIG, rollout_weights="bf16", decode_layers="unrolled")
    wide = generate(*policy, prompts, jax.random.key(2), config, **how)
    np.testing.assert_array_equal(coded.completion_tokens, wide.completion_tokens)
    np.testing.assert_allclose(coded.logprobs, wide.logprobs, atol=1e-4)
    monkeypatch.undo()
    exact = generate(*policy, prompts, jax.random.key(2), config, **how)
    assert np.abs(np.asarray(exact.logprobs - coded.logprobs)).max() > 1e-4  # the copies do differ


def test_auto_takes_the_copy_with_many_rows_and_room(int4_policy: Policy) -> None:
    assert choose_weights(512, 10, {"bf16": 20, "int8": 10}, 30, 100).copy == "bf16"
    assert choose_weights(512, 11, {"bf16": 20, "int8": 10}, 30, 100).copy is None
    assert choose_weights(64, 10, {"bf16": 20, "int8": 10}, 30, 100).copy == "bf16"
    assert choose_weights(63, 10, {"bf16": 20, "int8": 10}, 30, 100).copy is None
    assert choose_weights(512, 10, {"bf16": 20, "int8": 10}, 30, None).copy is None
    reason = str(choose_weights(512, 2 * 10**9, {"bf16": 3 * 10**9, "int8": 0}, 10**9, 8 * 10**9))
    assert reason == "rollout weights: as stored (auto: 2.0 GB base + 3.0 GB copy + 1.0 GB cache > 60% of 8.0 GB)"
    large = {"bf16": 6 * 10**9, "int8": 3 * 10**9}
    assert choose_weights(64, 0, large, 0, 10**11, "int8").copy == "int8"
    assert choose_weights(63, 0, large, 0, 10**11, "int8").copy is None
    assert choose_weights(127, 0, large, 0, 5 * 10**9, "int8").copy == "int8"
    assert choose_weights(127, 0, large, 0, 49 * 10**8, "int8").copy is None
    assert choose_weights(128, 0, large, 0, 10**11, "int8").copy == "bf16"
    assert choose_weights(64, 0, large, 0, 10**11, None).copy == "bf16"
    small = {"bf16": 3 * 10**9, "int8": 2 * 10**9}
    assert choose_weights(64, 0, small, 0, 10**11, "int8").copy == "bf16"
    assert choose_weights(64, 0, small, 0, 10**11, "int8_layers").copy == "int8_layers"
    assert choose_weights(16, 0, small, 0, 10**11, "int8_layers").copy == "int8_layers"
    assert choose_weights(16, 0, small, 0, 3 * 10**9, "int8_layers").copy is None
    assert str(choose_weights(15, 0, small, 0, 10**11, "int8_layers")).endswith("(auto: 15 rows, a copy pays from 16)")
    for setting, copy in [("int4", None), ("int8", "int8"), ("bf16", "bf16"), ("auto", None)]:
        config = dataclasses.replace(CONFIG, rollout_weights=setting)
        plan = plan_weights(int4_policy.model, int4_policy.base, config, (5, 12))
        assert plan.copy == copy
        assert ("no kernel" in plan.reason) == (setting == "int8")  # on a CPU


def test_cache_bytes_is_what_the_cache_takes(policy: Policy) -> None:
    # 3 layers, 2 kv heads of 16, float32: a token takes 768 bytes.
    assert cache_bytes(policy.model, CONFIG, (5, 12)) == 768 * 5 * (12 + 2 * 12)
    # In 8 bits a head takes 16 bytes and a scale of 4.
    coded = dataclasses.replace(CONFIG, kv_cache="int8")
    assert cache_bytes(policy.model, coded, (5, 12)) == 3 * 2 * 2 * 20 * 5 * (12 + 2 * 12)


@pytest.mark.parametrize("weights", ["int4", "int8", "bf16"])
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
