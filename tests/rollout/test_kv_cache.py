"""A cache in 8 bits: what it does to log-probabilities, and that it is a cache in 8 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.config import RolloutConfig
from jgrpo.models import KVCache
from jgrpo.rollout import Prompts, generate
from tests.rollout.conftest import Policy
from tests.rollout.test_sampler import full_logits

CONFIG = RolloutConfig(num_generations=8, max_completion_length=48)

# Mean and largest change of a token's log-probability in nats, on drawn tokens of a float32 model whose distributions
# are far from uniform; bounds are 1.5 times what was measured.
MEASURED = {"int8": (0.013, 0.1), "fp8": (0.06, 0.37)}


def gaps(policy: Policy, prompts: Prompts, kv_cache: str) -> np.ndarray:
    """|sampler - full forward| of every drawn token."""
    config = dataclasses.replace(CONFIG, kv_cache=kv_cache)
    rollout = generate(*policy, prompts, jax.random.key(3), config, eos_ids=(), pad_id=0)
    logp = jax.nn.log_softmax(jnp.asarray(full_logits(policy, rollout)))
    exact = jnp.take_along_axis(logp, rollout.completion_tokens[..., None], axis=-1)[..., 0]
    return np.abs(np.asarray(rollout.logprobs - exact))


@pytest.mark.parametrize("kv_cache", MEASURED)
def test_codes_change_logprobs_by_little(policy: Policy, prompts: Prompts, kv_cache: str) -> None:
    gap = gaps(policy, prompts, kv_cache)
    mean, largest = MEASURED[kv_cache]
    assert mean / 3 < gap.mean() < 1.5 * mean  # far below the bound would mean that the cache isn't in 8 bits
    assert gap.max() < 1.5 * largest


@pytest.mark.parametrize(("dtype", "size"), [(None, 4), (jnp.int8, 1), (jnp.float8_e4m3fn, 1)])
def test_the_cache_takes_what_its_type_takes(dtype: type | None, size: int) -> None:
    prompt = jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 16))
    cache = KVCache.create((prompt, -prompt), jnp.ones(3, jnp.int32), 4, 7, dtype)
    assert cache.k.nbytes == size * 2 * 3 * 4 * 2 * 7 * 16
    assert cache.prompt_v.nbytes == size * 2 * 3 * 2 * 5 * 16
    assert (cache.all_scales is None) == (dtype is None)
    if cache.all_scales is not None:
        assert [part.shape for part in cache.all_scales] == [
            part.shape[:-1] for part in (cache.prompt_k, cache.prompt_v, cache.k, cache.v)
        ]
