"""Compile the rollout for an H200 on a machine without one: `python -m tests.rollout.gpu_program int4|int8|bf16|merge`.

Prints XLA's optimized program, for `merge` that of one matrix of a copy in 8 bits. The shapes are Qwen2.5-1.5B's with two layers, 64 rows, and a small
vocabulary whose head has the kernel of a large one. Run apart from the tests, because it needs the packages of the GPU extra, Triton's compiler and a
process that takes itself for a GPU's.
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
from jgrpo.rollout.weights import COPY_GROUP, _merge_into, merge, plan_weights
from pallas_kernels import LayerMatrix, dispatch

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


def take_for_h200() -> None:
    """Let this process take itself for an H200's."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask for its version
    jax.default_backend = lambda: "gpu"
    dispatch.current_device = lambda: dispatch.Device("gpu", (9, 0), True, "NVIDIA H200", True, 132)


def merge_program() -> str:
    """The optimized program that puts a layer's gate and up, with its adapter, into the stack of a copy in 8 bits."""
    rows, width, rank = 2 * CONFIG.intermediate_size, CONFIG.hidden_size, 64
    shapes = [((rows, width // 2), jnp.uint8), ((rows, width // INT4_GROUP), jnp.bfloat16)]
    shapes += [((rank, width), jnp.float32), ((rows, rank), jnp.float32)]
    shapes += [((rows, width), jnp.uint8), ((width // COPY_GROUP, rows), jnp.bfloat16)]
    sharding = h200()
    packed, scales, a, b, *into = (
        jax.ShapeDtypeStruct((LAYERS, *shape), dtype, sharding=sharding) for shape, dtype in shapes
    )
    stack, number = Int4Weight(packed, scales), jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    how = dict(layers=LAYERS, dtype="bfloat16", gate=True)
    return _merge_into.lower(LayerMatrix(*into), stack, number, (a, b), number, **how).compile().as_text()


def program(weights: str) -> str:
    """The optimized program of `rollout_program` with the base as stored, or with a merged copy."""
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
    take_for_h200()
    print(merge_program() if sys.argv[1] == "merge" else program(sys.argv[1]))
