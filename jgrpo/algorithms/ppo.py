"""PPO's critic side (Schulman et al. 2017, arXiv:1707.06347): token rewards, GAE, whitening, clipped value loss.

The policy side is `policy_loss` with the clipped loss and advantages of shape [*S, C]. Masked positions (padding, or
tokens that a tool wrote) do not exist for the recursion: it passes over them to the next token of the policy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jgrpo.algorithms.masked import masked_centre, masked_mean


def token_rewards(
    scores: Float[Array, "*S"], kl: Float[Array, "*S C"], mask: Bool[Array, "*S C"], beta: Float[Array, ""] | float
) -> Float[Array, "*S C"]:
    """r_t = −β KL_t, plus the row's score at its last token in the mask (RLHF practice, arXiv:2203.02155).

    An empty row gets no reward at all; so does a NaN score.
    """
    tokens_left = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)
    is_last = mask & (tokens_left == 1)
    score = jnp.nan_to_num(scores, nan=0.0)[..., None]
    return jnp.where(mask, -beta * kl, 0) + jnp.where(is_last, score, 0)


def gae(
    rewards: Float[Array, "*S C"],
    values: Float[Array, "*S C"],
    mask: Bool[Array, "*S C"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "*S C"], Float[Array, "*S C"]]:
    """(advantages, returns) of generalised advantage estimation (arXiv:1506.02438); 0 outside the mask.

    V after the last token is 0: a completion is an episode that ends, by EOS or by the length limit.
    """

    def step(carry, inputs):
        next_value, next_advantage = carry
        reward, value, valid = inputs
        # δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γ λ A_{t+1}
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage)
        return carry, jnp.where(valid, advantage, 0)

    by_time = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask))
    start = (jnp.zeros_like(by_time[1][0]), jnp.zeros_like(by_time[1][0]))
    _, advantages = jax.lax.scan(step, start, by_time, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, jnp.where(mask, advantages + values, 0)


def whiten(x: Float[Array, "*S C"], mask: Bool[Array, "*S C"], *, epsilon: float = 1e-8) -> Float[Array, "*S C"]:
    """(x − mean) / √(var + ε) over all masked tokens, population variance; 0 outside the mask."""
    centred = masked_centre(x, mask)
    return centred * jax.lax.rsqrt(masked_mean(centred**2, mask) + epsilon)


def clipped_value_loss(
    values: Float[Array, "*S C"],
    old_values: Float[Array, "*S C"],
    returns: Float[Array, "*S C"],
    *,
    clip: float = 0.2,
) -> Float[Array, "*S C"]:
    """Per-token value loss that does not reward leaving V_old ± clip (PPO2 of OpenAI baselines).

    Aggregated like the policy loss and added to it with a coefficient (0.1 in TRL).
    """
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    # ½ max( (V − R)², (clip(V, V_old ± c) − R)² )
    return 0.5 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
