"""Prompts to completions: the sampler's loop, its transforms of the logits, and the `Rollout` pytree."""

from jgrpo.rollout.sampler import generate, stream
from jgrpo.rollout.sampling import draw, truncate
from jgrpo.rollout.types import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout

__all__ = ["FINISH_LENGTH", "FINISH_STOP", "Prompts", "Rollout", "draw", "generate", "stream", "truncate"]
