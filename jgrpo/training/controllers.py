"""Coefficients that follow what a run measures: β towards a KL, the entropy bonus towards an entropy.

They are part of the state, so a resumed run goes on with them, and the step takes them as arrays: no recompilation. A
controller sees the metrics of the step that has just ended. Deviation from Skywork-OR1 (arXiv:2505.22312): whether the
bonus acts is decided by the entropy of the batch before, since that of the batch itself would need a forward of its own.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from jgrpo.algorithms.entropy import active_entropy_coef, next_entropy_coef
from jgrpo.algorithms.kl import adaptive_beta
from jgrpo.config import AlgorithmConfig

Coefficients = Mapping[str, Array]


def initial_coefficients(config: AlgorithmConfig) -> dict[str, Array]:
    """What is adapted, at its configured value: `beta`; `entropy_coef` (0 until an entropy is known) and its reserve."""
    coefficients = {}
    if config.kl_target is not None:
        coefficients["beta"] = jnp.asarray(config.beta, jnp.float32)
    if config.entropy_target is not None:
        coefficients["entropy_coef"] = jnp.zeros(())
        coefficients["entropy_reserve"] = jnp.asarray(config.entropy_coef, jnp.float32)
    return coefficients


def next_coefficients(
    coefficients: Coefficients, metrics: Mapping[str, Array], config: AlgorithmConfig, completions: int
) -> dict[str, Array]:
    """The coefficients of the next step, from the `kl` and `entropy` that this one measured over `completions` rows."""
    following = dict(coefficients)
    if config.kl_target is not None:
        following["beta"] = adaptive_beta(
            coefficients["beta"], metrics["kl"], target=config.kl_target, samples=completions, horizon=config.kl_horizon
        )
    if config.entropy_target is not None:
        reserve = next_entropy_coef(
            coefficients["entropy_reserve"],
            metrics["entropy"],
            target=config.entropy_target,
            increment=config.entropy_coef_step,
            maximum=config.entropy_coef_max,
        )
        following["entropy_reserve"] = reserve
        following["entropy_coef"] = active_entropy_coef(reserve, metrics["entropy"], target=config.entropy_target)
    return following


def coefficient_metrics(coefficients: Coefficients) -> dict[str, Array]:
    """`coefficients/{name}` of those in use."""
    return {f"coefficients/{name}": value for name, value in coefficients.items() if name != "entropy_reserve"}
