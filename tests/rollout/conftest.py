"""One tiny random model, in float32 and quantized, with an adapter that does something."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jgrpo.config import LoraConfig
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer, init_base
from jgrpo.quantization import quantize
from jgrpo.rollout import Prompts

MATRICES = ("qkv", "out", "gate_up", "down")


class Policy(NamedTuple):
    """The first three arguments of `generate`."""

    model: Transformer
    base: Any
    lora: Any


def make_policy(vocab: int = 97, seed: int = 0) -> Policy:
    """Three layers, grouped heads, QK-norm; weights large enough that distributions are far from uniform."""
    config = ModelConfig(
        family="qwen3",
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        qk_norm=True,
    )
    model = Transformer(config, LoraConfig(lora_rank=4, lora_alpha=8.0))
    keys = jax.random.split(jax.random.key(seed), 3)
    base = jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, init_base(keys[0], config))
    base["head"] = 10 * base["head"]
    lora = init_lora(keys[1], model.lora, config)
    noise = jax.random.split(keys[2], len(lora))
    for name, key in zip(lora, noise, strict=True):
        lora[name]["b"] = 0.1 * jax.random.normal(key, lora[name]["b"].shape)
    return Policy(model, base, lora)


@pytest.fixture(scope="package")
def policy() -> Policy:
    return make_policy()


@pytest.fixture(scope="package")
def int4_policy(policy: Policy) -> Policy:
    layers = {n: quantize(w, 32) if n in MATRICES else w for n, w in policy.base["layers"].items()}
    return policy._replace(base={**policy.base, "layers": layers})


@pytest.fixture(scope="package")
def prompts() -> Prompts:
    """Five prompts of different lengths, the shortest a single token."""
    tokens = jax.random.randint(jax.random.key(7), (5, 12), 0, 97)
    return Prompts(tokens, jnp.asarray([12, 1, 7, 3, 9], jnp.int32))
