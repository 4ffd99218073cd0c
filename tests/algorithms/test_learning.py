"""Every estimator and every loss teaches a table of logits to write the token that is rewarded, off-policy steps included."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.algorithms import Scored, objective_from_config, policy_loss
from jgrpo.config import AlgorithmConfig
from tests.algorithms.test_registry import CHOICES

QUESTIONS, GENERATIONS, LENGTH, VOCABULARY, STEPS = 4, 8, 3, 5, 60
DEFAULT = AlgorithmConfig(aggregation="grpo")
VARIANTS = [{"loss_type": loss} for loss in CHOICES["loss_type"]]
VARIANTS += [{"advantage_estimator": name} for name in CHOICES["advantage_estimator"] if name != "grpo"]
VARIANTS += [{"importance_sampling_level": "sequence", "beta": 0.01}]
MASK = np.ones((QUESTIONS, GENERATIONS, LENGTH), bool)


@jax.jit
def logprobs_of(logits, tokens):
    """[C, V], [Q, G, C] -> [Q, G, C]."""
    return jax.nn.log_softmax(logits)[jnp.arange(LENGTH), tokens]


@partial(jax.jit, static_argnames="objective")
def update(logits, old, tokens, advantages, objective):
    """One step of gradient descent on a batch."""
    ref = jnp.full(tokens.shape, -np.log(VOCABULARY))
    weights = objective.aggregation(jnp.asarray(MASK), LENGTH, None)

    def loss(logits):
        new = logprobs_of(logits, tokens)
        return policy_loss(new, old, advantages, jnp.asarray(MASK), weights, objective, ref_logprobs=ref)[0]

    return logits - 2.0 * jax.grad(loss)(logits)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(map(str, c.values())))
def test_the_rewarded_token_is_learned(changes):
    objective = objective_from_config(replace(DEFAULT, **changes))

    @jax.jit
    def advantages_of(rewards, greedy):
        return objective.advantages(Scored(rewards[None], jnp.ones(1), MASK.sum(-1), greedy_rewards=greedy))

    rng, logits, history = np.random.default_rng(0), jnp.zeros((LENGTH, VOCABULARY)), []
    for _ in range(STEPS):
        noise = rng.gumbel(size=(*MASK.shape, VOCABULARY))
        tokens = jnp.asarray(np.argmax(np.asarray(logits) + noise, axis=-1))
        rewards = jnp.asarray(np.mean(np.asarray(tokens) == 2, axis=-1))
        greedy = jnp.full(QUESTIONS, jnp.mean(logits.argmax(-1) == 2))
        advantages = advantages_of(rewards, greedy)
        old = logprobs_of(logits, tokens)
        for _ in range(2):
            logits = update(logits, old, tokens, advantages, objective=objective)
        history.append(float(rewards.max(-1).mean() if "pass_at_k" in changes.values() else rewards.mean()))
    assert np.mean(history[:3]) < 0.7
    assert np.mean(history[-10:]) > 0.85
