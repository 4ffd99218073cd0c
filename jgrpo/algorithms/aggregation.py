"""How per-token losses become one number: as weights, loss = Σ weights · per-token loss.

The weights are computed once, from the mask of the whole optimizer batch. Microbatches slice them, so the way a
batch is split cannot change the gradient (TRL #3021 and #5619 are what happens otherwise). Weights are 0 outside
the mask; an empty row or batch gives weights 0, never 0/0. "Rows" counts every completion, empty ones included.

The choice is independent of the loss. verl's names: grpo = seq-mean-token-mean, bnpo and dapo = token-mean,
dr_grpo = seq-mean-token-sum-norm, luspo = seq-mean-token-sum.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Total = Float[Array, ""] | float | None


def grpo_weights(
    mask: Bool[Array, "Q G C"], max_completion_length: int, generation_tokens: Total
) -> Float[Array, "Q G C"]:
    """GRPO (arXiv:2402.03300): mean over rows of the row's token mean, m / |o| / rows."""
    lengths = jnp.sum(mask, axis=-1, keepdims=True)
    return mask / jnp.maximum(lengths, 1) / _rows(mask)


def bnpo_weights(
    mask: Bool[Array, "Q G C"], max_completion_length: int, generation_tokens: Total
) -> Float[Array, "Q G C"]:
    """Mean over the tokens of the optimizer batch, m / Σ m (TRL's bnpo)."""
    return mask / jnp.maximum(jnp.sum(mask), 1)


def dr_grpo_weights(
    mask: Bool[Array, "Q G C"], max_completion_length: int, generation_tokens: Total
) -> Float[Array, "Q G C"]:
    """Dr. GRPO (arXiv:2503.20783): a constant denominator, m / (rows · max_completion_length)."""
    return mask / (_rows(mask) * float(max_completion_length))


def dapo_weights(
    mask: Bool[Array, "Q G C"], max_completion_length: int, generation_tokens: Total
) -> Float[Array, "Q G C"]:
    """DAPO (arXiv:2503.14476): mean over the tokens of the whole generation batch.

    `generation_tokens` is that count; None means that the optimizer batch is the generation batch.
    """
    total = jnp.sum(mask) if generation_tokens is None else generation_tokens
    return mask / jnp.maximum(total, 1)


def prompt_weights(
    mask: Bool[Array, "Q G C"], max_completion_length: int, generation_tokens: Total
) -> Float[Array, "Q G C"]:
    """ScaleRL (arXiv:2510.13786): mean over questions of the token mean of the question's group."""
    tokens = jnp.sum(mask, axis=(-2, -1), keepdims=True)
    return mask / jnp.maximum(tokens, 1) / mask.shape[0]


def luspo_weights(
    mask: Bool[Array, "Q G C"], max_completion_length: int, generation_tokens: Total
) -> Float[Array, "Q G C"]:
    """LUSPO (arXiv:2602.05261): mean over rows of l · |o| for a loss l that is constant in its row, m / rows."""
    return mask / float(_rows(mask))


def _rows(mask: Bool[Array, "Q G C"]) -> int:
    return mask.shape[0] * mask.shape[1]


Aggregation = Callable[[Bool[Array, "Q G C"], int, Total], Float[Array, "Q G C"]]

AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": grpo_weights,
    "bnpo": bnpo_weights,
    "dr_grpo": dr_grpo_weights,
    "dapo": dapo_weights,
    "prompt": prompt_weights,
    "luspo": luspo_weights,
}


def aggregation_weights(
    mask: Bool[Array, "Q G C"], kind: str, max_completion_length: int, generation_tokens: Total = None
) -> Float[Array, "Q G C"]:
    """Weights w with loss = Σ w · l, from the mask of the whole optimizer batch.

    `kind`: a key of `AGGREGATIONS` (KeyError otherwise). `generation_tokens`: tokens in the mask of the whole
    generation batch, used by "dapo" when one batch is split over several optimizer steps.
    """
    return AGGREGATIONS[kind](mask, max_completion_length, generation_tokens)
