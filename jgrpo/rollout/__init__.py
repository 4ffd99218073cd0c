"""Prompts to completions: the sampler's loop, its transforms of the logits, and the `Rollout` pytree."""

from jgrpo.rollout.batch import generate, rollout_program
from jgrpo.rollout.sampler import stream
from jgrpo.rollout.sampling import draw, truncate
from jgrpo.rollout.types import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout

__all__ = [
    "FINISH_LENGTH",
    "FINISH_STOP",
    "Prompts",
    "Rollout",
    "draw",
    "generate",
    "rollout_program",
    "stream",
    "truncate",
]
