"""Lower an unrolled loop over four layers for a GPU that isn't there: `python -m tests.pallas_kernels.lower_launches`.

Prints one line of JSON: kernels that Triton compiled, custom calls, and those of them that XLA may put into a CUDA graph.
"""

import json

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.triton_compile import COMPILE_EVENT

LAYERS = 4


def unrolled(qkv, angles, k, v, slot):
    for layer in range(LAYERS):
        q, k, v, _ = pallas_kernels.rope_and_cache(qkv, angles, angles, k, v, slot, layer=layer)
        qkv = qkv + q.sum()
    return qkv, k, v


def main() -> None:
    dispatch.current_device = lambda: dispatch.Device("gpu", (9, 0), True, "NVIDIA H100")
    jax.config.update("jax_enable_compilation_cache", False)  # which keeps what an earlier run compiled
    times: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: times.append(seconds) if event == COMPILE_EVENT else None
    )
    cache = jax.ShapeDtypeStruct((LAYERS, 2, 4, 2, 16, 64), jnp.bfloat16)
    angles, slot = jax.ShapeDtypeStruct((2, 32), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(unrolled).trace(jax.ShapeDtypeStruct((2, 4, 6 * 64), jnp.bfloat16), angles, cache, cache, slot)
    calls = [
        line for line in traced.lower(lowering_platforms=("cuda",)).as_text().splitlines() if "custom_call" in line
    ]
    recordable = [line for line in calls if "@triton_kernel_call_ffi" in line and "api_version = 4" in line]
    print(json.dumps({"compiled": len(times), "calls": len(calls), "recordable": len(recordable)}))


if __name__ == "__main__":
    main()
