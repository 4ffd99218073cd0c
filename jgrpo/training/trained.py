"""What a run trains: an adapter on the frozen base, or with `lora: null` the model's own weights, all of them.

Weights that are trained are float32 whatever the compute dtype: an update is some 10^-5 of a weight, and bfloat16, which has 8
bits, would round most of them away. The forward casts a layer's matrices when it reads them; the rollout decodes with a
copy in the compute dtype, made for it and freed after it. A frozen copy of the weights at the start, in the compute
dtype, exists only where a loss compares the policy with it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jgrpo.checkpoints.adapter import export_adapter, start_adapter
from jgrpo.checkpoints.hf import resolve_checkpoint
from jgrpo.checkpoints.merged import export_merged
from jgrpo.config import AlgorithmConfig, LoraConfig
from jgrpo.lora import WEIGHTS
from jgrpo.sft_config import AnyConfig
from jgrpo.training.policy import Policy
from jgrpo.training.run_directory import ADAPTER, MODEL
from jgrpo.training.state import TrainState

Params = Mapping[str, Any]
TRAINED_DTYPE = "float32"


def loaded_dtype(config: LoraConfig, compute_dtype: Any) -> Any:
    """What `load_policy` stores unquantized weights in."""
    return jnp.dtype(TRAINED_DTYPE) if config.is_full else compute_dtype


def keeps_start(config: AlgorithmConfig) -> bool:
    """Whether the loss compares the policy with the model that the run started from."""
    return (config.beta > 0 or config.algorithm == "online_dpo") and config.reference_sync_steps == 0


def starting_point(key: Array, config: LoraConfig, policy: Policy, keep_start: bool) -> tuple[Policy, Params]:
    """The policy that stays and what is trained: of a whole model the base is `{}`, or a copy in the compute dtype."""
    if not config.is_full:
        return policy, start_adapter(key, config, policy.model.config)
    base = jax.tree.map(lambda leaf: jnp.array(leaf, policy.dtype, copy=True), policy.base) if keep_start else {}
    return replace(policy, base=base), {WEIGHTS: policy.base}


def shapes_of(state: TrainState) -> TrainState:
    """The state without its arrays: what a checkpoint is restored by, while the old arrays may go."""
    return jax.eval_shape(lambda: state)


def export_trained(directory: Path, config: AnyConfig, policy: Policy, trained: Params) -> Path:
    """Write `adapter/` (PEFT), or `model/`: a Hugging Face checkpoint in the compute dtype, what the forward computes with.

    Raises:
        UserError: the disk is full.
    """
    model, shape = config.model.model, policy.model.config
    if not config.lora.is_full:
        return export_adapter(directory / ADAPTER, trained, config.lora, shape, model, replace=True)
    source, dtype = resolve_checkpoint(model, config.model.revision), jnp.dtype(policy.model.dtype)
    weights = trained[WEIGHTS]
    return export_merged(directory / MODEL, source, {}, config.lora, shape, base=weights, dtype=dtype, replace=True)


def outcome(path: Path) -> str:
    """Where what was trained is, in words."""
    return f"the {path.name} is in {path}"
