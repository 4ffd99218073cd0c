"""Compile the rollout for an H200 on a machine without one: `python -m tests.rollout.gpu_program int4|int8|bf16`.

Prints XLA's optimized program. The shapes are Qwen2.5-1.5B's with two layers, 64 rows, and a small vocabulary whose head has the
kernel of a large one. Run apart from the tests, because it needs the packages of the GPU extra, Triton's compiler and a process
that takes itself for a GPU's.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jgrpo.config import LoraConfig, RolloutConfig
from jgrpo.lora import init_lora
from jgrpo.models import ModelConfig, Transformer, base_shapes
from jgrpo.quantization import Int4Weight
from jgrpo.rollout import Prompts, rollout_program
from jgrpo.rollout.weights import merge, plan_weights
from pallas_kernels import dispatch

LAYERS, QUESTIONS, GROUP, PROMPT, TOKENS = 2, 8, 8, 256, 512
CONFIG = ModelConfig("qwen2", 17_024, 1536, 8960, LAYERS, 12, 2, 128, qkv_bias=True, tie_embeddings=True)
INT4_GROUP = 64


def h200() -> SingleDeviceSharding:
    """Places arrays on the GPU that isn't there."""
    target = Path(__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc("h200", "cuda", topology="1x1x1", target_config=target)
    return SingleDeviceSharding(topology.devices[0])


def quantized(path: Any, shape: jax.ShapeDtypeStruct) -> Any:
    """The shapes of an int4 matrix where the base has one."""
    if path[-1].key == "embed" or len(shape.shape) < 3:
        return shape
    *lead, width = shape.shape
    scales = jax.ShapeDtypeStruct((*lead, width // INT4_GROUP), jnp.bfloat16)
    return Int4Weight(jax.ShapeDtypeStruct((*lead, width // 2), jnp.uint8), scales)


def program(weights: Any) -> str:
    """The optimized program of `rollout_program` with the base as stored, or with a merged copy."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask for its version
    jax.default_backend = lambda: "gpu"
    dispatch.current_device = lambda: dispatch.Device("gpu", (9, 0), True, "NVIDIA H200", True, 132)
    lora_config = LoraConfig(lora_rank=32)
    model = Transformer(CONFIG, lora_config, jnp.bfloat16)
    base = jax.tree_util.tree_map_with_path(quantized, base_shapes(CONFIG, jnp.bfloat16))
    lora = jax.eval_shape(lambda key: init_lora(key, lora_config, CONFIG), jax.random.key(0))
    prompts = Prompts(
        jax.ShapeDtypeStruct((QUESTIONS, PROMPT), jnp.int32), jax.ShapeDtypeStruct((QUESTIONS,), jnp.int32)
    )
    config = RolloutConfig(num_generations=GROUP, max_completion_length=TOKENS, rollout_weights=weights)
    plan = plan_weights(model, {}, config, (QUESTIONS, PROMPT))
    form, head = plan.copy or "", plan.head
    copy = jax.eval_shape(lambda *given: merge(model, *given, form, head), base, lora) if form else None
    key = jax.eval_shape(lambda: jax.random.key(0))
    inputs = (base, lora, prompts, key, copy)
    sharding = h200()
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)
    base, lora, prompts, key, merged = inputs
    lowered = rollout_program.lower(model, base, lora, prompts, key, config, eos_ids=(1,), pad_id=0, merged=merged)
    return lowered.compile().as_text()


if __name__ == "__main__":
    print(program(sys.argv[1]))
