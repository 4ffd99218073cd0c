"""The one rule that picks an implementation: (device, dtype, shapes) -> name.

Each rule is a pure function, so that a test can read its decisions without owning the device. `REFERENCE` runs
anywhere. `TRITON` needs compute capability 8.0 (bf16 tensor cores), 16-bit activations, or float32 logits to draw
from, and the `jax-triton` package. The quantized product alone has two more: `DEQUANTIZE` is a kernel that unpacks the
matrix, then cuBLAS; `MOSAIC` is the kernel for few rows and weights of 8 bits.
"""

import functools
import importlib.util
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp

REFERENCE = "reference"
TRITON = "triton"
DEQUANTIZE = "dequantize"
MOSAIC = "mosaic"

INT4_MATMUL_GROUPS = (32, 64, 128)
MOSAIC_JAX = (0, 11, 2), (0, 12)
"""The first jax that the Mosaic GPU kernel runs with, and the first that it was not tried with: that API changes with every release."""
ATTENTION_HEAD_DIMS = (64, 128, 256)
_HALF_PRECISION = (jnp.bfloat16, jnp.float16)


@dataclass(frozen=True)
class Device:
    """What a rule may know about the machine: `capability` is (major, minor) on NVIDIA GPUs, None elsewhere."""

    backend: str
    capability: tuple[int, int] | None = None
    has_triton: bool = False
    name: str = ""
    has_mosaic: bool = False
    multiprocessors: int = 0


@functools.cache
def current_device() -> Device:
    """The default JAX device. Warns once when a GPU could run the fused kernels but `jax-triton` is missing."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "nvidia" not in device.device_kind.lower():
        return Device(device.platform, name=device.device_kind)
    major, minor = (int(part) for part in device.compute_capability.split("."))
    has_triton = importlib.util.find_spec("jax_triton") is not None
    if not has_triton and (major, minor) >= (8, 0):
        warnings.warn(
            f"{device.device_kind}: the fused kernels need jax-triton, which is not installed; using plain XLA, which "
            "is several times slower in rollouts. Install jax-triton to use them.",
            stacklevel=2,
        )
    has_mosaic = MOSAIC_JAX[0] <= jax.__version_info__ < MOSAIC_JAX[1]
    return Device("gpu", (major, minor), has_triton, device.device_kind, has_mosaic, device.core_count)


def _device_problem(device: Device) -> str | None:
    """Why no Triton kernel can run on `device`; None when it can."""
    if device.backend != "gpu" or device.capability is None:
        return f"it needs an NVIDIA GPU, the backend is {device.backend!r}"
    if device.capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {device.capability[0]}.{device.capability[1]}"
    if not device.has_triton:
        return "the package jax-triton is not installed"
    return None


def _triton_problem(device: Device, dtype) -> str | None:
    """Why no Triton kernel can run on `device` with activations of `dtype`; None when it can."""
    if problem := _device_problem(device):
        return problem
    if jnp.dtype(dtype) not in [jnp.dtype(half) for half in _HALF_PRECISION]:
        return f"it needs bfloat16 or float16 activations, got {jnp.dtype(dtype).name}"
    return None


def int4_matmul_problem(device: Device, dtype, k: int, group: int, code: str = "int4") -> str | None:
    """Why the fused int4 kernel cannot run this product; None when it can."""
    if problem := _triton_problem(device, dtype):
        return problem
    if group not in INT4_MATMUL_GROUPS:
        return f"group size must be one of {INT4_MATMUL_GROUPS}, got {group}"
    if code != "int4":
        return f"it reads int4 weights, these are {code}"
    return None


def mosaic_problem(device: Device, dtype, scales_dtype, group: int) -> str | None:
    """Why the int4 product cannot take its Mosaic GPU form; None when it can. `Int4Config.fits` knows its shapes."""
    if problem := int4_matmul_problem(device, dtype, 0, group):
        return problem
    if device.capability is None or device.capability[0] != 9:
        return f"it is written for compute capability 9, this GPU has {device.capability}"
    if not device.has_mosaic:
        return "it needs jax >= {}, < {}".format(*(".".join(map(str, version)) for version in MOSAIC_JAX))
    if not jnp.dtype(dtype) == jnp.dtype(scales_dtype) == jnp.bfloat16:
        return f"it needs bfloat16 rows and scales, got {jnp.dtype(dtype).name} and {jnp.dtype(scales_dtype).name}"
    return None


LAYER_ROWS = 64
"""Rows up to which a decode step's layers are one kernel: those of a tile whose sums four warp groups hold."""


def decode_layer_problem(device: Device, dtype, scales_dtype, m: int) -> str | None:
    """Why what a layer does between two attentions cannot be a kernel; None when it can. `tuning.decode_layer_configs` knows its shapes."""
    if problem := mosaic_problem(device, dtype, scales_dtype, 64):
        return problem
    return f"it has no more than {LAYER_ROWS} rows, got {m}" if m > LAYER_ROWS else None


LAYER_QUERIES = 32
"""Query heads that a tile of the attention in the kernel of decode layers has at most."""


def layer_attention_problem(
    device: Device,
    dtype,
    head_dim: int,
    share: int,
    tiles: int,
    has_window: bool,
    softcap: float | None,
    cache_dtype,
    cache_slots: tuple[int, int],
) -> str | None:
    """Why the kernel of a decode step's layers cannot have their attention, and with it all layers; None when it can, and then it is faster.

    Every program takes one of the `tiles` of a few generations and a kv head, `share` query heads each: more would follow each
    other, and far fewer would leave multiprocessors idle, for long with many of the `cache_slots` of a prompt and a suffix.
    """
    if has_window or softcap is not None:
        return "it has no window and no soft-cap of scores"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it needs bfloat16 rows, got {jnp.dtype(dtype).name}"
    if jnp.dtype(cache_dtype) != jnp.bfloat16:
        return f"keys and values must be bfloat16, got {jnp.dtype(cache_dtype).name}"
    if head_dim not in (64, 128):
        return f"head_dim must be 64 or 128, got {head_dim}"
    if any(slots % 8 for slots in cache_slots):
        return f"the caches are copied in tiles of eight slots, got {cache_slots[0]} of a prompt and {cache_slots[1]} of a suffix"
    if share > LAYER_QUERIES:
        return f"a key has no more than {LAYER_QUERIES} queries, got {share}"
    # On an H200, 16 rows of the 1.5B, 32 tiles of 768 slots, made 12,969 tokens/s so, a kernel a layer, and 11,441 with an attention of its own.
    least = 0.2 if sum(cache_slots) <= 1024 else 0.4
    if not least * device.multiprocessors <= tiles <= device.multiprocessors:
        return f"{tiles} tiles are not about one for each of {device.multiprocessors} multiprocessors"
    return None


# Rows above which dequantizing the layer and calling cuBLAS is taken. On an H200 Triton's form wins by 1.3 to 1.6 at 256 rows
# (docs/benchmarks.md); with more rows it was not compared. Before Hopper, dequantized weights cost more: there is less memory bandwidth for each FLOP.
INT4_CROSSOVER_ROWS = {9: 256, 8: 512}
MOSAIC_CROSSOVER_ROWS = 2048
"""The same of the Mosaic GPU form. On an H200 the products of a layer of an 8B are faster by 1.4, 1.2 and 1.1 with 512, 1,024 and 2,048 rows, permuting x's
columns included, of a 1.5B by 1.03 with the last two; with 4,096 rows the two are as fast."""


INT8_ROWS = 256
"""Rows up to which 8-bit weights are multiplied by their kernel; above, they are dequantized."""


def int4_matmul_rule(
    device: Device, dtype, m: int, k: int, group: int, code: str = "int4", *, mosaic: bool = False
) -> str:
    """Fused for few rows, dequantize + cuBLAS while training (many rows) and for codes without a kernel.

    `mosaic`: the fused kernel would be the Mosaic GPU form, which is faster for more rows.
    """
    if int4_matmul_problem(device, dtype, k, group, code) is None:
        assert device.capability is not None
        most = MOSAIC_CROSSOVER_ROWS if mosaic else INT4_CROSSOVER_ROWS.get(device.capability[0], 256)
        if m <= most:
            return TRITON
    return REFERENCE if dequantize_problem(device, dtype, k, group) else DEQUANTIZE


def dequantize_problem(device: Device, dtype, k: int, group: int) -> str | None:
    """Why the kernel that unpacks a whole matrix cannot run; None when it can, and then it is faster."""
    if problem := _triton_problem(device, dtype):
        return problem
    if k % 64 or group & (group - 1):
        return f"it needs a multiple of 64 inputs in groups of a power of two, got {k} in groups of {group}"
    return None


def merge_layer_problem(device: Device, dtype, k: int, own: int, group: int) -> str | None:
    """Why an int4 matrix in groups of `own` and its adapter cannot be merged into 8 bits by one kernel; None when they can, and then it is faster."""
    if problem := _triton_problem(device, dtype):
        return problem
    if k % group or group & (group - 1) or own & (own - 1):
        return f"it needs groups of powers of two, of which the second divides the inputs, got {own} and {group} of {k}"
    return None


def dense_matmul_problem(device: Device, dtype, weight_dtype, k: int) -> str | None:
    """Why the kernel of 16-bit weights cannot run this product; None when it can."""
    if problem := _triton_problem(device, dtype):
        return problem
    if jnp.dtype(weight_dtype) != jnp.dtype(dtype):
        return f"weights must have the activations' type, got {jnp.dtype(weight_dtype).name}"
    return f"K must divide by 64, got {k}" if k % 64 else None


DENSE_TILES = 132
"""Tiles of 64 x 64 results that fill a GPU. With fewer, K must be split; XLA, left to itself, then adds a launch that sums the parts."""


def dense_matmul_rule(
    device: Device, dtype, weight_dtype, m: int, n: int, k: int, measured: tuple[float, float] | None
) -> str:
    """The kernel where it was measured to be faster: `measured` is (its time, the library's), both in microseconds.

    The library's is without such a sum, since a rollout's compiler options forbid it. Unmeasured (None), the kernel for products
    of few results whose K must be split: 64 rows, or an adapter's few columns.
    """
    if dense_matmul_problem(device, dtype, weight_dtype, k):
        return REFERENCE
    if measured is not None:
        return TRITON if measured[0] < measured[1] else REFERENCE
    few = m * n < DENSE_TILES * 64 * 64
    return TRITON if few and (m <= 64 or n <= 256) else REFERENCE


GATED_ROWS = 64
"""Rows up to which an unmeasured product of gate and up is fused with its gate: the bytes of W bind it, and its own kernel takes what
the library's does (on an H200 18, 28 and 60 us of 19, 27 and 62 for the three models of docs/benchmarks.md), less the gate."""


def gated_matmul_rule(device: Device, dtype, weight_dtype, m: int, k: int, measured: tuple[float, float] | None) -> str:
    """The kernel where it was measured to be faster: `measured` is (its time, that of the library's product and the gate).

    What it cannot run is `dense_matmul_problem`. Unmeasured (None), the kernel for few rows.
    """
    if dense_matmul_problem(device, dtype, weight_dtype, k):
        return REFERENCE
    fused = m <= GATED_ROWS if measured is None else measured[0] < measured[1]
    return TRITON if fused else REFERENCE


def decode_attention_problem(
    device: Device, dtype, head_dim: int, static_window: bool = True, softcap: float | None = None, cache_dtype=None
) -> str | None:
    """Why the decode-attention kernel cannot run this shape; None when it can. The cache has `dtype` unless it says otherwise."""
    if problem := rope_and_cache_problem(device, dtype, head_dim, cache_dtype):
        return problem
    if not static_window:
        return "the window must be a Python int, got a traced array"
    if softcap is not None:
        return "it has no soft-cap of the scores"
    return None


def decode_attention_rule(
    device: Device, dtype, head_dim: int, static_window: bool = True, softcap: float | None = None, cache_dtype=None
) -> str:
    """The kernel wherever it can run: plain XLA reads the whole cache and copies it out of its stack."""
    problem = decode_attention_problem(device, dtype, head_dim, static_window, softcap, cache_dtype)
    return REFERENCE if problem else TRITON


def rope_and_cache_problem(device: Device, dtype, head_dim: int, cache_dtype=None) -> str | None:
    """Why the rotation-and-cache kernel cannot run this shape; None when it can, and then it is faster."""
    if problem := _triton_problem(device, dtype):
        return problem
    if head_dim not in ATTENTION_HEAD_DIMS:
        return f"head_dim must be one of {ATTENTION_HEAD_DIMS}, got {head_dim}"
    assert device.capability is not None
    if cache_dtype is not None and jnp.dtype(cache_dtype).name.startswith("float8") and device.capability < (8, 9):
        return f"a cache of {jnp.dtype(cache_dtype).name} needs compute capability 8.9; int8 does not"
    return None


def rope_attention_problem(
    device: Device,
    dtype,
    head_dim: int,
    static_window: bool,
    softcap: float | None,
    cache_dtype,
    takes_new_tokens: bool,
) -> str | None:
    """Why rotation, cache write and attention cannot be one kernel; None when they can: one launch in place of two.

    `takes_new_tokens` is that of the attention's configuration.
    """
    if problem := decode_attention_problem(device, dtype, head_dim, static_window, softcap, cache_dtype):
        return problem
    if jnp.dtype(cache_dtype) != jnp.dtype(dtype):
        return f"keys and values must have the activations' type, got {jnp.dtype(cache_dtype).name}"
    return (
        None
        if takes_new_tokens
        else "the programs of its attention do not take new tokens (AttentionConfig.takes_new_tokens)"
    )


NORM_WIDTH = 8192
"""Widest row that the norm's kernel keeps in the registers of one program."""


def add_rms_norm_problem(device: Device, dtype, width: int) -> str | None:
    """Why the kernel of residual and norm cannot run rows of `width`; None when it can, and then it is faster."""
    if problem := _triton_problem(device, dtype):
        return problem
    return f"rows must have at most {NORM_WIDTH} columns, got {width}" if width > NORM_WIDTH else None


def gated_activation_problem(device: Device, dtype) -> str | None:
    """Why the kernel of the MLP's gate cannot run; None when it can, and then it is faster."""
    return _triton_problem(device, dtype)


def draw_token_problem(device: Device, dtype) -> str | None:
    """Why the kernels that draw a token cannot run; None when they can: two launches in place of XLA's eight."""
    if problem := _device_problem(device):
        return problem
    return None if jnp.dtype(dtype) == jnp.float32 else f"it reads float32 logits, got {jnp.dtype(dtype).name}"


def draw_corrected_problem(device: Device, proposal_dtype, dtype, head_dtype, candidates: int) -> str | None:
    """Why the kernels that draw by a proposal cannot run with hidden states of `dtype`; None when they can: two launches."""
    if problem := draw_token_problem(device, proposal_dtype) or _triton_problem(device, dtype):
        return problem
    if jnp.dtype(head_dtype) != jnp.dtype(dtype):
        return f"the head must have the hidden states' type, got {jnp.dtype(head_dtype).name}"
    return f"candidates must be a power of two, got {candidates}" if candidates & (candidates - 1) else None


def resolve(op: str, implementation: str | None, chosen: str, problem: str | None) -> str:
    """`chosen` unless `implementation` names another one.

    Raises:
      ValueError: `implementation` is unknown, or is the kernel and `problem` says why that cannot run.
    """
    if implementation is None:
        return chosen
    if implementation not in (REFERENCE, TRITON):
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; use {REFERENCE!r}, {TRITON!r} or None")
    if implementation == TRITON and problem is not None:
        raise ValueError(f"{op}: implementation='triton' cannot run: {problem}")
    return implementation
