"""The reference policy: the base with an adapter of its own, or with none; a copy of the base only in full fine-tuning.

- `{}`, the default: the base model, adapter off.
- `reference_adapter`: a frozen earlier adapter, for a run that continues from it. Its scale may differ from the trained one's
  (alpha, rank), so the difference is folded into its B.
- `reference_sync_steps`: a copy of the trained adapter, renewed every N steps (the moving reference of Gorbatovski et al.
  2024, arXiv:2404.09656, as a hard update). A soft update α·π + (1 − α)·π_ref is left out: the mean of two adapters' A and B
  is not the adapter of the mean weights.

Where the whole model is trained, the reference is the copy of its start that stays in the base's place, or (synced) a copy.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jgrpo.algorithms.kl import kl_k1
from jgrpo.algorithms.masked import masked_mean, masked_sum
from jgrpo.checkpoints.adapter import load_adapter
from jgrpo.config import AlgorithmConfig, LoraConfig, TrainConfig
from jgrpo.models import ModelConfig, Transformer
from jgrpo.rollout import Rollout
from jgrpo.training.forward import Rows, at_length, rows_of
from jgrpo.training.state import TrainState
from jgrpo.training.step import batch_split, policy_forward
from jgrpo.training.trained import keeps_start

Lora = Mapping[str, Any]


def initial_reference(config: TrainConfig, model_config: ModelConfig, lora: Lora) -> Lora:
    """The reference adapter of a fresh run.

    Raises:
        UserError: `reference_adapter` is no PEFT adapter of this model.
    """
    if config.algorithm.reference_adapter is not None:
        adapter, own = load_adapter(config.algorithm.reference_adapter, model_config)
        return rescaled(adapter, own, config.lora)
    return copy_of(lora) if config.algorithm.reference_sync_steps else {}


def describe_reference(config: AlgorithmConfig, is_full: bool = False) -> str:
    """What the user is told of it before the run."""
    if is_full:
        return _describe_full(config)
    if config.reference_adapter is not None:
        return f"reference: adapter {config.reference_adapter}"
    if config.reference_sync_steps:
        return f"reference: the trained adapter of up to {config.reference_sync_steps} steps ago"
    return "reference: the base model, adapter off"


def _describe_full(config: AlgorithmConfig) -> str:
    if config.reference_sync_steps:
        return f"reference: a copy of the weights of up to {config.reference_sync_steps} steps ago"
    return "reference: a frozen copy of the weights at the start" if keeps_start(config) else "no reference"


def rescaled(adapter: Lora, own: LoraConfig, used: LoraConfig) -> Lora:
    """The adapter that does under the scale of `used` what `adapter` does under that of `own`."""
    factor = own.scale / used.scale
    return {name: {**module, "b": module["b"] * factor} for name, module in adapter.items()}


def copy_of(lora: Lora) -> Lora:
    """The same values in buffers of their own, as donation needs."""
    return jax.tree.map(jnp.copy, lora)


def synced(state: TrainState, every: int) -> TrainState:
    """The state with the trained adapter as its reference, if its step is one in `every` (0: never)."""
    if every == 0 or int(state.step) % every:
        return state
    return state.replace(reference=copy_of(state.lora))


@partial(jax.jit, static_argnames=("model", "config"))
def completion_kl(
    lora: Lora, reference: Lora, base: Mapping[str, Any], rollout: Rollout, *, model: Transformer, config: TrainConfig
) -> tuple[Float[Array, "Q G"], Float[Array, ""]]:
    """Σ_t (ℓ − ℓ_ref) of each completion, over tokens that the model wrote, and its mean over all of those.

    `microbatch_size` rows at a time; raises ValueError if it does not divide the completions.
    """
    (_, size, buckets), mask = batch_split(config), rollout.policy_mask
    if mask[..., 0].size % size:
        raise ValueError(f"{mask[..., 0].size} completions do not divide into microbatches of {size} rows")
    rows = jax.tree.map(lambda array: array.reshape(-1, size, *array.shape[1:]), rows_of(rollout, buckets))

    def of(part: Rows) -> Array:
        return kl_k1(*(policy_forward(model, base, config, adapter, part)[0] for adapter in (lora, reference)))

    kl = jax.lax.map(partial(at_length, of), rows).reshape(mask.shape)
    return masked_sum(kl, mask, axis=-1), masked_mean(kl, mask)
