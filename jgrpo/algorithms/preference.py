"""Online preference losses: the best and the worst completion of a group make a pair (Guo et al. 2024, arXiv:2402.04792).

Sums of log-probabilities over tokens, not means, as in DPO; groups whose rewards tie make no pair. Deviation from
TRL's OnlineDPO: G completions and any reward, instead of two completions and a judge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jgrpo.algorithms.masked import masked_sum
from jgrpo.algorithms.rewards import zero_variance_groups


class Pairs(NamedTuple):
    """One pair for each question."""

    chosen: Int[Array, " Q"]
    """Index in its group of the completion with the highest reward."""
    rejected: Int[Array, " Q"]
    """… with the lowest."""
    valid: Bool[Array, " Q"]
    """False where the rewards tie or fewer than two are given."""

    @property
    def weights(self) -> Float[Array, " Q"]:
        """Mean over the valid pairs, as weights; all 0 if there is none."""
        return self.valid / jnp.maximum(jnp.sum(self.valid), 1)


def select_pairs(rewards: Float[Array, "Q G"]) -> Pairs:
    """Best and worst of each group; the first one among equals. NaN rewards are never picked in a valid pair."""
    valid = ~jnp.isnan(rewards)
    chosen = jnp.argmax(jnp.where(valid, rewards, -jnp.inf), axis=-1)
    rejected = jnp.argmin(jnp.where(valid, rewards, jnp.inf), axis=-1)
    return Pairs(chosen, rejected, ~zero_variance_groups(rewards))


def pair_margins(
    logprobs: Float[Array, "Q G C"], ref_logprobs: Float[Array, "Q G C"], mask: Bool[Array, "Q G C"], pairs: Pairs
) -> Float[Array, " Q"]:
    """z = (Σℓ − Σℓ_ref) of the chosen minus that of the rejected completion."""
    gains = masked_sum(logprobs - ref_logprobs, mask, axis=-1)

    def of(index: Int[Array, " Q"]) -> Float[Array, " Q"]:
        return jnp.take_along_axis(gains, index[:, None], axis=-1)[:, 0]

    return of(pairs.chosen) - of(pairs.rejected)


def dpo_loss(margins: Float[Array, "*S"], *, beta: float = 0.1) -> Float[Array, "*S"]:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290): −log σ(β z)."""
    return -jax.nn.log_sigmoid(beta * margins)


def ipo_loss(margins: Float[Array, "*S"], *, beta: float = 0.1) -> Float[Array, "*S"]:
    """IPO (Azar et al. 2023, arXiv:2310.12036): (z − 1 / 2β)²."""
    return (margins - 1.0 / (2.0 * beta)) ** 2


PREFERENCE_LOSSES = {"sigmoid": dpo_loss, "ipo": ipo_loss}
