"""The two pytrees that a training step takes: what is carried from step to step, and one rollout with its advantages."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jgrpo.rollout import Rollout

T = TypeVar("T")


class TrainState(struct.PyTreeNode):
    """Everything that changes during a run; donated to every step, saved in every checkpoint.

    Attributes:
        step: rollout batches trained on so far.
        lora: what is trained, float32: an adapter, or `{"weights": …}`, the whole model.
        opt_state: state of the optax optimizer.
        key: the run's key; step s samples with `fold_in(key, s)`, so the key itself never changes.
        cursor: (epoch, index) of the next prompt in the data order.
        nonfinite: updates skipped in a row because the loss or the gradient was not finite.
        critic: PPO's value function, trained by the same optimizer; `{}` elsewhere.
        reference: of the reference policy, in the same form, never trained; `{}`: the base model.
        coefficients: what controllers adapt from step to step, such as beta; `{}`: nothing is adapted.
    """

    step: Int[Array, ""]
    lora: Mapping[str, Any]
    opt_state: optax.OptState
    key: PRNGKeyArray
    cursor: Int[Array, " 2"]
    nonfinite: Int[Array, ""]
    critic: Mapping[str, Any] = struct.field(default_factory=dict)
    reference: Mapping[str, Any] = struct.field(default_factory=dict)
    coefficients: Mapping[str, Array] = struct.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        lora: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        key: PRNGKeyArray,
        critic: Mapping[str, Any] | None = None,
    ) -> "TrainState":
        """State before the first step. No two leaves share a buffer, which donation would refuse.

        With a critic, the optimizer's state is that of `{"policy": lora, "critic": critic}`.
        """
        step, nonfinite = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        opt_state = optimizer.init({"policy": lora, "critic": critic} if critic else lora)
        return committed(cls(step, lora, opt_state, key, jnp.zeros(2, jnp.int32), nonfinite, critic or {}))


def committed(state: T) -> T:
    """The state (or a batch) with every array bound to its device.

    A program that uses host memory (`offload`) returns bound arrays, and `jit` compiles once more for arguments that were free
    before: a state that is bound from the start, and stays so, meets one program.
    """
    return jax.device_put(state, jax.devices()[0])


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
