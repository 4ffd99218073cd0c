"""Prompts to completions: the sampler's loop, its transforms of the logits, and the `Rollout` pytree."""

from jgrpo.rollout.batch import generate, rollout_program
from jgrpo.rollout.environment import Environment, EnvironmentFactory, environment_factory, load_tools
from jgrpo.rollout.multi_turn import generate_turns
from jgrpo.rollout.sampler import stream
from jgrpo.rollout.sampling import draw, truncate
from jgrpo.rollout.tools import describe_tools
from jgrpo.rollout.types import FINISH_LENGTH, FINISH_STOP, Prompts, Rollout

__all__ = [
    "FINISH_LENGTH",
    "FINISH_STOP",
    "Environment",
    "EnvironmentFactory",
    "Prompts",
    "Rollout",
    "describe_tools",
    "draw",
    "environment_factory",
    "generate",
    "generate_turns",
    "load_tools",
    "rollout_program",
    "stream",
    "truncate",
]
