"""`--algorithm`: which step a run takes, as a table. All steps have one shape and work without the loop:

`step(state, base, batch, *, model, optimizer, config, objective) -> (state, metrics)`.

What a step minimises is the objective's affair (`jgrpo.algorithms.registry`); an algorithm of your own is one entry here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jgrpo.algorithms import Objective
from jgrpo.training.ppo import init_critic, ppo_step
from jgrpo.training.preference import online_dpo_step
from jgrpo.training.state import TrainState
from jgrpo.training.step import grpo_step


class Algorithm(NamedTuple):
    """A step, and what the loop has to prepare for it."""

    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    init_critic: Callable[..., dict[str, Any]] | None = None
    """(key, lora_config, model_config) -> `TrainState.critic`; None: there is none."""
    kl_before_step: bool = True
    """A KL in the reward is the completion's, taken off before the step; False: the step sees to it."""

    def penalises(self, objective: Objective) -> bool:
        """Whether the loop takes a KL off the rewards."""
        return self.kl_before_step and objective.reward_beta > 0


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(grpo_step),
    "rloo": Algorithm(grpo_step),
    "online_dpo": Algorithm(online_dpo_step),
    "ppo": Algorithm(ppo_step, init_critic=init_critic, kl_before_step=False),
}
