"""A tiny quantized model with an adapter, a rollout from it, and the settings that go with them."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.config import LoraConfig, RolloutConfig, TrainConfig
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer, init_base
from jgrpo.quantization import quantize
from jgrpo.rollout import Prompts, Rollout, generate
from jgrpo.training import Batch, TrainState, make_optimizer
from jgrpo.training import token_logprobs as eager_token_logprobs

MODEL_CONFIG = ModelConfig("qwen2", 61, 32, 64, 2, 4, 2, 8, qkv_bias=True, tie_embeddings=True)
# Fewer leaves in the optimizer's program: half of the time of these tests is XLA compiling it.
LORA = LoraConfig(lora_rank=4, lora_alpha=8.0, target_modules=("q_proj", "v_proj", "down_proj"))
MODEL = Transformer(MODEL_CONFIG, LORA)
EOS, PAD = 60, 59
MANY_EOS = (EOS, 1, 2, 3, 4)
QUESTIONS, GENERATIONS, PROMPT, COMPLETION = 4, 4, 6, 10


def settings(**values: Any) -> TrainConfig:
    """A configuration for the tiny shapes; `values` are fields of any section."""
    values = {
        "num_generations": GENERATIONS,
        "max_completion_length": COMPLETION,
        "prompts_per_step": QUESTIONS,
        "microbatch_size": QUESTIONS * GENERATIONS,
        "learning_rate": 1e-2,
        "lora_rank": LORA.lora_rank,
        "lora_alpha": LORA.lora_alpha,
        "target_modules": LORA.target_modules,
        **values,
    }
    config = TrainConfig()
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        names = {field.name for field in dataclasses.fields(part)} & set(values)
        changed = dataclasses.replace(part, **{name: values.pop(name) for name in names})
        config = dataclasses.replace(config, **{section.name: changed})
    assert not values, f"unknown settings {values}"
    return config


token_logprobs = partial(jax.jit, static_argnames=("model", "temperature", "remat", "chunk"))(eager_token_logprobs)


@cache
def tiny_base(scale: float = 8.0) -> dict[str, Any]:
    """Random weights of deviation 0.02 · scale; at scale 1 the model is nearly uniform and mistakes hardly show."""
    base = init_base(jax.random.key(0), MODEL_CONFIG)
    base = jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, base)
    layers = {name: quantize(leaf, 32) if leaf.ndim == 3 else leaf for name, leaf in base["layers"].items()}
    return {**base, "layers": layers}


@cache
def fresh_lora() -> dict[str, Any]:
    return init_lora(jax.random.key(1), LORA, MODEL_CONFIG)


@cache
def trained_lora() -> dict[str, Any]:
    """An adapter with B ≠ 0."""
    lora = fresh_lora()
    return {name: {**m, "b": 0.1 * jax.random.normal(jax.random.key(5), m["b"].shape)} for name, m in lora.items()}


@cache
def prompts() -> Prompts:
    tokens = jax.random.randint(jax.random.key(2), (QUESTIONS, PROMPT), 0, 50)
    return Prompts(tokens=tokens, lengths=jnp.array([3, 6, 5, 4], jnp.int32))


@cache
def rollout(key: int = 3, config: RolloutConfig | None = None, eos: tuple[int, ...] = MANY_EOS) -> Rollout:
    """What the trained adapter samples; with several EOS ids, so that lengths differ."""
    config = config or settings().rollout
    return generate(MODEL, tiny_base(), trained_lora(), prompts(), jax.random.key(key), config, eos_ids=eos, pad_id=PAD)


@cache
def batch(key: int = 3) -> Batch:
    """A rollout with random rewards."""
    drawn = rollout(key)
    rewards = jax.random.normal(jax.random.key(key + 100), (QUESTIONS, GENERATIONS))
    return Batch(rollout=drawn, rewards=rewards, advantages=rewards - rewards.mean(axis=1, keepdims=True))


# One optimizer object for equal settings: it is a static argument, compared by identity.
cached_optimizer = cache(partial(make_optimizer, updates=100))


def state(lora: Any, config: TrainConfig) -> tuple[TrainState, Any]:
    optimizer = cached_optimizer(config.optimizer)
    return TrainState.create(jax.tree.map(jnp.copy, lora), optimizer, jax.random.key(0)), optimizer


def assert_trees_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
