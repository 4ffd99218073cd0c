"""The two pytrees that a training step takes: what is carried from step to step, and one rollout with its advantages."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jgrpo.rollout import Rollout


class TrainState(struct.PyTreeNode):
    """Everything that changes during a run; donated to every step, saved in every checkpoint.

    Attributes:
        step: rollout batches trained on so far.
        lora: adapter parameters, float32.
        opt_state: state of the optax optimizer.
        key: the run's key; step s samples with `fold_in(key, s)`, so the key itself never changes.
        cursor: (epoch, index) of the next prompt in the data order.
        nonfinite: updates skipped in a row because the loss or the gradient was not finite.
    """

    step: Int[Array, ""]
    lora: Mapping[str, Any]
    opt_state: optax.OptState
    key: PRNGKeyArray
    cursor: Int[Array, " 2"]
    nonfinite: Int[Array, ""]

    @classmethod
    def create(
        cls, lora: Mapping[str, Any], optimizer: optax.GradientTransformation, key: PRNGKeyArray
    ) -> "TrainState":
        """State before the first step. No two leaves share a buffer, which donation would refuse."""
        step, nonfinite = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return cls(step, lora, optimizer.init(lora), key, jnp.zeros(2, jnp.int32), nonfinite)


class Batch(struct.PyTreeNode):
    """One rollout and what it was worth.

    Attributes:
        rollout: prompts, completions, masks, sampler log-probabilities.
        rewards: combined reward of each completion; NaN: no reward function gave one.
        advantages: of each completion; 0: it does not push the policy.
    """

    rollout: Rollout
    rewards: Float[Array, "Q G"]
    advantages: Float[Array, "Q G"]
