"""Training: the pure GRPO step and the loop around it.

`grpo_step`, `token_logprobs` and `TrainState` work from a notebook on plain arrays; `train` runs a whole
configuration. Order of the data: prompts, rollout, rewards, advantages, step, checkpoint.
"""

from jgrpo.training.forward import Rows, token_logprobs
from jgrpo.training.optimizer import make_optimizer
from jgrpo.training.state import Batch, TrainState
from jgrpo.training.step import grpo_step

__all__ = ["Batch", "Rows", "TrainState", "grpo_step", "make_optimizer", "token_logprobs"]
