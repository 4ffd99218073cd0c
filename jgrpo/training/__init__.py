"""Training: the pure steps and the loop around them.

`grpo_step`, `online_dpo_step`, `ppo_step`, `token_logprobs` and `TrainState` work from a notebook on plain arrays; `train` runs a
whole configuration. Order of the data: prompts, rollout, rewards, advantages, step, checkpoint.
"""

from jgrpo.training.forward import Rows, token_logprobs
from jgrpo.training.optimizer import make_optimizer
from jgrpo.training.ppo import init_critic, ppo_step
from jgrpo.training.preference import online_dpo_step
from jgrpo.training.state import Batch, TrainState
from jgrpo.training.step import grpo_step

__all__ = [
    "Batch",
    "Rows",
    "TrainState",
    "grpo_step",
    "init_critic",
    "make_optimizer",
    "online_dpo_step",
    "ppo_step",
    "token_logprobs",
]
